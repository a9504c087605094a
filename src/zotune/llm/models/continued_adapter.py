"""Going on from an adapter: its own tensors are tuned further, and saved with its own configuration.

The rank, the scale, the layers and the virtual tokens are those of the adapter. An option that says otherwise is
refused, because the run would not do what it says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from zotune.errors import UsageError
from zotune.llm.checkpoints.adapter_merge import is_adapter
from zotune.llm.config.step import StepOptions
from zotune.llm.models.adapters.lora import ALL_LINEAR, is_target, linear_layers
from zotune.llm.models.language_model import LanguageModel
from zotune.messages import say
from zotune.model.layers import stack_of

_SCHEMES = {
    "lora": "lora",
    "lora_fa": "lora",
    "vera": "vera",
    "ia3": "ia3",
    "prefix": "prefix_tuning",
    "prompt": "prompt_tuning",
}
_VIRTUAL = ("prefix_tuning", "prompt_tuning", "cartridge")


def scheme_of(adapter: Any) -> str:
    """Return peft's name of an adapter's scheme, in lower case, from its configuration."""
    return str(getattr(adapter.peft_type, "value", adapter.peft_type)).lower()


def continues(lm: LanguageModel, config: StepOptions) -> bool:
    """Whether what `config` tunes is of the same scheme as the adapter that the model has."""
    asked = _SCHEMES.get(config.tuning, (config.peft_type or "").lower())
    return is_adapter(lm.module) and asked == scheme_of(_adapter(lm))


def continue_adapter(lm: LanguageModel, config: StepOptions) -> None:
    """Let exactly the tensors of the model's adapter require a gradient.

    Raises:
        UsageError: an option contradicts the adapter, or its scheme cannot be tuned once it is saved.
    """
    adapter = _adapter(lm)
    for option, asked, found in _contradictions(lm, config):
        raise UsageError(
            f"{option}: {asked} contradicts the adapter {lm.name}, which has {found} and is tuned further as it is. "
            f"Leave {option} out; for another adapter merge this one first (zotune merge, or peft's merge_and_unload), "
            "and tune the merged folder."
        )
    for p in lm.module.parameters():
        p.requires_grad_(False)
    make_trainable(lm.module, lm.name)
    say(f"going on from the adapter {lm.name}: {_in_words(adapter)}")


def make_trainable(module: Any, name: str) -> None:
    """Let the tensors of a model's adapter require a gradient, as when the adapter was new.

    Args:
        module: a `peft.PeftModel`.
        name: its name, for errors.

    Raises:
        UsageError: peft saves only the outcome of what was tuned (the encoder of p-tuning, a prefix's projection).
    """
    adapter = module.active_peft_config
    scheme = scheme_of(adapter)
    if adapter.is_prompt_learning and (scheme not in _VIRTUAL or getattr(adapter, "prefix_projection", False)):
        raise UsageError(
            f"the adapter {name} ({scheme}) was saved as the outcome of layers that were not saved, so it cannot be "
            "tuned further. Tune a new adapter on its base model."
        )
    adapter.inference_mode = False
    if adapter.is_prompt_learning:
        module.prompt_encoder[module.active_adapter].requires_grad_(True)
        return
    tuner = module.base_model
    tuner.set_adapter(module.active_adapter)
    tuner._mark_only_adapters_as_trainable(tuner.model)


def own_options(lm: LanguageModel, config: StepOptions) -> dict[str, Any]:
    """Return the options that the tuned set has and `config` has otherwise, to record them.

    They are those of LoRA, of the model's adapter, and the layer that was found to be dominant.
    """
    found: dict[str, Any] = {} if lm.only_layer is None else {"only_layer": lm.only_layer}
    if config.tuning in ("lora", "lora_fa") and is_adapter(lm.module):
        found |= {"lora_r": _adapter(lm).r, "lora_alpha": _adapter(lm).lora_alpha}
    return {name: value for name, value in found.items() if getattr(config, name) != value}


def _adapter(lm: LanguageModel) -> Any:
    module: Any = lm.module
    return module.active_peft_config


def _contradictions(lm: LanguageModel, config: StepOptions) -> Iterator[tuple[str, Any, Any]]:
    """Yield options that were given and differ from the adapter: their names, their values, and the adapter's."""
    adapter, given = _adapter(lm), config.model_fields_set
    is_lora = config.tuning in ("lora", "lora_fa")
    names = {"lora_r": "r", "lora_alpha": "lora_alpha"} if is_lora else {}
    if config.num_virtual_tokens is not None:
        names = {"num_virtual_tokens": "num_virtual_tokens"}
    for option, key in names.items():
        if option in given and getattr(config, option) != getattr(adapter, key):
            yield option, getattr(config, option), getattr(adapter, key)
    if config.tuned_layers is not None:
        yield "tuned_layers", config.tuned_layers, "layers of its own"
    if config.only_layer is not None:
        yield "only_layer", config.only_layer, "layers of its own"
    if config.lora_init != "default":
        yield "lora_init", config.lora_init, "values already"
    if config.lora_target_modules and not _targets_agree(lm, config.lora_target_modules):
        found = sorted({path.rpartition(".")[2] for path in adapted_paths(lm)})
        yield "lora_target_modules", ", ".join(config.lora_target_modules), ", ".join(found)
    for key, value in config.peft_options.items():
        has = _plain(getattr(adapter, key, None))
        if has != _plain(value):
            yield f"peft_config: {key}", value, has


def adapted_paths(lm: LanguageModel) -> list[str]:
    """Return the paths of the modules of the base model that the adapter lies beside."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [path for path, module in lm.base.named_modules() if isinstance(module, BaseTunerLayer)]


def _targets_agree(lm: LanguageModel, targets: Sequence[str]) -> bool:
    """Whether some target names each adapted module, and each target one of them; all-linear leaves none out."""
    adapted = adapted_paths(lm)
    if tuple(targets) == ALL_LINEAR:
        layers = stack_of(lm.text_model)[1]
        linear = {m for layer in layers for _, m in linear_layers(layer)}
        inside = {m for name in adapted for m in lm.base.get_submodule(name).modules()}
        return linear <= inside
    named = all(any(is_target(path, target) for target in targets) for path in adapted)
    return named and all(any(is_target(path, target) for path in adapted) for target in targets)


def _plain(value: Any) -> Any:
    """Return a value of peft's as JSON has it: a set as a sorted list."""
    return sorted(value) if isinstance(value, set | tuple | list) and all(isinstance(v, str) for v in value) else value


def _in_words(adapter: Any) -> str:
    if scheme_of(adapter) == "lora":
        return f"LoRA of rank {adapter.r}, alpha {adapter.lora_alpha:g}"
    if adapter.is_prompt_learning:
        return f"{scheme_of(adapter)} of {adapter.num_virtual_tokens} virtual tokens"
    return scheme_of(adapter)
