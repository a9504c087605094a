"""The options of a run that say what one step computes: the model, what of it is tuned, how, and on how much."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, ValidationInfo, model_validator

from zotune.llm.config.method import FIRST_ORDER, MethodOptions
from zotune.llm.config.schema import Options, is_partial
from zotune.llm.config.tuning import TuningOptions


class ModelOptions(Options):
    """Which model, and how it is loaded."""

    model: str = Field(
        "smollm2-135m", description="Built-in name, Hub id, local folder, or random:NAME (see `models`)."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Precision of the weights; auto takes the checkpoint's."
    )
    quantization: Literal["none", "gguf", "bnb-nf4", "bnb-int8", "torchao-int8", "torchao-int4"] | None = Field(
        None, description="How the base's weights are packed; default: as it comes, or as its adapter was tuned."
    )
    accept_terms: bool = Field(False, description="Accept the terms of a model that has its own (see `models`).")
    device: str = Field("auto", description="cpu, cuda, cuda:1, …; auto takes a GPU where there is one.")

    @property
    def is_gguf(self) -> bool:
        """Whether the base is read from a GGUF file and stays packed."""
        return self.quantization == "gguf" or self.model.endswith(".gguf")


class StepOptions(ModelOptions, MethodOptions, TuningOptions):
    """What a step computes, but for the rows."""

    per_device_train_batch_size: int = Field(16, ge=1, description="Examples in one forward pass.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Batches whose objective is averaged for one update.")
    gradient_checkpointing: bool = Field(
        False, description="First-order methods: recompute activations to save memory."
    )
    seed: int = Field(0, ge=0, description="Names directions, batches and a new adapter's weights.")

    @model_validator(mode="after")
    def _no_idle_checkpointing(self, info: ValidationInfo) -> Self:
        if is_partial(info):
            return self
        if self.gradient_checkpointing and self.is_prefix:
            raise ValueError("gradient_checkpointing drops the keys and values that a prefix consists of; leave it out")
        if self.gradient_checkpointing and self.method not in FIRST_ORDER:
            raise ValueError(f"gradient_checkpointing has no effect on {self.method}, which keeps no activations")
        return self
