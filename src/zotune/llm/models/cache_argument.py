"""The name of a model's argument for its cache of keys and values, which depends on the model and on transformers.

transformers 5.24 renamed the argument `past_key_values` of its models to `cache`; some layers call it `layer_past`. The
signature of a module's class has the right name. No other module of zotune depends on these names.
"""

from __future__ import annotations

import functools
import inspect
from types import MethodType
from typing import Any

from torch import nn

NEW_NAME, OLD_NAME = "cache", "past_key_values"
_NAMES = (NEW_NAME, OLD_NAME, "layer_past")


def cache_argument(module: nn.Module) -> str:
    """Return the name of the argument of `module.forward` for the cache.

    Args:
        module: a model of transformers, or one of its decoder layers.

    Raises:
        TypeError: neither `module.forward` nor that of its body has such an argument.

    >>> class Layer(nn.Module):
    ...     def forward(self, hidden_states, past_key_values=None): ...
    >>> cache_argument(Layer())
    'past_key_values'
    """
    # The class's method, because a wrapper on the instance may hide the names. A classifier may pass them to its body.
    for part in (module, getattr(module, "base_model", module)):
        parameters = inspect.signature(type(part).forward).parameters
        name = next((name for name in _NAMES if name in parameters), None)
        if name is not None:
            return name
    raise TypeError(f"{type(module).__name__}.forward takes no cache: none of {', '.join(_NAMES)} is its argument")


def cache_in_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the cache that a call `module(*args, **kwargs)` passes by position or by name, or None.

    >>> class Layer(nn.Module):
    ...     def forward(self, hidden_states, cache=None, attention_mask=None): ...
    >>> cache_in_call(Layer(), ("hidden states", "keys and values"), {"attention_mask": None})
    'keys and values'
    """
    name = cache_argument(module)
    return inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments.get(name)


def accept_old_name(model: nn.Module) -> None:
    """Let a model with the argument `cache` accept `past_key_values` too, and add it to the signature.

    peft up to 0.21 passes a prefix under the old name, and reads the signature to find out whether the model accepts
    one. A model with the old name is not changed.

    >>> class Model(nn.Module):
    ...     def forward(self, input_ids, cache=None):
    ...         return cache
    >>> model = Model()
    >>> accept_old_name(model)
    >>> model(0, past_key_values=1), model(0, cache=2), model(0)
    (1, 2, None)
    """
    for part in {model, getattr(model, "base_model", model)}:  # peft may call the body of a classifier
        _accept_old_name(part)


def _accept_old_name(model: nn.Module) -> None:
    plain = type(model).forward
    signature = inspect.signature(plain)
    if NEW_NAME not in signature.parameters or OLD_NAME in signature.parameters:
        return

    @functools.wraps(plain)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if OLD_NAME in kwargs:
            kwargs[NEW_NAME] = kwargs.pop(OLD_NAME)
        return plain(self, *args, **kwargs)

    *others, last = signature.parameters.values()
    old = inspect.Parameter(OLD_NAME, inspect.Parameter.KEYWORD_ONLY, default=None)
    # A keyword-only parameter has to precede `**kwargs`.
    ends_in_kwargs = last.kind is inspect.Parameter.VAR_KEYWORD
    parameters = [*others, old, last] if ends_in_kwargs else [*others, last, old]
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    # Bound to this model only; a copy of the model binds the method to the copy.
    model.forward = MethodType(forward, model)
