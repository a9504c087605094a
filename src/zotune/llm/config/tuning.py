"""The options of a run that say what is tuned: the model, a part of it, or an adapter beside it."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from zotune.llm.config.schema import Options, is_partial


def _as_json(value: Any) -> Any:
    """A mapping, or text in YAML of one, as JSON in one line; the schema refuses what is neither."""
    try:
        plain = yaml.safe_load(value) if isinstance(value, str) else value
        text = json.dumps(plain)
    except (yaml.YAMLError, TypeError) as error:
        raise ValueError(f'it must be a mapping, like {{"r": 4}} ({error})') from None
    if not isinstance(plain, dict):
        raise ValueError('it must be a mapping, like {"r": 4}')
    return text


# An option that chooses within some tuning schemes, those schemes, and what else there is.
_OF_SCHEMES = (
    ("tuned_parameters", ("full",), "it chooses among the model's own weights; with lora use lora_target_modules"),
    ("tuned_layers", ("full", "lora", "scales"), "an adapter by name takes layers_to_transform in peft_config"),
    ("lora_target_modules", ("lora",), "it names the linear layers that get an adapter"),
    ("num_virtual_tokens", ("prefix", "prompt"), "an adapter by name takes it in peft_config"),
    ("peft_type", ("peft",), "it names one of peft's schemes"),
    ("peft_config", ("peft",), "it holds the keys of one of peft's schemes"),
)


class TuningOptions(Options):
    """What a run tunes."""

    tuning: Literal["full", "head", "scales", "lora", "prefix", "prompt", "peft"] = Field(
        "full",
        description="What is tuned: the model's own weights, its head, a packed base's scales, or an adapter of peft.",
    )
    tuned_layers: int | None = Field(
        None, ge=1, description="Tune only in the last so many layers (full: and what lies above)."
    )
    tuned_parameters: str | None = Field(
        None, description="With full: tune only weights whose name this regular expression finds."
    )
    lora_r: int = Field(8, ge=1, description="Rank of the adapter.")
    lora_alpha: float = Field(16, gt=0, description="The adapter is scaled by lora_alpha / lora_r.")
    lora_target_modules: tuple[str, ...] = Field(
        (), description="Linear layers that get an adapter; default: q_proj and v_proj (query and value)."
    )

    num_virtual_tokens: int | None = Field(None, ge=1, description="Length of a prefix or prompt; default: 5 and 10.")
    peft_type: str | None = Field(None, description="With tuning: peft, the scheme by peft's name: ia3, vera, …")
    peft_config: Annotated[str, BeforeValidator(_as_json)] = Field(
        "{}", description="Keys of that scheme: a mapping in a recipe, '{\"r\": 4}' as an option."
    )

    @model_validator(mode="after")
    def _no_idle_tuning_option(self, info: ValidationInfo) -> Self:
        if is_partial(info):
            return self
        for option, schemes, remedy in _OF_SCHEMES:
            if self.tuning not in schemes and getattr(self, option) != type(self).model_fields[option].default:
                raise ValueError(f"{option} needs tuning: {' or '.join(schemes)}, not {self.tuning}; {remedy}")
        if self.tuning == "peft" and self.peft_type is None:
            raise ValueError("tuning: peft needs the name of one of peft's schemes, for instance --peft-type ia3")
        return self

    @property
    def is_adapter(self) -> bool:
        """Whether what is tuned lies beside the model and is saved without it."""
        return self.tuning not in ("full", "head", "scales")

    @property
    def peft_options(self) -> dict[str, Any]:
        """`peft_config` as a mapping."""
        options: dict[str, Any] = json.loads(self.peft_config)
        return options

    @property
    def is_prefix(self) -> bool:
        """Whether it goes in as past keys and values."""
        return self.tuning == "prefix" or (self.peft_type or "").lower() in ("prefix_tuning", "cartridge")
