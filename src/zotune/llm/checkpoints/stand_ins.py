"""Weights that lie elsewhere, while peft puts an adapter beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from zotune.model.shards import is_distributed


@contextmanager
def stand_ins(module: nn.Module, device: torch.device, *, offloaded: bool = True) -> Iterator[None]:
    """Within this context shards have whole matrices in their place, which take no memory; so have offloaded weights.

    peft puts the tensors of an adapter beside the weights that it adapts; on `meta` they would have no values, and
    beside slices those of slices.

    Args:
        module: the model.
        device: where it computes; for a model on `meta` nothing is done.
        offloaded: whether weights on `meta` have a place too.
    """
    elsewhere = [
        (m, name, p)
        for m in module.modules()
        for name, p in m._parameters.items()
        if p is not None and ((offloaded and p.is_meta) or is_distributed(p))
    ]
    if device.type == "meta":
        elsewhere = []
    for m, name, p in elsewhere:
        place = torch.zeros((), dtype=p.dtype, device=device).expand(p.shape)
        m._parameters[name] = nn.Parameter(place, requires_grad=False)
    try:
        yield
    finally:
        for m, name, p in elsewhere:
            p.requires_grad_(False)
            m._parameters[name] = p
