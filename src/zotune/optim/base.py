"""A torch optimizer that counts its steps and forward passes and reports a record of each step."""

from __future__ import annotations

import copy
import ctypes
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch

from zotune.apply.transforms import Coefficient, unchanged
from zotune.estimate.estimate import GradientEstimate, merged
from zotune.optim.checks import check_skipped
from zotune.optim.record import StepRecord

_COUNTERS = ("num_steps", "num_skipped", "num_forwards", "_skipped_in_a_row")


class CountingOptimizer(torch.optim.Optimizer):
    """Counters and records of an optimizer's steps; the base class of `ZerothOrder`.

    Args:
        params, defaults: as torch's.
        max_skipped: after so many steps in a row that were left out, `NonFiniteLossError` is raised.

    Attributes:
        num_steps, num_skipped, num_forwards, on_step: see `ZerothOrder`.
    """

    def __init__(self, params: list[dict[str, Any]], defaults: dict[str, Any], max_skipped: int) -> None:
        self.max_skipped, self._skipped_in_a_row = max_skipped, 0
        self.num_steps = self.num_skipped = self.num_forwards = 0
        self.on_step: Callable[[StepRecord], None] | None = None
        # Of the step in progress: its estimates, and how far each was taken; NaN for not at all.
        self._taken: list[tuple[GradientEstimate, float]] = []
        self._forwards_before = 0
        super().__init__(params, defaults)

    @cached_property
    def recorded(self) -> Coefficient:
        """Round a number as a record holds it: to single precision, unless float64 weights are tuned."""
        dtypes = {p.dtype for group in self.param_groups for p in group["params"]}
        return unchanged if torch.float64 in dtypes else lambda x: ctypes.c_float(x).value

    def skip(self) -> None:
        """Count a skipped step, for a caller who found something else in it that is not finite."""
        self._taken = [(GradientEstimate(math.nan, (), 0), math.nan)]
        self._count()
        self.stop_if_skipping()

    def _count(self) -> float:
        """Finish the step: count it, report its record, and return its loss, the mean over the blocks' estimates."""
        taken, self._taken = self._taken, []
        estimate = merged([e for e, _ in taken])
        record = StepRecord(
            self.num_steps,
            estimate.loss,
            tuple(self.recorded(float(group["lr"])) for group in self.param_groups),
            tuple(scale for _, scale in taken),
            tuple(c for c, _ in estimate.terms),
            self.num_forwards - self._forwards_before,
        )
        self._forwards_before = self.num_forwards
        self.num_steps += 1
        self.num_skipped += record.is_skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if record.is_skipped else 0
        if self.on_step is not None:
            self.on_step(record)
        return estimate.loss

    def stop_if_skipping(self) -> None:
        """Stop the run if all of the last steps were skipped.

        Raises:
            NonFiniteLossError: the last `max_skipped` were.
        """
        check_skipped(self._skipped_in_a_row, self.max_skipped)

    def state_dict(self) -> dict[str, Any]:
        """torch's, and the counters under "zeroth_order"."""
        return {**super().state_dict(), "zeroth_order": {name: getattr(self, name) for name in _COUNTERS}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but to the bit: float32 state stays float32."""
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "zeroth_order"})
        # torch casts state to the parameter's dtype, which would round master weights and momenta.
        order = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, p in zip(order, (p for group in self.param_groups for p in group["params"]), strict=True):
            if index in state_dict["state"]:
                self.state[p] = copy.deepcopy(state_dict["state"][index])
        for name in _COUNTERS:
            setattr(self, name, state_dict["zeroth_order"][name])
        self._forwards_before = self.num_forwards
