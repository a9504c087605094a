"""The options of `zotune merge`, `zotune export` and `zotune push`: a model's folder, and what is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from zotune.llm.config.output import check_repository
from zotune.llm.config.schema import Options
from zotune.llm.config.step import ModelOptions

_OUTPUT: dict[str, Any] = {"group": "Output"}


class MergeConfig(ModelOptions):
    """Make one whole model of an adapter and its base model."""

    output_dir: Path | None = Field(
        None, description="New folder for the model; default: the run's folder with -merged behind its name."
    )
    max_shard_size: str | None = Field(
        None,
        description="Largest file of weights, such as 5GB; default: as in transformers.",
        json_schema_extra=_OUTPUT,
    )


class ExportConfig(ModelOptions):
    """Write a model as a file for other programs."""

    gguf: bool = Field(
        False, description="Write a GGUF file, for llama.cpp, Ollama and LM Studio.", json_schema_extra=_OUTPUT
    )
    output_file: Path | None = Field(
        None,
        description="The file to write; default: the run's folder, or the model's name, with .gguf behind it.",
        json_schema_extra=_OUTPUT,
    )
    outtype: Literal["auto", "f32", "f16", "bf16", "q8_0"] = Field(
        "auto",
        description="Numbers in the file; auto: 16 bits, as llama.cpp chooses. Its llama-quantize makes smaller files.",
        json_schema_extra=_OUTPUT,
    )
    llama_cpp: Path | None = Field(
        None,
        description="Folder of llama.cpp, or its convert_hf_to_gguf.py; default: the variable ZOTUNE_LLAMA_CPP, else "
        "the one on PATH.",
        json_schema_extra={"group": "Run"},
    )


class PushConfig(Options):
    """Upload a model to the Hugging Face Hub."""

    model: str = Field("", description="Folder of a run or of a model.")
    hub_model_id: str | None = Field(
        None, description="Repository to upload to, ORG/NAME or NAME; default: the name of the folder."
    )
    hub_private_repo: bool = Field(False, description="Make a private repository, if it is a new one.")
    base_model: str | None = Field(
        None,
        description="Name on the Hub of the base model, if an adapter was tuned on a folder of this machine.",
        json_schema_extra=_OUTPUT,
    )

    @field_validator("hub_model_id", "base_model")
    @classmethod
    def _is_repository(cls, value: str | None) -> str | None:
        return None if value is None else check_repository(value)
