"""The options that determine one step: the model, the tuned parameters, the method and the batch size."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from zotune.llm.config.method import FIRST_ORDER, OWN_DIRECTIONS, MethodOptions
from zotune.llm.config.schema import Options, is_partial
from zotune.llm.config.tuning import IN_SUBSPACE, TuningOptions

AttentionName = Literal[
    "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"
]
COMPUTED_MAPS = ("auto", "balanced", "sequential")
"""The device maps that accelerate computes."""
_OTHER_DIRECTIONS = ("rank", "sparsity", "flipped", "hybrid_layers")
# Attention without a derivative in forward mode.
_FUSED = ("flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")


class ModelOptions(Options):
    """The options that name a model and say how to load it."""

    model: str = Field(
        "smollm2-135m",
        description="Model to load: a built-in name, a Hub id, a local folder, a GGUF file, or random:NAME (see "
        "`models`).",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Precision of the weights; auto uses the precision of the checkpoint."
    )
    model_revision: str | None = Field(
        None, description="Branch, tag or commit of a model on the Hub; default: its main branch."
    )
    trust_remote_code: bool = Field(
        False,
        description="Run the Python code that the model's folder or repository brings along. Only for authors whom you "
        "trust; never read from a file.",
    )
    attn_implementation: AttentionName | None = Field(
        None,
        description="Attention of transformers: eager, sdpa, flex_attention, or flash_attention_2 to 4, whose package "
        "must be installed; default: the model's own (sdpa).",
    )
    quantization: Literal["none", "gguf", "bnb-nf4", "bnb-int8", "torchao-int8", "torchao-int4"] | None = Field(
        None,
        description="Quantisation of the base model's weights; default: none, or the quantisation that the loaded "
        "adapter "
        "was tuned on.",
    )
    accept_terms: bool = Field(
        False, description="Accept the licence terms of a model that has its own (see `models`)."
    )
    device: str = Field(
        "auto", description="Device that runs the model: cpu, cuda, cuda:1, …; auto uses a GPU if there is one."
    )

    device_map: str | None = Field(
        None,
        description="Where each module lies: auto, balanced or sequential (accelerate fills the GPUs, then the memory, "
        "then the disk), or a JSON or YAML file from module to GPU number, cpu or disk; default: all on device.",
    )
    offload_folder: Path | None = Field(
        None,
        description="Folder on a disk for weights that are larger than memory: the layers come to the device one after "
        "the other. What is written there is a copy and goes when the run ends.",
    )

    @model_validator(mode="after")
    def _no_two_placements(self, info: ValidationInfo) -> Self:
        if is_partial(info):
            return self
        named = [name for name in ("device_map", "offload_folder") if getattr(self, name) is not None]
        if named and self.quantization not in (None, "none", "gguf"):
            raise ValueError(
                f"{named[0]} does not go with quantization: {self.quantization}, whose library keeps its weights on "
                "one device; use gguf, whose layers can be streamed (--offload-folder)"
            )
        if self.device_map is not None and self.device != "auto":
            raise ValueError("device_map says where each module lies; leave out device")
        if self.device_map is not None and (self.is_gguf or self.model.startswith("random:")):
            raise ValueError(
                "device_map is for checkpoints that transformers loads; for random: models and GGUF files use "
                "offload_folder"
            )
        return self

    @property
    def is_gguf(self) -> bool:
        """Whether the base model is read from a GGUF file and stays quantised."""
        return self.quantization == "gguf" or self.model.endswith(".gguf")

    @property
    def reading(self) -> dict[str, Any]:
        """The arguments with which transformers reads files of the model: its revision, and whether its code may run.

        >>> ModelOptions(model_revision="v1").reading
        {'trust_remote_code': False, 'revision': 'v1'}
        """
        at = {} if self.model_revision is None else {"revision": self.model_revision}
        return {"trust_remote_code": self.trust_remote_code, **at}


Shard = Annotated[
    Literal["none", "fsdp", "tp"],
    Field(
        description="How the model is cut over the processes: fsdp gathers each layer's weights for its pass (FSDP2), "
        "tp computes with slices of them by the model's tensor-parallel plan; default: each process holds all of it."
    ),
]


class ParallelOptions(Options):
    """How several processes, started by torchrun, share the work of a run."""

    parallel: str | None = Field(
        None,
        description="How processes share each step: query=Q,data=D of them share the directions and the micro-batches; "
        "default: micro-batches first.",
    )
    shard: Shard = "none"
    check_ranks: int = Field(
        100,
        ge=0,
        description="Steps between two comparisons of the processes' weights; 0: none.",
    )
    timeout: float = Field(
        600.0,
        gt=0,
        description="Seconds that a process waits for the others.",
    )

    @field_validator("parallel")
    @classmethod
    def _is_mesh(cls, value: str | None) -> str | None:
        if value is not None:
            extents(value)
        return value


def extents(text: str) -> dict[str, int]:
    """Return the extents of a mesh of processes by name.

    Raises:
        ValueError: the text names no mesh.

    >>> extents("query=2,data=4")
    {'query': 2, 'data': 4}
    """
    found: dict[str, int] = {}
    for item in text.replace(" ", "").split(","):
        name, _, number = item.partition("=")
        if name not in ("query", "data") or name in found or not number.isdecimal() or int(number) < 1:
            raise ValueError(
                f"a mesh is query=Q,data=D with two positive numbers, either of them 1 if left out: {text!r}"
            )
        found[name] = int(number)
    return {"query": 1, "data": 1, **found}


class StepOptions(ModelOptions, MethodOptions, TuningOptions):
    """The options that determine a step, apart from the data."""

    per_device_train_batch_size: int = Field(16, ge=1, description="Training examples in one forward pass.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Batches whose losses are averaged for one update.")
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass to save memory (first-order methods only)."
    )
    seed: int = Field(
        0, ge=0, description="Seed of the directions, the order of batches and the initial adapter weights."
    )

    @model_validator(mode="after")
    def _no_lost_aim(self, info: ValidationInfo) -> Self:
        """Refuse what would move LoRA-XS out of its subspace, and places of weights where nothing can be found."""
        if is_partial(info):
            return self
        elementwise = self.method == "zo_sgd_sign" and self.sign == "elementwise"
        other = next((n for n in _OTHER_DIRECTIONS if getattr(self, n) not in (None, 0, False)), None)
        if self.tuning == "lora_xs" and (
            self.method not in IN_SUBSPACE or elementwise or other or self.activation_rank
        ):
            what = other or ("sign: elementwise" if elementwise else f"method: {self.method}")
            raise ValueError(
                f"tuning: lora_xs tunes numbers between frozen singular vectors, and with {what} steps do not stay "
                f"there; use {', '.join(IN_SUBSPACE)}, or tuning: lora_fa"
            )
        aims = {"activation_rank": self.activation_rank is not None}
        aims |= {"direction_scale: inputs": self.direction_scale == "inputs"}
        aimed = [name for name, is_asked in aims.items() if is_asked]
        if aimed and self.method in (*FIRST_ORDER, *OWN_DIRECTIONS):
            raise ValueError(
                f"{aimed[0]} has no effect here: it needs a zeroth-order method without directions of its own "
                f"({', '.join(OWN_DIRECTIONS)} have them)"
            )
        if aimed and (len(aimed) > 1 or other is not None or self.tuning == "lora_xs"):
            second = aimed[1] if len(aimed) > 1 else other or "tuning: lora_xs"
            raise ValueError(f"{aimed[0]} and {second} choose directions in two ways; leave one of them out")
        found = {"lora_xs": self.tuning == "lora_xs", "lora_init: eva": self.lora_init == "eva", **aims}
        found["only_layer: dominant"] = self.only_layer == "dominant"
        asked = next((name for name, is_asked in found.items() if is_asked), None)
        places = ("device_map", "offload_folder", "shard")
        place = next((p for p in places if getattr(self, p, None) not in (None, "none")), None)
        if asked and place:
            raise ValueError(f"{asked} reads all weights and activations in one place, so it does not go with {place}")
        return self

    @model_validator(mode="after")
    def _no_idle_checkpointing(self, info: ValidationInfo) -> Self:
        if is_partial(info):
            return self
        if self.gradient_checkpointing and self.is_prefix:
            raise ValueError(
                "gradient_checkpointing drops the keys and values of a prefix; leave it out, or use another --tuning"
            )
        if self.gradient_checkpointing and self.method not in FIRST_ORDER:
            raise ValueError(
                f"gradient_checkpointing has no effect on {self.method}, which stores no activations; leave it out"
            )
        if self.offload_folder is not None and (self.method in FIRST_ORDER or self.hybrid_layers is not None):
            raise ValueError(
                "offload_folder streams layers, whose weights are gone when back-propagation comes back to them; use a "
                "method of forward passes without hybrid_layers"
            )
        if self.method == "forward_grad" and self.attn_implementation in _FUSED:
            raise ValueError(
                f"attn_implementation: {self.attn_implementation} has no derivative in forward mode, which "
                "forward_grad needs; use eager or sdpa, or another method"
            )
        return self
