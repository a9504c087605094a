"""A torch optimizer that counts its steps and forward passes and reports a record of each step."""

from __future__ import annotations

import copy
import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from zotune.apply.transforms import Coefficient, unchanged
from zotune.errors import UsageError
from zotune.estimate.estimate import GradientEstimate, merged
from zotune.optim.checks import TORN, check_nested, check_rates, check_settings, check_skipped, check_torn
from zotune.optim.record import StepRecord
from zotune.optim.undo import UndoLog
from zotune.system.uninterrupted import uninterrupted

_COUNTERS = ("num_steps", "num_skipped", "num_forwards", "_skipped_in_a_row")
# What changes as a step goes on, weights and states apart.
_OF_A_STEP = (*_COUNTERS, "_taken", "_forwards_before")


class CountingOptimizer(torch.optim.Optimizer, ABC):
    """Counters and records of an optimizer's steps, which are whole or not at all; the base class of `ZerothOrder`.

    Args:
        params, defaults: as torch's.
        max_skipped: after so many steps in a row that were left out, `NonFiniteLossError` is raised.

    Attributes:
        num_steps, num_skipped, num_forwards, on_step: see `ZerothOrder`.
    """

    def __init__(self, params: list[dict[str, Any]], defaults: dict[str, Any], max_skipped: int) -> None:
        self.max_skipped, self._skipped_in_a_row = max_skipped, 0
        self.num_steps = self.num_skipped = self.num_forwards = 0
        self._on_step: Callable[[StepRecord], None] | None = None
        self._recorded_settings: dict[str, Any] = {}
        # Of the step in progress: its estimates, and how far each was taken; NaN for not at all.
        self._taken: list[tuple[GradientEstimate, float]] = []
        self._forwards_before = 0
        self._undo = UndoLog([])
        self._is_torn = self._is_within_step = False
        super().__init__(params, defaults)

    @property
    def on_step(self) -> Callable[[StepRecord], None] | None:
        """Called with the record of each step; while it is set, the constants of the update must not change."""
        return self._on_step

    @on_step.setter
    def on_step(self, value: Callable[[StepRecord], None] | None) -> None:
        self._on_step = value
        self._recorded_settings = {} if value is None else self.settings()

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The constants of the update that a record does not hold, comparable by ==."""

    @abstractmethod
    def close_early(self) -> None:
        """Complete the step without the blocks that have not been updated, and count and report it."""

    @contextmanager
    def whole_step(self, *others: torch.optim.Optimizer) -> Iterator[UndoLog]:
        """Within this context one step is taken, in which `others` may take part; an exception undoes it.

        Where that is not possible, see `zotune.optim.undo`, blocks that were updated stay so and are recorded, the
        rest of the step is left out.

        Raises:
            UsageError: the steps are recorded, and a constant of the update is not that of the record's beginning; a
                step or a probe of the same weights is in progress.
            ValueError: a learning rate is not finite.
            RunError: an earlier step could not be undone.
        """
        check_nested(self.param_groups, is_within_step=self._is_within_step)
        check_torn(self._is_torn)
        check_rates(self.applied_rates())
        if self._on_step is not None:
            check_settings(self._recorded_settings, self.settings())
        before = {name: copy.copy(getattr(self, name)) for name in self._names_of_a_step()}
        self._undo = undo = UndoLog([self.state, *(other.state for other in others)])
        self._is_within_step = True
        try:
            yield undo
        except BaseException as error:
            with uninterrupted():
                self._break_off(before, error)
            raise
        finally:
            self._undo, self._is_within_step = UndoLog([]), False

    def _names_of_a_step(self) -> tuple[str, ...]:
        return _OF_A_STEP

    def _break_off(self, before: dict[str, Any], error: BaseException) -> None:
        undo = self._undo
        if undo.is_over:
            return
        if undo.is_complete:
            undo.put_back()
            vars(self).update(before)
            return
        self._is_torn = True
        if undo.is_writing:
            error.add_note(TORN)
            return
        self.close_early()
        self._is_torn = False
        error.add_note(
            "The blocks updated before this error stay updated, and the step counts as taken without the others."
        )

    @cached_property
    def recorded(self) -> Coefficient:
        """Round a number as a record holds it: to single precision, unless float64 weights are tuned."""
        dtypes = {p.dtype for group in self.param_groups for p in group["params"]}
        return unchanged if torch.float64 in dtypes else lambda x: ctypes.c_float(x).value

    def applied_rates(self) -> tuple[float, ...]:
        """The learning rates of the step in progress as records hold them: one a parameter group."""
        return tuple(self.recorded(float(group["lr"])) for group in self.param_groups)

    def _count(self) -> float:
        """Finish the step: count it, report its record, and return its loss, the mean over the blocks' estimates."""
        self._undo.is_writing = self._undo.has_written
        taken, self._taken = self._taken, []
        estimate = merged([e for e, _ in taken])
        record = StepRecord(
            self.num_steps,
            estimate.loss,
            self.applied_rates(),
            tuple(scale for _, scale in taken),
            tuple(c for c, _ in estimate.terms),
            self.num_forwards - self._forwards_before,
            estimate.scalars,
        )
        self._forwards_before = self.num_forwards
        self.num_steps += 1
        self.num_skipped += record.is_skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if record.is_skipped else 0
        if self._on_step is not None:
            self._on_step(record)
        self._undo.is_over = True
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
        """As torch's, but to the bit: float32 state stays float32. State goes to its parameter's device."""
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "zeroth_order"})
        # torch casts state to the parameter's dtype, which would round master weights and momenta.
        order = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, p in zip(order, (p for group in self.param_groups for p in group["params"]), strict=True):
            if index in state_dict["state"]:
                self.state[p] = {
                    key: tree_map_only(Tensor, partial(self.placed, parameter=p, key=key), value)
                    for key, value in copy.deepcopy(state_dict["state"][index]).items()
                }
        for name in _COUNTERS:
            setattr(self, name, state_dict["zeroth_order"][name])
        self._forwards_before = self.num_forwards
        self._is_torn = False

    def placed(self, value: Tensor, parameter: Tensor, key: str) -> Tensor:
        """A tensor of a parameter's saved state, under some key of it, where the parameter's numbers are."""
        return value.to(device=parameter.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The optimizer of a copy of its model, which `copy.deepcopy((model, optimizer))` gives as well.

        It records nothing, for two runs cannot share a ledger, and has no learning-rate scheduler.
        """
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        # A scheduler puts a `step` of its own in front of the optimizer's.
        for name in vars(self).keys() - {"step", "_on_step", "_recorded_settings"}:
            vars(twin)[name] = copy.deepcopy(getattr(self, name), memo)
        twin._on_step, twin._recorded_settings = None, {}
        return twin

    def __getstate__(self) -> dict[str, Any]:
        raise UsageError(
            "an optimizer cannot be pickled or copied without its model: save opt.state_dict(), or use "
            "copy.deepcopy((model, opt))."
        )
