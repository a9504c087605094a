"""The options that choose the resulting weights: those of the last step, or of the best held-out evaluation.

Their names are those of Hugging Face.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, ValidationInfo, model_validator

from zotune.llm.config.schema import Options, StepsOrFraction, is_partial


class SelectionOptions(Options):
    """When a run evaluates on its held-out rows, and how it uses the outcome."""

    eval_strategy: Literal["no", "steps", "epoch"] | None = Field(
        None,
        description="When to evaluate on the held-out rows during the run: every eval_steps steps, or after each pass "
        "over the training rows; default: steps if eval_steps is given, else no.",
    )
    eval_steps: StepsOrFraction | None = Field(
        None,
        description="Steps between evaluations on the held-out rows, below 1 a fraction of all steps; default: only "
        "at the end, or logging_steps with "
        "eval_strategy: steps.",
    )
    load_best_model_at_end: bool = Field(
        False,
        description="Save the model of the best held-out evaluation, which may be the untuned one; default: save the "
        "model of the last step.",
    )
    metric_for_best_model: Literal["loss", "metric"] = Field(
        "loss",
        description="Criterion of the best evaluation: the lowest loss, or the best metric (accuracy, or F1 of "
        "generated "
        "answers).",
    )
    early_stopping_patience: int | None = Field(
        None, ge=1, description="Stop after N evaluations in a row without a new best one; default: never stop early."
    )

    @model_validator(mode="after")
    def _no_idle_selection_option(self, info: ValidationInfo) -> Self:
        if is_partial(info):
            return self
        if self.eval_steps is not None and self.evaluates != "steps":
            raise ValueError(f"eval_steps has no effect with eval_strategy: {self.evaluates}; give only one")
        if self.selects and self.evaluates == "no":
            option = "load_best_model_at_end" if self.load_best_model_at_end else "early_stopping_patience"
            raise ValueError(f"{option} compares evaluations during the run: give --eval-steps")
        if self.metric_for_best_model != "loss" and not self.selects:
            raise ValueError(
                "metric_for_best_model has no effect here: it needs load_best_model_at_end or early_stopping_patience"
            )
        return self

    @property
    def evaluates(self) -> Literal["no", "steps", "epoch"]:
        """When the run evaluates on the held-out rows before its end."""
        return self.eval_strategy or ("no" if self.eval_steps is None else "steps")

    @property
    def selects(self) -> bool:
        """Whether the run compares its evaluations with each other."""
        return self.load_best_model_at_end or self.early_stopping_patience is not None
