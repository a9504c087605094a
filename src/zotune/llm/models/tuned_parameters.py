"""What is tuned: all of the model, a chosen part of it, or an adapter beside it (`zotune.llm.models.adapters`)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from torch import nn

from zotune.errors import UsageError
from zotune.llm.config.step import StepOptions
from zotune.llm.models.activation_cache import parameters_below
from zotune.llm.models.adapters import add_by_name, add_lora, add_prefix, add_prompt, first_layer
from zotune.llm.models.classification_head import parts_of_head
from zotune.llm.models.load import LanguageModel
from zotune.llm.models.scored_positions import head_of
from zotune.llm.quantized.backends import is_packed, is_quantised
from zotune.llm.quantized.scales import SCALES, add_scales, layers_with_scales
from zotune.model.layers import stack_of


def prepare(lm: LanguageModel, config: StepOptions) -> None:
    """Add the adapter that `config` asks for, and let exactly the tuned parameters require a gradient.

    Raises:
        UsageError: nothing would be tuned, or a layer, module or scheme that does not exist is named.
    """
    for p in lm.module.parameters():
        p.requires_grad_(False)
    SCHEMES[config.tuning](lm, config)


def _choose_weights(lm: LanguageModel, config: StepOptions) -> None:
    try:
        pattern = re.compile(config.tuned_parameters or "")
    except re.error as error:
        raise UsageError(f"tuned_parameters is no regular expression: {config.tuned_parameters!r} ({error}).") from None
    names = [name for name, _ in lm.module.named_parameters()]
    for name, p in _within(lm, config):
        if pattern.search(name):
            if is_packed(p) or (config.tuned_parameters is None and is_quantised(lm.base)):
                raise UsageError(_packed_message(name, p, config))
            p.requires_grad_(True)
    if not any(p.requires_grad for p in lm.module.parameters()):
        raise UsageError(
            f"nothing would be tuned: no weight of {lm.name} in the chosen layers has a name that "
            f"{config.tuned_parameters!r} finds. Its weights are called, for instance, {names[-2]!r} and {names[-1]!r}."
        )


def _within(lm: LanguageModel, config: StepOptions) -> list[tuple[str, nn.Parameter]]:
    """The parameters in the layers that may be tuned, and what lies above these."""
    path, layers = stack_of(lm.module)
    first = first_layer(len(layers), config.tuned_layers)
    below = set() if config.tuned_layers is None else parameters_below(lm.module, layers)
    found = []
    for name, p in lm.module.named_parameters():
        # What is neither a layer nor read before the layers comes after them.
        lies_in = int(name[len(path) + 1 :].split(".")[0]) if name.startswith(f"{path}.") else len(layers)
        if lies_in >= first and id(p) not in below:
            found.append((name, p))
    return found


def _packed_message(name: str, p: nn.Parameter, config: StepOptions) -> str:
    what = "tuning: full" if config.tuned_parameters is None else f"tuned_parameters: {config.tuned_parameters}"
    holds = (
        f"whose numbers are packed integers ({type(p.data).__name__} of {p.dtype})"
        if is_packed(p)
        else "of a packed base"
    )
    return (
        f"{what} would tune {name}, {holds}; a small step cannot move these. Tune an adapter (--tuning lora), norms "
        "(--tuned-parameters norm) or scales (--tuning scales), or load the model without --quantization."
    )


def _choose_scales(lm: LanguageModel, config: StepOptions) -> None:
    found = layers_with_scales(lm.module)
    if not found:
        raise UsageError(
            f"tuning: scales needs a base whose scales are numbers of their own (--quantization gguf, bnb-nf4 or "
            f"bnb-int8), which {lm.name} with quantization: {config.quantization} has not."
        )
    chosen = {id(p) for _, p in _within(lm, config)}
    layers = {name: layer for name, layer in found.items() if id(layer.weight) in chosen}
    add_scales(layers)
    for name, layer in layers.items():
        scales = layer.get_parameter(SCALES).requires_grad_(True)
        if config.method != "forward_grad" and not scales.is_meta:
            _check_mu(name, float(scales.detach().abs().median()), config.mu)


def _check_mu(name: str, median: float, mu: float) -> None:
    """Refuse probes that would take most blocks of a layer to zero or to twice what they are."""
    if mu >= median:
        raise UsageError(
            f"mu is {mu:g}, but half of the scales of {name} are below {median:.2g}: probes would wipe its blocks out. "
            f"Use a mu of at most {10.0 ** math.floor(math.log10(median / 10)):g}."
        )


def _choose_head(lm: LanguageModel, config: StepOptions) -> None:
    parts = [lm.base.get_submodule(name) for name in parts_of_head(lm.base)] if lm.classifies else [head_of(lm.base)]
    for name, p in (pair for part in parts for pair in part.named_parameters()):
        if is_packed(p):
            raise UsageError(
                f"tuning: head would tune {name} of the head of {lm.name}, whose numbers are packed integers "
                f"({p.dtype}). Tune an adapter (--tuning lora) or scales (--tuning scales)."
            )
        p.requires_grad_(True)


SCHEMES: dict[str, Callable[[LanguageModel, StepOptions], None]] = {
    "full": _choose_weights,
    "head": _choose_head,
    "scales": _choose_scales,
    "lora": add_lora,
    "prefix": add_prefix,
    "prompt": add_prompt,
    "peft": add_by_name,
}
"""Every tuning scheme by name: a function that lets its parameters, and no others, require a gradient."""
