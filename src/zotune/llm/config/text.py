"""The options of how texts reach the model: chat templates, the system's message, packing, and rows that are too long."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, ValidationInfo, model_validator

from zotune.llm.config.objective import ObjectiveOptions
from zotune.llm.config.schema import is_partial


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

    @model_validator(mode="after")
    def _no_empty_text(self, info: ValidationInfo) -> Self:
        for name in ("chat_template", "system_prompt"):
            value = getattr(self, name)
            if value is not None and not value.strip():
                raise ValueError(f"{name} is empty; leave it out, or give it a text")
        if is_partial(info):
            return self
        if self.packing and self.apply_chat_template:
            raise ValueError(
                "packing joins plain texts and apply_chat_template writes prompts and answers; give only one of them"
            )
        return self
