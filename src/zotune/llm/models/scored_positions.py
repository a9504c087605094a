"""Parts of a forward pass: the head at the scored positions alone, and a module whose output is known already."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from zotune.llm.data.tokenization import Batch
from zotune.llm.quantized.layers import PackedLinear


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
