"""A model without the adapter that an earlier `train` put into it, so that a cell of a notebook can be run again.

peft puts the layers of an adapter into the model itself, so the caller's `model` holds them too. Here it is read
without them: as a second tree of modules over the same tensors, which leaves the earlier result as it is and takes no
memory.
"""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any
from weakref import WeakSet

from torch import nn

from zotune.llm.quantized.backends import is_quantised
from zotune.messages import say

# The models that `train` put an adapter around.
_ADAPTED: WeakSet[nn.Module] = WeakSet()


def remember(model: nn.Module) -> None:
    """Note that `train` put an adapter around a model, whose layers are now in it."""
    _ADAPTED.add(model)


def holds_earlier_adapter(model: Any) -> bool:
    """Whether an earlier `train` put the adapter into a model whose layers are in it."""
    return isinstance(model, nn.Module) and model in _ADAPTED and any(map(_is_of_adapter, model.modules()))


def without_earlier_adapter(model: Any) -> Any:
    """Return the model without the adapter of an earlier `train`, over the same tensors; another model as it is.

    A model that is quantised, or whose modules have another `forward` than their class (of accelerate's hooks), cannot
    be told apart from what it is bound to, and stays as it is too.
    """
    if not holds_earlier_adapter(model) or _is_bound(model):
        return model
    tensors = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    plain = copy.deepcopy(model, dict(tensors))
    for parent in list(plain.modules()):
        for name, child in list(parent.named_children()):
            if _is_of_adapter(child):
                setattr(parent, name, _original(child))
    vars(plain).pop("peft_config", None)
    say("the model holds the adapter of an earlier train(), and is read without it; result.model is the tuned one")
    return plain


def _is_bound(model: nn.Module) -> bool:
    return is_quantised(model) or any("forward" in vars(m) or hasattr(m, "_hf_hook") for m in model.modules())


def _is_of_adapter(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)


def _original(module: Any) -> nn.Module:
    """Return the module in whose place a layer of an adapter is."""
    while _is_of_adapter(module):
        module = module.original_module if hasattr(module, "original_module") else module.get_base_layer()
    return module  # type: ignore[no-any-return]
