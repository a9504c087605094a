"""The options of a run that say which of its weights are the result: the last ones, or the best on held-out rows.

Names are Hugging Face's.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, ValidationInfo, model_validator

from zotune.llm.config.schema import Options, is_partial


class SelectionOptions(Options):
    """When a run looks at its held-out rows, and what it makes of what it sees."""

    eval_steps: int | None = Field(
        None, ge=1, description="Steps between evaluations on the held-out rows; default: at the end."
    )
    load_best_model_at_end: bool = Field(
        False, description="The result is the model of the best evaluation on held-out rows, the untuned one included."
    )
    metric_for_best_model: Literal["loss", "metric"] = Field(
        "loss", description="What is best: the lowest loss, or the highest accuracy (F1 of generated answers)."
    )
    early_stopping_patience: int | None = Field(
        None, ge=1, description="Stop after so many evaluations in a row without a new best; default: never."
    )

    @model_validator(mode="after")
    def _no_idle_selection_option(self, info: ValidationInfo) -> Self:
        if is_partial(info):
            return self
        if self.selects and self.eval_steps is None:
            option = "load_best_model_at_end" if self.load_best_model_at_end else "early_stopping_patience"
            raise ValueError(f"{option} compares evaluations on the way: give --eval-steps")
        if self.metric_for_best_model != "loss" and not self.selects:
            raise ValueError(
                "metric_for_best_model has no effect here: it needs load_best_model_at_end or early_stopping_patience"
            )
        return self

    @property
    def selects(self) -> bool:
        """Whether the run asks which of its evaluations is best."""
        return self.load_best_model_at_end or self.early_stopping_patience is not None
