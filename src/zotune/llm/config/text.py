"""The options of how texts reach the model: chat templates, the message of the system, packing, rows too long."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from zotune.errors import did_you_mean
from zotune.llm.config.objective import ObjectiveOptions
from zotune.llm.config.schema import is_partial

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
        None, description="Message of the system at the start of each chat that has none; default: none."
    )
    apply_chat_template: bool = Field(
        False,
        description="Write rows with labels, completions, choices or a prompt alone as a chat: the prompt is the "
        "user's "
        "message, the answer the assistant's. Default: as plain text.",
    )

    compute_metrics: Annotated[tuple[str, ...], BeforeValidator(as_list)] = Field(
        (),
        description="Further metrics of evaluations: rouge, or functions MODULE:FUNCTION of what was answered; for "
        "completions and chats text is generated.",
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
