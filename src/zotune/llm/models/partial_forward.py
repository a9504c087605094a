"""Forward passes that end partway: which modules one has entered, what one of them gave out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zotune.llm.data.collator import Batch
from zotune.llm.quantized.layers import PackedLinear


class _Reached(Exception):  # noqa: N818 - not an error: it ends a forward pass that has done its work
    pass


def entered(model: nn.Module, until: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """The modules that a forward pass of a language model enters, in order, up to the first that `until` holds for.

    The order of registration does not tell: OPT registers its final norm before its layers.
    """
    found: list[nn.Module] = []

    def note(module: nn.Module, args: Any) -> None:
        found.append(module)
        if until(module):
            raise _Reached

    handles = [m.register_forward_pre_hook(note) for m in model.modules()]
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device))
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found


def output_of(module: nn.Module, run: Callable[[], object]) -> Any:
    """What `module` gives out when `run` runs the model; what would come after it is not computed."""
    caught: list[Any] = []

    def catch(module: nn.Module, args: Any, output: Any) -> None:
        caught.append(output)
        raise _Reached

    handle = module.register_forward_hook(catch)
    try:
        run()
    except _Reached:
        pass
    finally:
        handle.remove()
    return caught.pop()


@contextmanager
def giving(module: nn.Module, output: Any) -> Iterator[None]:
    """Within this context the module computes nothing and returns `output`."""
    own = vars(module).get("forward")
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def head_of(model: Any) -> nn.Module:
    """What makes logits of hidden states: the output layer itself, or the part of the model that ends in it."""
    output = model.get_output_embeddings()
    parts: list[nn.Module] = list(model.children())
    return next(part for part in parts if part is output or output in set(part.modules()))


@contextmanager
def head_at(model: Any, batch: Batch, only: Tensor | None) -> Iterator[None]:
    """Let the head see the hidden states at the scored positions alone, and make the logits of the tokens `only`."""
    output, head = model.get_output_embeddings(), head_of(model)

    def select(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *rest = args
        # Virtual tokens stand before the batch's own; positions count from the first of its own.
        own = hidden[:, -batch.input_ids.shape[1] :]
        return (own.reshape(-1, own.shape[-1])[batch.positions], *rest)

    def rows(module: nn.Linear, hidden: Tensor) -> Tensor:
        assert only is not None
        bias = None if module.bias is None else module.bias[only]
        # As a look-up, so that a perturbed head is perturbed only in the rows that are read.
        weight = module.rows(only) if isinstance(module, PackedLinear) else F.embedding(only, module.weight)
        return F.linear(hidden, weight, bias)

    handle = head.register_forward_pre_hook(select)
    own = vars(output).get("forward")
    if only is not None:
        output.forward = lambda hidden: rows(output, hidden)
    try:
        yield
    finally:
        handle.remove()
        if own is not None:
            output.forward = own
        elif only is not None:
            del output.forward
