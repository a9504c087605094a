"""LoRA: low-rank matrices beside linear layers (Hu et al., 2021), and which layers of a model get them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from zotune.errors import UsageError, did_you_mean, reason_of
from zotune.llm.config.step import StepOptions
from zotune.llm.config.tuning import TuningOptions
from zotune.llm.models.adapters.peft_wrapper import wrap_with_peft
from zotune.llm.models.classification_head import head_module_names
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.models.placement.sharded import check_adapted
from zotune.model.layers import stack_of

ALL_LINEAR = ("all-linear",)
# Choices of our own: latent attention makes its queries, and its keys with the values, in layers of these names; of
# state-space models peft refuses the output projections, whose fused kernels read the weights past an adapter.
_BY_TYPE = {
    "deepseek_v2": ("q_b_proj", "kv_b_proj"),
    "deepseek_v3": ("q_b_proj", "kv_b_proj"),
    "mamba": ("in_proj", "x_proj"),
    "falcon_mamba": ("in_proj", "x_proj"),
    "mamba2": ("in_proj",),
}


def add_lora(lm: LanguageModel, config: StepOptions) -> None:
    """Add low-rank matrices beside linear layers (Hu et al., 2021); initially they do not change the output.

    Raises:
        UsageError: `config` names a layer or module that does not exist.
    """
    from peft import LoraConfig

    path, layers = stack_of(lm.text_model)
    chosen, in_some = chosen_layers(len(layers), config), chooses_layers(config)
    everywhere = [name for name, _ in linear_layers(lm.text_model)]
    linear = {name.rpartition(".")[2] for name in everywhere}
    targets = config.lora_target_modules or default_targets(lm.config.get_text_config().model_type, linear)
    inside = targets == ALL_LINEAR
    if inside:
        targets = _linear_in(layers)
    if not targets:
        raise UsageError(f"tuning: lora: {lm.name} has no linear layer inside its layers; tune it with --tuning full.")
    unknown = [t for t in targets if not any(is_target(name, t) for name in everywhere)]
    if unknown and set(ALL_LINEAR) & set(unknown):
        raise UsageError("lora_target_modules: all-linear stands for all layers, so it stands alone; drop the others.")
    if unknown:
        raise UsageError(
            f"lora_target_modules: {lm.name} has no linear layer {unknown[0]!r}.{did_you_mean(unknown[0], linear)}"
        )
    paths = target_paths(lm, targets, [layers[i] for i in chosen] if inside or in_some else [lm.text_model])
    check_adapted(lm.base, paths)
    # peft matches the names of all modules, and in a Sequential these are numbers, as those of layers are.
    only_linear = set(target_paths(lm, targets, [lm.base])) == {
        name for name, _ in lm.base.named_modules() if any(is_target(name, t) for t in targets)
    }
    is_everywhere = in_some or paths == target_paths(lm, targets, [lm.base])
    by_name = lm.text_model is lm.base and only_linear and is_everywhere
    in_layers = by_name and in_some
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules=list(targets) if by_name else paths,
        layers_to_transform=list(chosen) if in_layers else None,
        layers_pattern=path.rpartition(".")[2] if in_layers else None,
        # Conv1D holds its weight transposed.
        fan_in_fan_out=any(not isinstance(lm.base.get_submodule(name), nn.Linear) for name in paths),
        # A new head is trained in full and saved with the adapter.
        modules_to_save=head_module_names(lm.base) if lm.classifies else None,
        task_type="SEQ_CLS" if lm.classifies else None if lm.masked else "CAUSAL_LM",
        **_initial_values(config),
    )
    try:
        wrap_with_peft(lm, lora, config)
    except ValueError as error:
        raise UsageError(f"peft cannot add a LoRA adapter to {lm.name}: {reason_of(error)}") from error


def _initial_values(config: StepOptions) -> dict[str, Any]:
    """Return the keys of peft that say where LoRA's initial values are from.

    EVA does not redistribute ranks (rho = 1): the adapter's size is known before a pass.
    """
    from peft import EvaConfig

    return {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.0)} if config.lora_init == "eva" else {}


def default_targets(model_type: str, linear: Collection[str]) -> tuple[str, ...]:
    """Return the last names of the layers that LoRA adapts by default, given those of a model's linear layers.

    They are the projections to queries and values (Hu et al., 2021, section 7.1) where these have a layer of their own,
    else those that peft chooses for this type of model, else all linear layers inside the model's layers.

    >>> default_targets("llama", {"q_proj", "k_proj", "v_proj"}), default_targets("gpt2", {"c_attn", "c_proj"})
    (('q_proj', 'v_proj'), ('c_attn',))
    >>> default_targets("none_known", {"in_proj", "out_proj"})
    ('all-linear',)
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    of_type = tuple(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type, ()))
    choices = (("q_proj", "v_proj"), ("query", "value"), _BY_TYPE.get(model_type), of_type)
    return next((names for names in choices if names and set(names) <= set(linear)), ALL_LINEAR)


def is_target(path: str, target: str) -> bool:
    """Whether the path of a module ends in a target's name, as peft reads one.

    >>> is_target("layers.0.self_attn.q_proj", "q_proj"), is_target("layers.0.self_attn.q_proj", "attn.q_proj")
    (True, False)
    """
    return path == target or path.endswith(f".{target}")


def linear_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the paths and modules of a model's linear layers; GPT-2 has its own kind, Conv1D.

    A class of a model that takes other inputs than its weight says is none: peft would not follow it.
    """
    from transformers.pytorch_utils import Conv1D

    for name, m in module.named_modules():
        is_own_kind = type(m).__module__.startswith("transformers.models.") and type(m).forward is not nn.Linear.forward
        if isinstance(m, Conv1D) or (isinstance(m, nn.Linear) and not (is_own_kind and _is_grouped(m))):
            yield name, m


@torch.no_grad()
def _is_grouped(layer: nn.Linear) -> bool:
    """Whether a layer does not turn `in_features` numbers into `out_features`, as the grouped ones of DeepSeek-V4."""
    try:
        x = torch.zeros(1, 1, layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device)
        return tuple(layer(x).shape) != (1, 1, layer.out_features)
    except (RuntimeError, ValueError, IndexError):
        return True


def _linear_in(layers: Sequence[nn.Module]) -> tuple[str, ...]:
    """Return the last names of the linear layers inside a model's layers, as peft's "all-linear" chooses them."""
    inside = (name.rpartition(".")[2] for layer in layers for name, _ in linear_layers(layer))
    return tuple(dict.fromkeys(inside))


def target_paths(lm: LanguageModel, targets: Sequence[str], parts: Sequence[nn.Module]) -> list[str]:
    """Return the paths of the linear layers in some parts of a model that a target names."""
    inside = {m for part in parts for m in part.modules()}
    return [name for name, m in linear_layers(lm.base) if m in inside and any(is_target(name, t) for t in targets)]


def chooses_layers(config: TuningOptions) -> bool:
    """Whether a run tunes some layers only."""
    return config.tuned_layers is not None or config.only_layer is not None


def chosen_layers(num_layers: int, config: TuningOptions) -> range:
    """Return the numbers of the layers that a run tunes: one, the last ones, or all.

    Raises:
        UsageError: the model has fewer layers.

    >>> [chosen_layers(12, TuningOptions(**o)) for o in ({}, {"tuned_layers": 2}, {"only_layer": 3})]
    [range(0, 12), range(10, 12), range(3, 4)]
    """
    if isinstance(config.only_layer, int):
        if config.only_layer >= num_layers:
            raise UsageError(
                f"only_layer is {config.only_layer}, but the model has {num_layers} layers, which are counted from 0; "
                f"give at most {num_layers - 1}."
            )
        return range(config.only_layer, config.only_layer + 1)
    if config.tuned_layers is not None and config.tuned_layers > num_layers:
        raise UsageError(
            f"tuned_layers is {config.tuned_layers}, but the model has {num_layers} layers; give at most {num_layers}."
        )
    return range(0 if config.tuned_layers is None else num_layers - config.tuned_layers, num_layers)
