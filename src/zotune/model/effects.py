"""What a part of a forward pass does besides returning its output; a part that does nothing else can be left out.

Every torch function is followed: a tensor that is made in the part belongs to it, and only what the part returns may be
used after it. Losses that routers hand on, attributes, caches, position biases and recorded activations are such uses.
A part must also write into no tensor from outside, draw no random number, take no number out of a tensor, and leave
the attributes of modules alone. Then its output stands for the whole of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from zotune.model.intercept import METADATA, readable
from zotune.system.generators import generator_states, is_same_state

_TAKES_NUMBERS = frozenset(
    getattr(Tensor, name) for name in ("item", "tolist", "numpy", "__float__", "__int__", "__bool__", "__array__")
)
# What every module has, with its hooks and its children.
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) | {"forward"}


class EffectTracer(TorchFunctionMode):
    """A context that finds the first effect of a part of a forward pass besides its output.

    Attributes:
        found: the effect, in words; None if there is none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: str | None = None
        self._part = self._num_parts = 0
        self._made_in: Any = WeakTensorKeyDictionary()
        self._modules: Sequence[nn.Module] = ()
        self._before: Any = None

    def enter(self, modules: Sequence[nn.Module]) -> None:
        """Begin a part; `modules` are those whose attributes it might set."""
        self._modules, self._before = modules, (generator_states(), _attributes(modules))
        self._num_parts += 1
        self._part = self._num_parts

    def leave(self, output: Any) -> Any:
        """End the part; returns its output as tensors that no longer belong to it."""
        self._part = 0
        generators, attributes = self._before
        if not is_same_state(generators, generator_states()):
            self._find("it draws random numbers")
        for (_, name), value in _attributes(self._modules).items() ^ attributes.items():
            self._find(f"it sets the attribute {name!r} of a module, or changes {value!r} in it")
        with torch._C.DisableTorchFunction():
            return tree_map_only(Tensor, Tensor.detach, output)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in METADATA or self.found is not None:
            return func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves(readable(func, args, kwargs)) if isinstance(x, Tensor)]
        owners = [self._made_in.get(x) for x in given]
        if any(owner not in (None, self._part) for owner in owners):
            self._find(f"a tensor that is made in it is used after it, by {getattr(func, '__name__', func)}")
        if not self._part:
            return func(*args, **(kwargs or {}))
        if func in _TAKES_NUMBERS:
            self._find(f"it takes numbers out of a tensor, by {func.__name__}")
        foreign = [x for x, owner in zip(given, owners, strict=True) if owner is None and not x.is_inference()]
        versions = [x._version for x in foreign]
        result = func(*args, **(kwargs or {}))
        if versions != [x._version for x in foreign]:
            self._find(f"it writes into a tensor from outside, by {getattr(func, '__name__', func)}")
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and not any(made is x for x in foreign):
                self._made_in[made] = self._part
        return result

    def _find(self, effect: str) -> None:
        self.found = self.found or effect


def _attributes(modules: Iterable[nn.Module]) -> dict[tuple[int, str], Any]:
    """The attributes of modules, as values that differ if they were set or changed.

    Of tensors only that they are: those that are used are followed. Of whole numbers too: they count calls, for a
    number of a tensor is taken out by a function that is followed.
    """
    return {
        (id(module), name): _kind(value)
        for module in modules
        for name, value in vars(module).items()
        if name not in _OF_EVERY_MODULE and not isinstance(value, Tensor)
    }


def _kind(value: Any, depth: int = 2) -> Any:
    if isinstance(value, Tensor):
        return "tensor"
    if isinstance(value, int) and not isinstance(value, bool):
        return "number"
    if value is None or isinstance(value, (bool, float, complex, str, torch.dtype, torch.device)):
        return value
    if depth and isinstance(value, (list, tuple, set, dict)):
        items = value.items() if isinstance(value, dict) else value
        return type(value).__name__, tuple(_kind(v, depth - 1) for v in items)
    return id(value)


def modules_of(layer: nn.Module, model: nn.Module, layers: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules whose attributes a layer might set: its own, and those of the model outside all layers."""
    inside = {id(m) for other in layers for m in other.modules()}
    return [*layer.modules(), *(m for m in model.modules() if id(m) not in inside)]


@contextmanager
def forwards(modules: Sequence[nn.Module], functions: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Within this context the modules run other functions in place of their `forward`."""
    own = [vars(module).get("forward") for module in modules]
    for module, function in zip(modules, functions, strict=True):
        module.forward = function
    try:
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


@torch.no_grad()
def effect_of_layers(
    model: nn.Module, layers: Sequence[nn.Module], run: Callable[[], Any], main: Callable[[Any], Any]
) -> str | None:
    """What a run of the model's first layers gives besides the main output of the last of them; None for nothing.

    Args:
        model: the model.
        layers: its first layers; all between them belongs to them.
        run: runs the model.
        main: of the last layer's output that which is kept when the layers are left out.
    """
    modules = list(model.modules())
    tracer, first, last = EffectTracer(), layers[0].forward, layers[-1].forward

    def begin(*args: Any, **kwargs: Any) -> Any:
        tracer.enter(modules)
        return first(*args, **kwargs)

    def end(*args: Any, **kwargs: Any) -> Any:
        output = begin(*args, **kwargs) if layers[0] is layers[-1] else last(*args, **kwargs)
        kept, released = main(output), tracer.leave(main(output))
        return tree_map_only(Tensor, lambda x: released if x is kept else x, output)

    ends = [layers[-1]] if len(layers) == 1 else [layers[0], layers[-1]]
    with forwards(ends, [begin, end][-len(ends) :]), tracer:
        run()
    return tracer.found
