"""One objective over several processes: each evaluates it on its own rows, and scalars are all that they exchange.

With the same weights, the same seed and the same objective, every process takes the same step to the bit. So a model
needs no wrapper for data parallelism, and no gradient or direction ever travels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zotune.estimate.forward_mode.dual_numbers import dual, unpack


def averaged(accelerator: Any, values: Tensor) -> Tensor:
    """The mean over the processes of the sum of their values, with its tangent where the values have one.

    The values of all processes are added in one order, that in which a loader deals batches out: first batch of each
    process, second batch of each process. So as many batches dealt out to another number of processes give the same
    sum, to the bit.

    Args:
        accelerator: an `accelerate.Accelerator`.
        values: shape (batches,), float64; as many in every process.

    Returns:
        The mean, shape (): the same in every process.

    >>> from types import SimpleNamespace
    >>> alone = SimpleNamespace(num_processes=1)
    >>> averaged(alone, torch.tensor([1.0, 2.0], dtype=torch.float64)).item()
    3.0
    """
    n = accelerator.num_processes
    if n == 1:
        return values.sum()

    def mean(local: Tensor) -> Tensor:
        every: Tensor = accelerator.gather(local)
        total: Tensor = every.view(n, -1).T.flatten().sum()
        return total.div(n)

    value, tangent = unpack(values)
    return mean(value) if tangent is None else dual(mean(value), mean(tangent))


@torch.no_grad()
def copy_from_first(accelerator: Any, model: nn.Module) -> None:
    """Give every process the weights and buffers of the first one, from which equal steps keep them equal."""
    if accelerator.num_processes == 1:
        return
    for tensor in (*model.parameters(), *model.buffers()):
        same = tensor.detach().contiguous()
        torch.distributed.broadcast(same, src=0)
        tensor.detach().copy_(same)
