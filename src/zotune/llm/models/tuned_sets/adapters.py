"""Adapters of few numbers beside a frozen model: LoRA with a frozen side, VeRA, IA3.

    LoRA-FA   ΔW = (α/r) B A with A frozen as it was drawn, or aimed by EVA (Zhang et al., 2023, arXiv 2308.03303)
    LoRA-XS   ΔW = (α/r) U_r Σ_r R V_rᵀ, R (r × r) alone tuned (Bałazy et al., 2024, arXiv 2405.17604); in memory and as
              it is saved a LoRA with A = V_rᵀ and B = U_r Σ_r R, whose directions lie within the columns of U_r Σ_r
    VeRA      ΔW = Λ_b B Λ_d A with the diagonals tuned (Kopiczko et al., 2024, arXiv 2310.11454)
    IA3       gains of keys, values and feed-forward activations (Liu et al., 2022, arXiv 2205.05638)

peft loads each of them by itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from torch import nn

from zotune.errors import UsageError
from zotune.llm.config.step import StepOptions
from zotune.llm.models.adapters.by_name import add_peft_adapter
from zotune.llm.models.adapters.lora import (
    ALL_LINEAR,
    add_lora,
    chooses_layers,
    chosen_layers,
    default_targets,
    linear_layers,
    target_paths,
)
from zotune.llm.models.language_model import LanguageModel
from zotune.model.layers import stack_of


def add_lora_with_frozen_a(lm: LanguageModel, config: StepOptions) -> None:
    """Add LoRA of which only B is tuned (lora_fa, lora_xs).

    Raises:
        UsageError: as `add_lora`.
    """
    add_lora(lm, config)
    freeze_a(lm.module)


def freeze_a(module: nn.Module) -> None:
    """Let no A of a model's LoRA adapter require a gradient."""
    for name, p in module.named_parameters():
        if ".lora_A." in name or ".lora_embedding_A." in name:
            p.requires_grad_(False)


def lora_layers(module: nn.Module) -> Iterator[tuple[str, nn.Linear, nn.Linear, Any]]:
    """Yield the name, A, B and the module of each linear layer that has a LoRA adapter."""
    from peft.tuners.lora import LoraLayer

    for name, layer in module.named_modules():
        if isinstance(layer, LoraLayer) and (adapter := layer.active_adapter[0]) in layer.lora_A:
            yield name, layer.lora_A[adapter], layer.lora_B[adapter], layer


def add_vera(lm: LanguageModel, config: StepOptions) -> None:
    """Add VeRA to the layers that LoRA adapts by default, unless `peft_config` names others.

    Raises:
        UsageError: `config` names what the model does not have, or peft cannot add the adapter.
    """
    linear = {name.rpartition(".")[2] for name, _ in linear_layers(lm.text_model)}
    targets = default_targets(lm.config.get_text_config().model_type, linear)
    _add_by_name(lm, config, "vera", tuple(linear) if targets == ALL_LINEAR else targets, ())


def add_ia3(lm: LanguageModel, config: StepOptions) -> None:
    """Add IA3 to the layers that peft chooses for this type of model, unless `peft_config` names others.

    Raises:
        UsageError: peft chooses none for it, `config` names what the model does not have, or peft cannot add it.
    """
    from peft.utils.constants import (
        TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FORWARD,
    )
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS

    kind = lm.config.get_text_config().model_type
    if kind not in TARGETS and "target_modules" not in config.peft_options:
        raise UsageError(
            f"tuning: ia3: peft knows no layers to adapt in models of the type {kind!r}. Name them: --peft-config "
            '\'{"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}\''
        )
    _add_by_name(lm, config, "ia3", tuple(TARGETS.get(kind, ())), tuple(FORWARD.get(kind, ())))


def _add_by_name(
    lm: LanguageModel, config: StepOptions, scheme: str, targets: tuple[str, ...], forward: tuple[str, ...]
) -> None:
    """Add an adapter of peft to some layers by their names; those of feed-forward parts are `forward`."""
    layers = stack_of(lm.text_model)[1]
    parts, in_some = [layers[i] for i in chosen_layers(len(layers), config)], chooses_layers(config)
    options = config.peft_options
    chosen = tuple(options.get("target_modules", targets)) if not isinstance(options.get("target_modules"), str) else ()
    if chosen and (in_some or "target_modules" not in options):
        paths = target_paths(lm, chosen, parts)
        inner = target_paths(lm, options.get("feedforward_modules", forward), parts)
        options = {**options, "target_modules": paths, **({"feedforward_modules": inner} if inner else {})}
    elif in_some:
        raise UsageError(
            "tuned_layers and only_layer do not go with a pattern of target_modules; put them into the pattern."
        )
    add_peft_adapter(lm, config.model_copy(update={"peft_type": scheme, "peft_config": json.dumps(options)}))
