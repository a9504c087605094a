"""Parts of a forward pass: stop it at a module, replace a module by its known output, or restrict the head.

The head of a language model is computed only at the scored positions, and only for the tokens asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from zotune.llm.data.collator import Batch
from zotune.llm.quantized.layers import PackedLinear
from zotune.model.effects import forwards
from zotune.model.intercept import readable
from zotune.model.parameters import input_device


class _Reached(Exception):  # noqa: N818 - not an error: it ends a forward pass early
    pass


def modules_entered(model: nn.Module, until: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """Return the modules that a forward pass enters, in order, up to the first one for which `until` is true.

    The order of registration is not the order of execution: OPT registers its final norm before its layers.
    """
    return _up_to(model, until)[0]


def parameters_read(model: nn.Module, until: Callable[[nn.Module], bool]) -> set[int]:
    """Return the ids of the parameters that a forward pass reads before it enters a module for which `until` is true.

    A parameter may be read without its module: DeBERTa takes the weights of its relative embeddings as a table.
    """
    modules, reads = _up_to(model, until)
    return reads | {id(p) for module in modules[:-1] for p in module.parameters(recurse=False)}


class _Reads(TorchFunctionMode):
    """A context that collects the ids of the parameters that torch functions read."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.ids |= {id(x) for x in tree_leaves(readable(func, args, kwargs)) if isinstance(x, nn.Parameter)}
        return func(*args, **(kwargs or {}))


def _up_to(model: nn.Module, until: Callable[[nn.Module], bool]) -> tuple[list[nn.Module], set[int]]:
    modules: list[nn.Module] = []

    def note(module: nn.Module, args: Any) -> None:
        modules.append(module)
        if until(module):
            raise _Reached

    handles = [m.register_forward_pre_hook(note) for m in model.modules()]
    reads = _Reads()
    try:
        with torch.no_grad(), reads:
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=input_device(model)))
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return modules, reads.ids


def output_of_module(module: nn.Module, run: Callable[[], object]) -> Any:
    """Return the output of `module` when `run` runs the model; the modules after it are not computed."""
    outputs: list[Any] = []

    def catch(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output)
        raise _Reached

    handle = module.register_forward_hook(catch)
    try:
        run()
    except _Reached:
        pass
    finally:
        handle.remove()
    return outputs.pop()


def fixed_output(module: nn.Module, output: Any) -> AbstractContextManager[None]:
    """Within this context the module returns `output` without computing anything."""
    return forwards([module], [lambda *args, **kwargs: output])


def head_module(model: Any) -> nn.Module:
    """Return the module that turns hidden states into logits: the output layer, or the submodule that ends in it."""
    output = model.get_output_embeddings()
    parts: list[nn.Module] = list(model.children())
    return next(part for part in parts if part is output or output in set(part.modules()))


@contextmanager
def head_at_positions(model: Any, batch: Batch, only: Tensor | None) -> Iterator[None]:
    """Within this context the head computes only the scored positions, and of these only the tokens `only`."""
    output, head = model.get_output_embeddings(), head_module(model)

    def select(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *rest = args
        # Virtual tokens precede the batch's tokens; positions count from the first token of the batch.
        tokens = hidden[:, -batch.input_ids.shape[1] :]
        return (tokens.reshape(-1, tokens.shape[-1])[batch.positions], *rest)

    def rows(module: nn.Linear, hidden: Tensor) -> Tensor:
        assert only is not None
        bias = None if module.bias is None else module.bias[only]
        # A look-up, so that only the rows that are read of a perturbed head get noise.
        weight = module.rows(only) if isinstance(module, PackedLinear) else F.embedding(only, module.weight)
        return F.linear(hidden, weight, bias)

    handle = head.register_forward_pre_hook(select)
    try:
        with nullcontext() if only is None else forwards([output], [partial(rows, output)]):
            yield
    finally:
        handle.remove()


def reads_positions_alone(model: Any, last: nn.Module, run: Callable[[], object]) -> bool:
    """Whether what follows the layers computes each position alone: at most a norm over the features, and the head.

    It is known where the head reads the very numbers that the norm has written, and the norm those of the last layer.

    Args:
        model: a causal or masked language model.
        last: its last layer.
        run: runs a pass.
    """
    written: dict[nn.Module, _Numbers] = {}
    read: dict[nn.Module, _Numbers] = {}
    head = head_module(model)

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        read[module], written[module] = _Numbers(args[0]), _Numbers(output[0] if isinstance(output, tuple) else output)

    norms = [m for m in model.modules() if is_norm_of_features(m) and m not in set(last.modules())]
    hooks = [m.register_forward_hook(note) for m in (last, *norms)]
    hooks.append(head.register_forward_pre_hook(lambda module, args: read.update({module: _Numbers(args[0])})))
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    if last not in written or head not in read:
        return False
    ends = [m for m in norms if m in written and read[head].are(written[m]) and read[m].are(written[last])]
    return bool(ends) or read[head].are(written[last])


class _Numbers:
    """The numbers of a tensor at a moment: the place of its storage, its layout, and how often it was written."""

    def __init__(self, tensor: Tensor) -> None:
        # The tensor stays alive, so that no other one takes its place.
        self._tensor, self._version = tensor, tensor._version

    def are(self, other: _Numbers) -> bool:
        """Whether they are all numbers of the other tensor, unchanged."""
        one, two = self._tensor, other._tensor
        is_place = one.untyped_storage()._cdata == two.untyped_storage()._cdata
        is_layout = one.shape == two.shape and one.stride() == two.stride()
        return (
            is_place and is_layout and one.storage_offset() == two.storage_offset() and self._version == other._version
        )


def is_norm_of_features(module: nn.Module) -> bool:
    """Whether a module is a layer norm or a root-mean-square norm over the last dimension, by its class."""
    weight = getattr(module, "weight", None)
    return type(module).__name__.endswith(("LayerNorm", "RMSNorm")) and isinstance(weight, Tensor) and weight.dim() == 1
