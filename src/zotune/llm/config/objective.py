"""The options of a run that say what is minimised, and how text is generated where that takes generated text."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from zotune.errors import did_you_mean
from zotune.llm.config.schema import Options, is_partial

# A test holds them against the objectives' tables.
OF_CANDIDATES = ("classification", "teacher_forcing", "accuracy")
OF_ANSWERS = ("f1", "exact_match")


class ObjectiveOptions(Options):
    """What is minimised."""

    objective: str | None = Field(
        None,
        description="What is minimised: classification, teacher_forcing, or without a gradient accuracy, f1, "
        "exact_match, or a function MODULE:FUNCTION of generated text; default: the task's own.",
    )
    generation: Literal["greedy", "sample"] = Field(
        "greedy", description="Objectives of generated text: the best token each time, or drawn ones."
    )
    temperature: float = Field(1.0, gt=0, description="With generation: sample, what logits are divided by.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="With generation: sample, only the likeliest tokens that have this probability."
    )
    max_new_tokens: int = Field(50, ge=1, description="Objectives of generated text: tokens at most.")
    stop_at: Literal["newline", "end"] = Field(
        "newline", description="Objectives of generated text: stop at a newline, or only at the end of text."
    )

    @field_validator("objective")
    @classmethod
    def _known_objective(cls, name: str | None) -> str | None:
        if name is None or name in (*OF_CANDIDATES, *OF_ANSWERS):
            return name
        module, colon, function = name.partition(":")
        if not colon:
            hint = did_you_mean(name, (*OF_CANDIDATES, *OF_ANSWERS))
            raise ValueError(f"there is no such objective.{hint} A function of your own is module:function")
        if not all(part.isidentifier() for part in (*module.split("."), function)):
            raise ValueError("a function of your own is named module:function, for instance rewards:length")
        return name

    @model_validator(mode="after")
    def _no_idle_objective_option(self, info: ValidationInfo) -> Self:
        if is_partial(info):
            return self
        sampled, of_text = ("temperature", "top_p"), ("generation", "max_new_tokens", "stop_at")
        for names, used, needs in (
            (of_text, self.is_generated, "an objective of generated text: f1, exact_match or module:function"),
            (sampled, self.generation == "sample", "generation: sample"),
        ):
            for name in names:
                if not used and getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} has no effect here: it needs {needs}")
        return self

    @property
    def is_generated(self) -> bool:
        """Whether each evaluation of the objective generates text."""
        return self.objective in OF_ANSWERS or self.is_function

    @property
    def is_function(self) -> bool:
        """Whether the objective is a function of the user's."""
        return self.objective is not None and ":" in self.objective

    @property
    def has_gradient(self) -> bool:
        """Whether back-propagation could differentiate the objective."""
        return not self.is_generated and self.objective != "accuracy"
