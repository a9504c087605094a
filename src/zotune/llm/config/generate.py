"""The options of `zotune generate` and `zotune chat`: a model, its prompts, and how a text is chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, model_validator

from zotune.llm.config.schema import is_partial
from zotune.llm.config.step import ModelOptions

_DATA: dict[str, Any] = {"group": "Data"}
_RUN: dict[str, Any] = {"group": "Run"}


class ChatConfig(ModelOptions):
    """Chat with a model in the terminal."""

    system_prompt: str | None = Field(
        None, description="System message at the start of each chat.", json_schema_extra=_DATA
    )
    max_length: int | None = Field(
        None,
        ge=8,
        description="Maximum number of tokens of a prompt with its answer; longer prompts are truncated from the left. "
        "Default: the model's context; longer prompts are refused.",
        json_schema_extra=_DATA,
    )
    read_control_tokens: bool = Field(
        False,
        description="Read the texts of control tokens in prompts (</s>, <|im_end|>, …) as these tokens; default: as "
        "plain text.",
        json_schema_extra=_DATA,
    )
    max_new_tokens: int = Field(256, ge=1, description="Maximum number of tokens of an answer.", json_schema_extra=_RUN)
    generation: Literal["greedy", "sample"] | None = Field(
        None,
        description="The most likely token each time, or a random one; default: sample if temperature or top_p is "
        "given, else greedy.",
        json_schema_extra=_RUN,
    )
    temperature: float | None = Field(
        None,
        ge=0,
        description="Sampling temperature: logits are divided by it; 0 is greedy. Default: 1 if texts are sampled.",
        json_schema_extra=_RUN,
    )
    top_p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Sample only among the most likely tokens whose probabilities add up to this value; default: all.",
        json_schema_extra=_RUN,
    )
    seed: int = Field(0, ge=0, description="Seed of sampling.", json_schema_extra=_RUN)

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random."""
        given = self.temperature is not None or self.top_p is not None
        return self.temperature != 0 and (self.generation == "sample" or (self.generation is None and given))

    @model_validator(mode="after")
    def _no_idle_sampling_option(self, info: ValidationInfo) -> Self:
        if is_partial(info) or self.samples:
            return self
        if self.generation == "sample":
            raise ValueError("temperature: 0 is greedy decoding, and generation: sample is not; give one of them")
        for name in ("temperature", "top_p"):
            if getattr(self, name):
                why = "temperature: 0 is greedy" if self.temperature == 0 else "generation: greedy draws nothing"
                raise ValueError(f"{name} has no effect here, for {why}; leave one of the two out")
        return self


class GenerateConfig(ChatConfig):
    """Generate a text after each prompt."""

    prompt: tuple[str, ...] = Field(
        (),
        description="One or several prompts. Without a prompt and without prompt_file, the text on standard input is "
        "the prompt.",
        json_schema_extra=_DATA,
    )
    prompt_file: Path | None = Field(
        None,
        description="File of prompts: a text file with a prompt a line (- for standard input), or rows with a column "
        "prompt, text or messages (JSON lines, CSV, Parquet, or hub:ORG/NAME[:SPLIT]).",
        json_schema_extra=_DATA,
    )
    template: str | None = Field(
        None,
        description="Prompt of the rows of prompt_file; {column} stands for the row's column. Default: that of the "
        "model's training, else the column prompt or text.",
        json_schema_extra=_DATA,
    )
    prompt_format: Literal["auto", "chat", "plain"] = Field(
        "auto",
        description="Whether a prompt is the user's message in the model's chat template (chat), or is continued as it "
        "stands (plain); auto: as in the model's training, else chat if the model has a template.",
        json_schema_extra=_DATA,
    )
    stop_at: Literal["newline", "end"] = Field(
        "end",
        description="End of an answer: the model's end tokens alone, or also the first newline.",
        json_schema_extra=_RUN,
    )
    per_device_eval_batch_size: int = Field(8, ge=1, description="Prompts in one forward pass.", json_schema_extra=_RUN)
    output_file: Path | None = Field(
        None,
        description="JSON-lines file for the prompts and answers; default: answers are printed alone.",
        json_schema_extra={"group": "Output"},
    )

    @model_validator(mode="after")
    def _one_source(self, info: ValidationInfo) -> Self:
        if is_partial(info):
            return self
        if self.prompt and self.prompt_file is not None:
            raise ValueError("prompt and prompt_file both name prompts; give one of them")
        if self.template is not None and self.prompt_file is None:
            raise ValueError("template has no effect here: it makes prompts of the rows of prompt_file")
        if self.template is not None and "{" not in self.template:
            raise ValueError("template names no column, so all rows would have the same prompt; write {column}")
        if self.system_prompt is not None and self.prompt_format == "plain":
            raise ValueError("system_prompt has no effect with prompt_format: plain, without the chat template")
        return self
