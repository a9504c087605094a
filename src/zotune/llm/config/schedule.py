"""The options of a run's length and of the schedule of its learning rate; names as in transformers."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from zotune.llm.config.method import FIRST_ORDER, MethodOptions
from zotune.llm.config.schema import MAPPING_OR_TEXT, as_json, is_partial

# Schedules that do not depend on the number of steps, so that a run may be prolonged.
_ENDLESS = ("constant", "constant_with_warmup", "inverse_sqrt")
_DEFAULT_STEPS = 1000
# Fewer steps of a zeroth-order method seldom teach anything.
_FEW_STEPS = 500


class ScheduleOptions(MethodOptions):
    """How many steps a run takes, and the learning rate at each of them."""

    max_steps: int = Field(_DEFAULT_STEPS, ge=1, description="Number of optimisation steps.")
    num_train_epochs: float | None = Field(
        None, gt=0, description="Passes over the training rows, in place of max_steps; default: max_steps counts."
    )
    warmup_steps: float = Field(
        0.0,
        ge=0,
        description="Steps in which the learning rate rises from 0; a value below 1 is a fraction of all steps.",
    )
    warmup_ratio: float = Field(0.0, ge=0, lt=1, description="Number of warm-up steps as a fraction of all steps.")
    lr_scheduler_kwargs: Annotated[str, BeforeValidator(as_json), MAPPING_OR_TEXT] = Field(
        "{}",
        description="Further arguments of the schedule: a mapping in a recipe, '{\"num_cycles\": 2}' as an option.",
    )

    @model_validator(mode="after")
    def _no_idle_schedule_option(self, info: ValidationInfo) -> Self:
        if is_partial(info):
            return self
        if self.num_train_epochs is not None and self.max_steps != _DEFAULT_STEPS:
            raise ValueError("max_steps and num_train_epochs both end the run; give only one of them")
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("warmup_steps and warmup_ratio both set the warm-up; give only one of them")
        if self.lr_scheduler_type == "constant" and (self.warmup_steps or self.warmup_ratio):
            raise ValueError(
                "lr_scheduler_type: constant has no warm-up; use constant_with_warmup, or a schedule that decays "
                "(linear, cosine, …)"
            )
        if self.lr_scheduler_type.startswith("constant") and self.scheduler_arguments:
            raise ValueError(f"lr_scheduler_kwargs has no effect on lr_scheduler_type: {self.lr_scheduler_type}")
        return self

    @property
    def scheduler_arguments(self) -> dict[str, Any]:
        """`lr_scheduler_kwargs` as a mapping."""
        arguments: dict[str, Any] = json.loads(self.lr_scheduler_kwargs)
        return arguments

    @property
    def num_warmup_steps(self) -> int:
        """The number of steps of the warm-up."""
        asked = self.warmup_steps or self.warmup_ratio
        return int(asked) if asked >= 1 else math.ceil(asked * self.max_steps)

    @property
    def schedule_needs_end(self) -> bool:
        """Whether the learning rate of a step depends on the number of all steps."""
        is_fraction = 0 < (self.warmup_steps or self.warmup_ratio) < 1
        return self.lr_scheduler_type not in _ENDLESS or is_fraction

    def epochs_note(self, num_rows: int, num_steps: int) -> str | None:
        """Return a remark on the number of steps that `num_train_epochs` gives, if it is asked for.

        >>> ScheduleOptions(num_train_epochs=3).epochs_note(40, 8)
        '3 epochs of 40 rows are 8 steps; forward passes alone need hundreds to thousands: give more, or max_steps'
        """
        if self.num_train_epochs is None:
            return None
        few = num_steps < _FEW_STEPS and self.method not in FIRST_ORDER
        remedy = "; forward passes alone need hundreds to thousands: give more, or max_steps" if few else ""
        steps = f"{num_steps} step{'s' * (num_steps != 1)}"
        return f"{self.num_train_epochs:g} epochs of {num_rows} rows are {steps}{remedy}"

    def with_steps(self, num_rows: int, rows_a_step: int) -> Self:
        """Return the options with `num_train_epochs` turned into `max_steps`, by the number of training rows."""
        if self.num_train_epochs is None:
            return self
        steps = math.ceil(self.num_train_epochs * num_rows / rows_a_step)
        return self.model_copy(update={"max_steps": steps, "num_train_epochs": None})
