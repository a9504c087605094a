"""The options of the objective, of text generation for objectives that need it, and of how texts reach the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

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
    max_new_tokens: int = Field(50, ge=1, description="Maximum number of generated tokens of a text.")
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


# The metrics that zotune has by name.
METRICS = ("rouge",)


def as_list(value: Any) -> Any:
    """Return one value as a list of it; others stay as they are."""
    return [value] if isinstance(value, str | Path | int | float) and not isinstance(value, bool) else value


class TextOptions(ObjectiveOptions):
    """The options of how texts reach the model."""

    packing: bool = Field(
        False,
        description="Join plain texts, each followed by the end-of-text token, and cut them into windows of max_length "
        "tokens (default: 1024, or the model's context if that is less); default: one text a row.",
    )
    long_rows: Literal["truncate", "drop", "error"] | None = Field(
        None,
        description="Rows longer than max_length, or than the model's context: truncate them, drop them, or stop with "
        "an error. "
        "Default: truncate prompts if max_length is given, else stop.",
    )
    chat_template: str | None = Field(
        None,
        description="Chat template in place of the tokenizer's: a file or folder, a name (chatml, plain, or one of the "
        "tokenizer's), or the text of a template. The saved tokenizer has it.",
    )
    system_prompt: str | None = Field(
        None, description="System message at the start of each chat that has none; default: none."
    )
    apply_chat_template: bool = Field(
        False,
        description="Write rows with labels, completions, choices or a prompt alone as a chat: the prompt is the "
        "user's "
        "message, the answer the assistant's. Default: as plain text.",
    )

    compute_metrics: Annotated[tuple[str, ...], BeforeValidator(as_list)] = Field(
        (),
        description="Further metrics of evaluations: rouge, or functions MODULE:FUNCTION of the answers, "
        "which are generated for completions and chats.",
    )

    @field_validator("compute_metrics")
    @classmethod
    def _known_metrics(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            module, colon, function = name.partition(":")
            if name not in METRICS and not colon:
                hint = did_you_mean(name, METRICS)
                raise ValueError(f"there is no metric {name!r}.{hint} Name a function of your own as module:function")
            if colon and not all(part.isidentifier() for part in (*module.split("."), function)):
                raise ValueError(f"name a function of your own as module:function; got {name!r}")
        return tuple(dict.fromkeys(names))

    @model_validator(mode="after")
    def _no_empty_text(self, info: ValidationInfo) -> Self:
        for name in ("chat_template", "system_prompt"):
            value = getattr(self, name)
            if value is not None and not value.strip():
                raise ValueError(f"{name} is empty; leave it out, or give it a text")
        if is_partial(info):
            return self
        if self.packing and self.long_rows is not None:
            raise ValueError("long_rows has no effect with packing, which cuts all texts into windows; leave it out")
        if self.packing and self.apply_chat_template:
            raise ValueError(
                "packing joins plain texts and apply_chat_template writes prompts and answers; give only one of them"
            )
        return self
