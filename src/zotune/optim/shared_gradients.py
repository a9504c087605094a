"""Gradients of a batch in micro-batches, one process or several: summed in the order of the micro-batches, always.

A sum of floating-point numbers depends on its order. So the processes do not reduce their gradients as they come: each
gets those of all, a tensor at a time, and adds them as one process does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from zotune.errors import UsageError
from zotune.estimate.mesh import ALONE_MESH, Mesh
from zotune.optim.master_weights import FirstOrder, back_propagate


def back_propagate_all(
    optimizer: FirstOrder,
    closures: Sequence[Callable[[], Any]],
    weights: Sequence[float],
    mesh: Mesh = ALONE_MESH,
    around: Callable[[int], AbstractContextManager[Any]] = lambda part: nullcontext(),
) -> list[float]:
    """Put the gradient of the weighted mean of some losses where the optimizer's next step reads it.

    Args:
        optimizer: its gradients are freed first.
        closures: one a micro-batch, each returns its loss; the same in every process.
        weights: of each micro-batch.
        mesh: the processes that share the micro-batches.
        around: given the number of a micro-batch, a context for its forward pass.

    Returns:
        The loss of each micro-batch.

    Raises:
        UsageError: a loss does not depend on the parameters through autograd.
    """
    optimizer.zero_grad()
    size, total = mesh.processes.size, sum(weights)
    sums: dict[int, Tensor] = {}
    losses: list[float] = []

    def differentiate(part: int) -> list[float]:
        with around(part):
            loss = closures[part]()
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise UsageError(
                "the closure's loss does not depend on the first-order parameters through torch's autograd; "
                "return it as a tensor, without .item() or torch.no_grad()."
            )
        back_propagate(optimizer, loss * (weights[part] / total))
        return [float(loss.detach())]

    for lo in range(0, len(closures), size):
        parts = range(lo, min(lo + size, len(closures)))
        found = mesh.evaluate_each(parts, 1, lambda own: [differentiate(part) for part in own])
        losses += [loss for (loss,) in found]
        if size > 1:
            _add(optimizer, mesh, sums, len(parts))
    for index, p in enumerate(_parameters(optimizer)):
        if size > 1:
            p.grad = sums.get(index)
    return losses


@torch.no_grad()
def _add(optimizer: FirstOrder, mesh: Mesh, sums: dict[int, Tensor], num_parts: int) -> None:
    """Add the gradients of a micro-batch a process to the sums, in order, and free them."""
    parameters = _parameters(optimizer)
    present = mesh.processes.every(lambda: [p.grad is not None for p in parameters])
    for index, p in enumerate(parameters):
        givers = [rank for rank in range(num_parts) if present[rank][index]]
        if not givers:
            continue
        gathered = mesh.processes.gather(torch.zeros_like(p) if p.grad is None else p.grad)
        p.grad = None
        for rank in givers:
            sums[index] = sums[index].add_(gathered[rank]) if index in sums else gathered[rank]


def _parameters(optimizer: FirstOrder) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
