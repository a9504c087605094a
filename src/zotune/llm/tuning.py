"""What is tuned: all of the model, a chosen part of it, or a LoRA adapter beside it (by peft)."""

from __future__ import annotations

import re

import torch

from zotune.errors import UsageError, did_you_mean
from zotune.llm.config import TrainConfig
from zotune.llm.heads import parts_of_head
from zotune.llm.models import LanguageModel
from zotune.llm.reuse import layers_of, parameters_below


def prepare(lm: LanguageModel, config: TrainConfig) -> None:
    """Add the adapter that `config` asks for, and let exactly the tuned parameters require a gradient.

    Raises:
        UsageError: nothing would be tuned, or a layer or module that does not exist is named.
    """
    for p in lm.module.parameters():
        p.requires_grad_(False)
    if config.tuning == "lora":
        _add_lora(lm, config)
    else:
        _choose_weights(lm, config)


def _choose_weights(lm: LanguageModel, config: TrainConfig) -> None:
    try:
        pattern = re.compile(config.tuned_parameters or "")
    except re.error as error:
        raise UsageError(f"tuned_parameters is no regular expression: {config.tuned_parameters!r} ({error}).") from None
    path, layers = layers_of(lm.module)
    first = _first_layer(len(layers), config.tuned_layers)
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


def _first_layer(num_layers: int, tuned_layers: int | None) -> int:
    if tuned_layers is not None and tuned_layers > num_layers:
        raise UsageError(f"tuned_layers is {tuned_layers}, but the model has {num_layers} layers.")
    return num_layers - (tuned_layers or num_layers)


def _add_lora(lm: LanguageModel, config: TrainConfig) -> None:
    from peft import LoraConfig, get_peft_model

    path, layers = layers_of(lm.module)
    first = _first_layer(len(layers), config.tuned_layers)
    linear = {n.rpartition(".")[2] for n, m in lm.module.named_modules() if isinstance(m, torch.nn.Linear)}
    default = ("q_proj", "v_proj") if "q_proj" in linear else ("query", "value")
    targets = config.lora_target_modules or default
    unknown = [t for t in targets if t not in linear]
    if unknown:
        raise UsageError(
            f"lora_target_modules: {lm.name} has no linear layer {unknown[0]!r}.{did_you_mean(unknown[0], linear)}"
        )
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules=list(targets),
        layers_to_transform=None if config.tuned_layers is None else list(range(first, len(layers))),
        layers_pattern=None if config.tuned_layers is None else path.rpartition(".")[2],
        # A new head is trained whole, and saved with the adapter.
        modules_to_save=parts_of_head(lm.base) if lm.classifies else None,
        task_type="SEQ_CLS" if lm.classifies else None if lm.masked else "CAUSAL_LM",
    )
    # peft draws an adapter's first weights from torch's global generator; leave that as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        lm.module = get_peft_model(lm.module, lora)
    lm.module.eval()
