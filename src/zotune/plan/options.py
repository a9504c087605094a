"""The options of `zotune plan`: a workload with the option names of `zotune train`, several methods, and a limit."""

from __future__ import annotations

import re
from typing import Any, Literal, Self, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from zotune.errors import did_you_mean
from zotune.llm.config.method import BY_EXAMPLES, FIRST_ORDER, OWN_DIRECTIONS, MethodName
from zotune.llm.config.schema import is_partial
from zotune.llm.config.step import ModelOptions
from zotune.llm.config.tuning import IN_SUBSPACE, TuningOptions
from zotune.plan.workload import Workload

METHOD_NAMES: tuple[str, ...] = get_args(MethodName)
_FORWARD_ONLY = tuple(name for name in METHOD_NAMES if name not in FIRST_ORDER)
# Options that only some methods use; they are left out of the workloads of other methods.
_OF_METHODS = {
    "window": ("zo_sgd_mmt", "zo_adam"),
    "gradient_checkpointing": FIRST_ORDER,
    **dict.fromkeys(("num_queries", "rounding"), _FORWARD_ONLY),
    **dict.fromkeys(("directions_per_batch", "flipped"), BY_EXAMPLES),
    "rank": tuple(name for name in _FORWARD_ONLY if name not in ("hizoo", "grzo")),
    **dict.fromkeys(("activation_rank", "direction_scale"), tuple(n for n in _FORWARD_ONLY if n not in OWN_DIRECTIONS)),
    **dict.fromkeys(("hybrid_layers", "hybrid_method", "hybrid_tied"), _FORWARD_ONLY),
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b", re.IGNORECASE)


def memory_bytes(text: str) -> int:
    """Parse a size such as 24GB into bytes. Units are powers of 1024, as for GPUs and in the paper: 1 GB is 2³⁰ bytes.

    Raises:
        ValueError: the text is not a size.

    >>> memory_bytes("24GB"), memory_bytes("1.5 MiB")
    (25769803776, 1572864)
    """
    size = _SIZE.fullmatch(text.strip())
    if size is None or not float(size[1]):
        raise ValueError(f"memory is a number above 0 and a unit, as in 24GB or 512MiB, not {text!r}")
    return int(float(size[1]) * 1024 ** "_kmgt".index(size[2].lower() or "_"))


def _as_in_training(name: str) -> Any:
    """A field of the workload with its default and description."""
    return Workload.model_fields[name]


class PlanConfig(ModelOptions, TuningOptions):
    """Predict the memory of each method from the architecture alone: does it fit, and with which batch?"""

    method: str | None = Field(
        None, description="One method or several as zo_sgd fo_adam or zo_sgd,fo_adam (see `methods`); default: all."
    )
    per_device_train_batch_size: int = _as_in_training("per_device_train_batch_size")
    length: int = _as_in_training("length")
    objective: Literal["classification", "teacher_forcing"] = _as_in_training("objective")
    memory: str | None = Field(
        None, description="Available memory, as 24GB; shows which methods fit, and the largest batch or length."
    )
    largest: Literal["batch", "length"] = Field(
        "batch", description="With memory: search the largest batch, or the largest length."
    )
    calibrate: bool = Field(
        False, description="Also measure the seconds of a step, by running some steps of each method with the weights."
    )
    gradient_accumulation_steps: int = _as_in_training("gradient_accumulation_steps")
    gradient_checkpointing: bool = _as_in_training("gradient_checkpointing")
    num_queries: int = _as_in_training("num_queries")
    directions_per_batch: int | Literal["auto"] | None = _as_in_training("directions_per_batch")
    flipped: bool = _as_in_training("flipped")
    rank: int | None = _as_in_training("rank")
    rounding: Literal["stochastic", "master", "nearest"] = _as_in_training("rounding")
    window: int | None = _as_in_training("window")
    hybrid_layers: int | None = _as_in_training("hybrid_layers")
    hybrid_method: Literal["fo_sgd", "fo_adam"] = _as_in_training("hybrid_method")
    hybrid_tied: Literal["zeroth_order", "frozen"] | None = _as_in_training("hybrid_tied")

    @field_validator("memory")
    @classmethod
    def _is_size(cls, text: str | None) -> str | None:
        if text is not None:
            memory_bytes(text)
        return text

    @field_validator("method")
    @classmethod
    def _known_methods(cls, text: str | None) -> str | None:
        for name in _names(text):
            if name not in METHOD_NAMES:
                raise ValueError(f"there is no method {name!r}.{did_you_mean(name, METHOD_NAMES)}")
        return text

    @model_validator(mode="after")
    def _no_idle_plan_option(self, info: ValidationInfo) -> Self:
        if is_partial(info):
            return self
        for option, users in _OF_METHODS.items():
            is_set = getattr(self, option) != type(self).model_fields[option].default
            if is_set and not set(users) & set(self.methods):
                raise ValueError(f"{option} has no effect on {' or '.join(self.methods)}; it is for {', '.join(users)}")
        if self.largest == "length" and self.memory is None:
            raise ValueError("largest has no effect without memory; give memory a size, as 24GB")
        return self

    @property
    def methods(self) -> tuple[str, ...]:
        """The chosen methods without duplicates, by default all; of streamed layers those of forward passes."""
        every = METHOD_NAMES if self.offload_folder is None else _FORWARD_ONLY
        every = IN_SUBSPACE if self.tuning == "lora_xs" else every
        return tuple(dict.fromkeys(_names(self.method))) or every

    @property
    def limit(self) -> int | None:
        """Available bytes; None without `memory`."""
        return None if self.memory is None else memory_bytes(self.memory)

    def values_of(self, method: str) -> dict[str, Any]:
        """The options of a method's workload."""
        given = (name for name in type(self).model_fields if name in self.model_fields_set)
        values = {name: getattr(self, name) for name in given if name in Workload.model_fields}
        used = {name: v for name, v in values.items() if method in _OF_METHODS.get(name, METHOD_NAMES)}
        return {**used, "method": method}


def _names(text: str | None) -> list[str]:
    return [] if text is None else text.replace(",", " ").split()
