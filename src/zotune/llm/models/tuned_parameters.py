"""Choosing the tuned parameters: all weights, some of them, or an adapter (`zotune.llm.models.adapters`)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from torch import Tensor, nn

from zotune.directions.principal import is_norm
from zotune.errors import UsageError
from zotune.llm.checkpoints.adapter_config import check_pattern
from zotune.llm.checkpoints.adapter_merge import is_adapter, merged_model
from zotune.llm.checkpoints.fingerprint import fingerprint
from zotune.llm.checkpoints.tuned_tensors import check_saved
from zotune.llm.config.step import StepOptions
from zotune.llm.models.activation_cache import parameters_below
from zotune.llm.models.adapters.by_name import add_peft_adapter
from zotune.llm.models.adapters.lora import add_lora, chooses_layers, chosen_layers
from zotune.llm.models.adapters.virtual_tokens import add_prefix, add_prompt
from zotune.llm.models.classification_head import head_module_names
from zotune.llm.models.continued_adapter import continue_adapter, continues, scheme_of
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.models.partial_forward import head_module
from zotune.llm.models.tuned_sets.adapters import add_ia3, add_lora_with_frozen_a, add_vera, freeze_a
from zotune.llm.models.tuned_sets.dominant import with_dominant_layer
from zotune.llm.quantized.backends import is_packed, is_quantised
from zotune.llm.quantized.scales import SCALES, add_scales, layers_with_scales
from zotune.messages import say
from zotune.model.layers import stack_of
from zotune.model.streaming import stream_of


def prepare_tuning(lm: LanguageModel, config: StepOptions) -> None:
    """Add the adapter that `config` asks for, and let exactly the tuned parameters require a gradient.

    An adapter of the same scheme that the model has is tuned further; another one is merged into the weights that are
    to be tuned.

    Raises:
        UsageError: no parameter would be tuned, or `config` names a layer, module or adapter that does not exist.
    """
    config = with_dominant_layer(lm, config)
    if continues(lm, config):
        continue_adapter(lm, config)
        if config.tuning == "lora_fa":
            freeze_a(lm.module)
    else:
        if is_adapter(lm.module):
            _merge_adapter(lm, config)
        for p in lm.module.parameters():
            p.requires_grad_(False)
        lm.base_fingerprint = fingerprint(lm.module)
        SCHEMES[config.tuning](lm, config)
    if (stream := stream_of(lm.module)) is not None:
        stream.place_others()
    check_saved(lm.module, lm.name)


def _merge_adapter(lm: LanguageModel, config: StepOptions) -> None:
    """Merge the adapter of a model whose own weights are to be tuned, because saving an adapter would lose them.

    Raises:
        UsageError: another adapter is to be tuned, or the adapter cannot be merged.
    """
    if config.is_adapter or is_quantised(lm.base):
        raise UsageError(
            f"{lm.name} is an adapter ({scheme_of(lm.module.active_peft_config)}), and what --tuning {config.tuning} "
            "tunes could not be saved beside it. Go on tuning the adapter itself, or merge it into its base model "
            f"first (zotune merge {lm.name} --output-dir FOLDER, or peft's merge_and_unload), and tune that folder."
        )
    say(
        f"merging the adapter {lm.name} into its base model, whose weights are tuned and saved; to go on tuning the "
        f"adapter itself, give --tuning {scheme_of(lm.module.active_peft_config)}"
    )
    lm.module = merged_model(lm.module, lm.read_with, lm.name)


def _choose_weights(lm: LanguageModel, config: StepOptions) -> None:
    try:
        pattern = re.compile(config.tuned_parameters or "")
    except re.error as error:
        raise UsageError(f"tuned_parameters is no regular expression: {config.tuned_parameters!r} ({error}).") from None
    check_pattern(pattern.pattern, "tuned_parameters")
    names = [name for name, _ in lm.module.named_parameters()]
    all_quantised = config.tuned_parameters is None and is_quantised(lm.base)
    for name, p in _candidates(lm, config):
        if pattern.search(name):
            if all_quantised or is_packed(p):
                raise UsageError(_packed_message(name, p, config))
            p.requires_grad_(True)
    if not any(p.requires_grad for p in lm.module.parameters()):
        raise UsageError(
            f"nothing would be tuned: no weight of {lm.name} in the chosen layers has a name that matches "
            f"{config.tuned_parameters!r}. Its weights have names such as {names[-2]!r} and {names[-1]!r}."
        )


def _candidates(lm: LanguageModel, config: StepOptions) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters of the layers that may be tuned, and those of the modules above these layers."""
    path, layers = stack_of(lm.module)
    chosen = {*chosen_layers(len(layers), config), *([len(layers)] if config.only_layer is None else [])}
    below = parameters_below(lm.module, layers) if chooses_layers(config) else set()
    # A new head has to be tuned whatever else is.
    names = head_module_names(lm.base) if lm.classifies else ()
    heads = {id(p) for name in names for p in lm.base.get_submodule(name).parameters()}
    # The parts of a composite model that read images or sound do not run on text.
    text = {id(p) for p in lm.text_model.parameters()}
    below |= {id(p) for p in lm.base.base_model.parameters()} - text
    candidates = []
    for name, p in lm.module.named_parameters():
        # A parameter outside the stack that is not read before it belongs to a module after it.
        layer = int(name[len(path) + 1 :].split(".")[0]) if name.startswith(f"{path}.") else len(layers)
        if (layer in chosen or id(p) in heads) and id(p) not in below:
            candidates.append((name, p))
    return candidates


def _packed_message(name: str, p: nn.Parameter, config: StepOptions) -> str:
    option = "tuning: full" if config.tuned_parameters is None else f"tuned_parameters: {config.tuned_parameters}"
    reason = (
        f"whose values are packed integers ({type(p.data).__name__} of {p.dtype})"
        if is_packed(p)
        else "of a quantised base"
    )
    return (
        f"{option} would tune {name}, {reason}; small updates cannot change integers. Tune an adapter (--tuning lora), "
        "norms (--tuned-parameters norm) or scales (--tuning scales), or load the model without --quantization."
    )


def _choose_scales(lm: LanguageModel, config: StepOptions) -> None:
    scaled_layers = layers_with_scales(lm.module)
    if not scaled_layers:
        raise UsageError(
            f"tuning: scales needs a base that stores its scales as floating-point numbers (--quantization gguf, "
            f"bnb-nf4 "
            f"or bnb-int8), but {lm.name} with quantization: {config.quantization} does not."
        )
    chosen = {id(p) for _, p in _candidates(lm, config)}
    layers = {name: layer for name, layer in scaled_layers.items() if id(layer.weight) in chosen}
    add_scales(layers)
    for name, layer in layers.items():
        scales = layer.get_parameter(SCALES).requires_grad_(True)
        if config.method != "forward_grad" and not scales.is_meta:
            _check_mu(name, float(scales.detach().abs().median()), config.mu)


def _check_mu(name: str, median: float, mu: float) -> None:
    """Refuse a mu with which probes would scale most blocks of a layer to zero or to twice their size."""
    if mu >= median:
        raise UsageError(
            f"mu is {mu:g}, but half of the scales of {name} are below {median:.2g}, so probes would erase its blocks. "
            f"Use a mu of at most {10.0 ** math.floor(math.log10(median / 10)):g}."
        )


def _choose_norms(lm: LanguageModel, config: StepOptions) -> None:
    """Choose the gains of the norms; with `tuned_layers` those of the last layers and of what comes after them."""
    gains = {id(m.weight) for m in lm.module.modules() if is_norm(m) and isinstance(getattr(m, "weight", None), Tensor)}
    _choose_vectors(lm, config, lambda name, p: id(p) in gains, "norm with a gain")


def _choose_biases(lm: LanguageModel, config: StepOptions) -> None:
    """Choose the biases, those of norms too (BitFit, Ben Zaken et al., 2022, arXiv 2106.10199)."""
    _choose_vectors(lm, config, lambda name, p: name.rpartition(".")[2] == "bias", "bias")


def _choose_vectors(
    lm: LanguageModel, config: StepOptions, is_chosen: Callable[[str, nn.Parameter], bool], what: str
) -> None:
    for name, p in _candidates(lm, config):
        if p.dim() == 1 and p.is_floating_point() and is_chosen(name, p):
            p.requires_grad_(True)
    if not any(p.requires_grad for p in lm.module.parameters()):
        where = " in the chosen layers" if chooses_layers(config) else ""
        raise UsageError(
            f"tuning: {config.tuning}: nothing would be tuned, for {lm.name} has no {what}{where}. Tune another set: "
            "norms, biases, lora, or --tuned-parameters with tuning: full."
        )


def _choose_head(lm: LanguageModel, config: StepOptions) -> None:
    parts = (
        [lm.base.get_submodule(name) for name in head_module_names(lm.base)]
        if lm.classifies
        else [head_module(lm.base)]
    )
    for name, p in (pair for part in parts for pair in part.named_parameters()):
        if is_packed(p):
            raise UsageError(
                f"tuning: head would tune {name} of the head of {lm.name}, whose values are packed integers "
                f"({p.dtype}). Tune an adapter (--tuning lora) or scales (--tuning scales)."
            )
        p.requires_grad_(True)


SCHEMES: dict[str, Callable[[LanguageModel, StepOptions], None]] = {
    "full": _choose_weights,
    "head": _choose_head,
    "norms": _choose_norms,
    "biases": _choose_biases,
    "scales": _choose_scales,
    "lora": add_lora,
    "lora_fa": add_lora_with_frozen_a,
    "lora_xs": add_lora_with_frozen_a,
    "vera": add_vera,
    "ia3": add_ia3,
    "prefix": add_prefix,
    "prompt": add_prompt,
    "peft": add_peft_adapter,
}
"""The tuning schemes by name: functions that let exactly their parameters require a gradient."""
