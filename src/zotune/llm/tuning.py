"""What is tuned: all of the model, a chosen part of it, or an adapter beside it (`zotune.llm.adapters`)."""

from __future__ import annotations

import re
from collections.abc import Callable

from zotune.errors import UsageError
from zotune.llm.adapters import add_by_name, add_lora, add_prefix, add_prompt, first_layer
from zotune.llm.heads import parts_of_head
from zotune.llm.models import LanguageModel, head_of
from zotune.llm.reuse import parameters_below
from zotune.llm.step_options import StepOptions
from zotune.stack import stack_of


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
    path, layers = stack_of(lm.module)
    first = first_layer(len(layers), config.tuned_layers)
    names = [name for name, _ in lm.module.named_parameters()]
    below = set() if config.tuned_layers is None else parameters_below(lm.module, layers)
    for name, p in lm.module.named_parameters():
        # What is neither a layer nor read before the layers comes after them.
        lies_in = int(name[len(path) + 1 :].split(".")[0]) if name.startswith(f"{path}.") else len(layers)
        if pattern.search(name) and lies_in >= first and id(p) not in below:
            p.requires_grad_(True)
    if not any(p.requires_grad for p in lm.module.parameters()):
        raise UsageError(
            f"nothing would be tuned: no weight of {lm.name} in the chosen layers has a name that "
            f"{config.tuned_parameters!r} finds. Its weights are called, for instance, {names[-2]!r} and {names[-1]!r}."
        )


def _choose_head(lm: LanguageModel, config: StepOptions) -> None:
    parts = [lm.base.get_submodule(name) for name in parts_of_head(lm.base)] if lm.classifies else [head_of(lm.base)]
    for p in (p for part in parts for p in part.parameters()):
        p.requires_grad_(True)


SCHEMES: dict[str, Callable[[LanguageModel, StepOptions], None]] = {
    "full": _choose_weights,
    "head": _choose_head,
    "lora": add_lora,
    "prefix": add_prefix,
    "prompt": add_prompt,
    "peft": add_by_name,
}
"""Every tuning scheme by name: a function that lets its parameters, and no others, require a gradient."""
