"""The options of the objective, and of text generation for objectives that need it."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from zotune.errors import did_you_mean
from zotune.llm.config.schema import Options, is_partial

# A test compares them with the tables of objectives.
OF_CANDIDATES = ("classification", "teacher_forcing", "accuracy")
OF_ANSWERS = ("f1", "exact_match")


class ObjectiveOptions(Options):
    """The options of the objective."""

    objective: str | None = Field(
        None,
        description="Objective to minimise: classification or teacher_forcing; without a gradient also accuracy, f1, "
        "exact_match, or a reward MODULE:FUNCTION of generated text. Default: the objective of the task.",
    )
    generation: Literal["greedy", "sample"] = Field(
        "greedy", description="Decoding for objectives of generated text: greedy, or sampling."
    )
    temperature: float = Field(
        1.0, gt=0, description="Sampling temperature: logits are divided by it (with generation: sample)."
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Sample only among the most likely tokens whose probabilities add up to this value (with "
        "generation: "
        "sample).",
    )
    max_new_tokens: int = Field(50, ge=1, description="Generated tokens per text at most.")
    stop_at: Literal["newline", "end"] = Field(
        "newline", description="End of a generated text: the first newline, or only the model's end tokens."
    )

    @field_validator("objective")
    @classmethod
    def _known_objective(cls, name: str | None) -> str | None:
        if name is None or name in (*OF_CANDIDATES, *OF_ANSWERS):
            return name
        module, colon, function = name.partition(":")
        if not colon:
            hint = did_you_mean(name, (*OF_CANDIDATES, *OF_ANSWERS))
            raise ValueError(f"there is no such objective.{hint} Name a function of your own as module:function")
        if not all(part.isidentifier() for part in (*module.split("."), function)):
            raise ValueError("name a function of your own as module:function, for instance rewards:length")
        return name

    @model_validator(mode="after")
    def _no_idle_objective_option(self, info: ValidationInfo) -> Self:
        if is_partial(info):
            return self
        sampled, of_text = ("temperature", "top_p"), ("max_new_tokens", "stop_at")
        objectives = "an objective of generated text: f1, exact_match or module:function"
        for names, used, requirement in (
            (("generation",), self.is_generated, objectives),
            (of_text, self.generates_text, f"{objectives}; or --exact-match"),
            (sampled, self.generation == "sample", "generation: sample"),
        ):
            for name in names:
                if not used and getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} has no effect here: it needs {requirement}")
        return self

    @property
    def generates_text(self) -> bool:
        """Whether text is generated at all."""
        return self.is_generated

    @property
    def is_generated(self) -> bool:
        """Whether each evaluation of the objective generates text."""
        return self.objective in OF_ANSWERS or self.is_function

    @property
    def is_function(self) -> bool:
        """Whether the objective is a function of the user."""
        return self.objective is not None and ":" in self.objective

    @property
    def has_gradient(self) -> bool:
        """Whether back-propagation could differentiate the objective."""
        return not self.is_generated and self.objective != "accuracy"
