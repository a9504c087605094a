"""The options that choose the tuned parameters: all weights, some of them, or an adapter beside the model."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from zotune.llm.config.schema import MAPPING_OR_TEXT, Options, as_json, is_partial

OF_THE_MODEL = ("full", "head", "norms", "biases", "scales")
"""The schemes that tune weights of the model itself; the others tune an adapter, which is saved without the model."""
LORA = ("lora", "lora_fa", "lora_xs")
"""The schemes whose adapter is one of LoRA, in memory and as it is saved."""
BY_NAME = ("vera", "ia3")
"""The schemes of peft that have a name of their own here."""
IN_SUBSPACE = (
    *("zo_sgd", "zo_sgd_sign", "zo_sgd_mmt", "zo_sgd_cons", "forward_grad"),
    *("fzoo", "randopt", "block_coordinate"),
)
"""The methods whose steps are sums of directions, so that they stay in the subspace of these."""
_IN_LAYERS = ("full", "norms", "biases", *LORA, *BY_NAME, "scales")
# Options that belong to some tuning schemes, those schemes, and a hint for the others.
_SCHEMES_OF_OPTION = (
    ("tuned_parameters", ("full",), "it chooses among the model's own weights; with lora use lora_target_modules"),
    ("tuned_layers", _IN_LAYERS, "for an adapter by name, set layers_to_transform in peft_config"),
    ("only_layer", _IN_LAYERS, "for an adapter by name, set layers_to_transform in peft_config"),
    ("lora_target_modules", LORA, "it names the linear layers that get a LoRA adapter"),
    ("lora_init", ("lora", "lora_fa"), "it is about a LoRA adapter whose initial values are free"),
    ("num_virtual_tokens", ("prefix", "prompt"), "for an adapter by name, set it in peft_config"),
    ("peft_type", ("peft",), "it names one of peft's schemes"),
    ("peft_config", ("peft", *BY_NAME), "it holds the keys of one of peft's schemes"),
)


class TuningOptions(Options):
    """The options that choose the tuned parameters."""

    tuning: Literal[
        "full",
        "head",
        "norms",
        "biases",
        "scales",
        "lora",
        "lora_fa",
        "lora_xs",
        "vera",
        "ia3",
        "prefix",
        "prompt",
        "peft",
    ] = Field(
        "full",
        description="Parameters to tune: all weights (full), the output head, the gains of the norms, the biases, the "
        "scales of a quantised base, or an adapter of peft (lora, lora_fa with A frozen, lora_xs between frozen "
        "singular vectors, vera, ia3, prefix, prompt, or another one by --peft-type).",
    )
    tuned_layers: int | None = Field(
        None,
        ge=0,
        description="Tune only the last N layers; with full, norms and biases also the modules above them, and with 0 "
        "these alone, such as the last norm. Default: all layers.",
    )
    only_layer: Annotated[int, Field(ge=0)] | Literal["dominant"] | None = Field(
        None,
        description="Tune only this layer, counted from 0, without the modules above it; dominant: the layer at which "
        "outliers of activations first appear in a forward pass. Default: all layers.",
    )
    tuned_parameters: str | None = Field(
        None,
        description="Tune only the weights whose name matches this regular expression, such as norm (with tuning: "
        "full). "
        "Default: all weights.",
    )
    lora_r: int = Field(8, ge=1, description="Rank of the LoRA matrices.")
    lora_alpha: float = Field(
        16, gt=0, description="Scale of the LoRA adapter: its output is multiplied by lora_alpha / lora_r."
    )
    lora_target_modules: tuple[str, ...] = Field(
        (),
        description="Linear layers that get a LoRA adapter, or all-linear for each one inside the layers; default: "
        "q_proj and v_proj, or query and value; else those that peft chooses for this type of model; else all-linear.",
    )
    lora_init: Literal["default", "eva"] = Field(
        "default",
        description="Initial values of LoRA's A: random, or the principal components of the layers' inputs in forward "
        "passes over training rows (eva).",
    )
    activation_rank: int | None = Field(
        None,
        ge=1,
        description="Draw directions within the N leading principal components of each tuned tensor's inputs, found by "
        "forward passes over training rows; default: in the whole space.",
    )

    direction_scale: Literal["equal", "inputs"] = Field(
        "equal",
        description="Scale of a direction's entries: equal, or divided by the root mean square of the inputs that each "
        "weight multiplies, found by forward passes over training rows (inputs).",
    )
    num_virtual_tokens: int | None = Field(
        None, ge=1, description="Virtual tokens of a prefix or prompt; default: 5 for a prefix, 10 for a prompt."
    )
    peft_type: str | None = Field(
        None, description="Adapter of peft by its name there: ln_tuning, … (with tuning: peft)."
    )
    peft_config: Annotated[str, BeforeValidator(as_json), MAPPING_OR_TEXT] = Field(
        "{}",
        description="Configuration of the adapter named by peft_type: a mapping in a recipe, '{\"r\": 4}' as an "
        "option.",
    )

    @model_validator(mode="after")
    def _no_idle_tuning_option(self, info: ValidationInfo) -> Self:
        if is_partial(info):
            return self
        for option, schemes, remedy in _SCHEMES_OF_OPTION:
            if self.tuning not in schemes and getattr(self, option) != type(self).model_fields[option].default:
                raise ValueError(f"{option} needs tuning: {' or '.join(schemes)}, not {self.tuning}; {remedy}")
        if self.tuning == "peft" and self.peft_type is None:
            raise ValueError("tuning: peft needs the name of one of peft's schemes, for instance --peft-type ia3")
        if self.tuned_layers is not None and self.only_layer is not None:
            raise ValueError("tuned_layers and only_layer choose layers in two ways; leave one of them out")
        if self.tuned_layers == 0 and self.tuning not in ("full", "norms", "biases"):
            raise ValueError(
                f"tuned_layers: 0 leaves no layer for tuning: {self.tuning}; give at least 1, or tune the modules "
                "above the layers with full, norms or biases"
            )
        return self

    @property
    def is_adapter(self) -> bool:
        """Whether the tuned parameters are an adapter, which is saved without the model."""
        return self.tuning not in OF_THE_MODEL

    @property
    def peft_options(self) -> dict[str, Any]:
        """`peft_config` as a mapping."""
        options: dict[str, Any] = json.loads(self.peft_config)
        return options

    @property
    def is_prefix(self) -> bool:
        """Whether the adapter is a prefix: keys and values that precede the input's in every layer."""
        return self.tuning == "prefix" or (self.peft_type or "").lower() in ("prefix_tuning", "cartridge")
