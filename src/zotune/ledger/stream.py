"""Weights from a ledger one tensor at a time: x after all steps is a function of that tensor's own numbers.

Noise is a function of an element's place, a transform works element by element, and how far a step went is in the
record. So a slice that fits into a processor's cache goes through all steps before the next one is begun, and no more
of the model than one tensor is ever held.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from zotune.apply.tensor_update import Rounding, TensorUpdate
from zotune.apply.transforms import State
from zotune.apply.update import Step, update_slice_
from zotune.directions.schedule import Weights, depends_on_weights
from zotune.errors import UsageError
from zotune.model.parameters import TunedTensor
from zotune.noise import compute_dtype
from zotune.optim.record import StepRecord
from zotune.optim.zeroth_order import ZerothOrder
from zotune.system import limits


class Trace:
    """The steps of a ledger, ready to be applied to any one tensor.

    Args:
        optimizer: made as the run's was; of its weights only shape and dtype are looked at, so they may be on `meta`.
        records: of all its steps. They are held at some hundred bytes a step (and query and block).
        weights: gives the numbers that a tensor had before the first step; asked for only where the shares of random
            masks depend on them, and then a few times.

    Raises:
        UsageError: masks follow the weights; see `is_possible`.

    >>> import zotune as zo
    >>> from torch import nn
    >>> model = nn.Linear(3, 2, bias=False)
    >>> x, records = model.weight.detach().clone().view(-1), []
    >>> opt = zo.zo_adam(model, lr=0.1, seed=5)
    >>> opt.on_step = records.append
    >>> losses = [opt.step(lambda: model.weight.square().sum()) for _ in range(4)]
    >>> Trace(zo.zo_adam(nn.Linear(3, 2, bias=False, device="meta"), lr=0.1, seed=5), records).apply("weight", x)
    >>> torch.equal(x.view(2, 3), model.weight)
    True
    """

    def __init__(
        self, optimizer: ZerothOrder, records: Iterable[StepRecord], weights: Weights = TunedTensor.numbers
    ) -> None:
        if not self.is_possible(optimizer):
            raise UsageError("masks by magnitude follow the weights of all steps; replay the whole model at once.")
        optimizer.begin_masks(weights)
        self._tuned = optimizer.tuned
        self._keeps_master = optimizer.rounding == Rounding.MASTER
        self._groups = {id(p): number for number, g in enumerate(optimizer.param_groups) for p in g["params"]}
        self._steps: list[tuple[Step, float]] = [step for record in records for step in optimizer.plan_step(record)]

    @staticmethod
    def is_possible(optimizer: ZerothOrder) -> bool:
        """Whether each tensor can be moved without the others: not if masks follow the weights as they move."""
        return not depends_on_weights(optimizer.sampler)

    def apply(self, name: str, x: Tensor, size: int | None = None) -> None:
        """Move x, all numbers of the tensor called `name` as one flat, contiguous tensor, through all steps, in place.

        Args:
            name: any name of a tuned tensor.
            x: in the run's dtype.
            size: elements that go through the steps together; the result does not depend on it. Where a transform is
                one of whole matrices, all do.
        """
        tensor = self._tuned[name]
        updates = [(self._update(step, tensor), scale) for step, scale in self._steps if step.moves(tensor)]
        if not updates:
            return
        if any(update.is_whole for update, _ in updates):
            size = max(1, x.numel())
        if size is None:
            on_cpu = x.device.type == "cpu"
            size = limits.REPLAY_ELEMENTS * torch.get_num_threads() if on_cpu else limits.DEVICE_REPLAY_ELEMENTS
        kept = compute_dtype(x.dtype) if self._keeps_master else x.dtype
        for start in range(0, x.numel(), size):
            _move(x[start : start + size], start, updates, kept)

    def _update(self, step: Step, tensor: TunedTensor) -> TensorUpdate:
        return step.on(tensor, self._groups[id(tensor.parameter)], {})


@torch.no_grad()
def _move(x: Tensor, start: int, updates: Sequence[tuple[TensorUpdate, float]], kept: torch.dtype) -> None:
    """Take all steps with the slice x, which begins at element `start`; its state starts empty, as in a run."""
    y, state = x.to(kept), State()
    for update, scale in updates:
        state = update_slice_(update, y, state, start, scale)
    x.copy_(y)
