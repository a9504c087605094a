"""Adapters beside a frozen model, all of them peft's: LoRA, a prefix, a prompt, and any other scheme by name.

A prefix begins as keys and values of real tokens, a prompt as their embeddings (Malladi et al., 2023;
Lester et al., 2021): from random numbers a few virtual tokens are far from anything the model knows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from zotune.errors import UsageError, did_you_mean
from zotune.llm.config.step import StepOptions
from zotune.llm.models.cache_argument import accept_old_name, cache_argument
from zotune.llm.models.classification_head import parts_of_head
from zotune.llm.models.load import LanguageModel
from zotune.model.layers import stack_of

PREFIX_TOKENS, PROMPT_TOKENS = 5, 10

# What zotune itself settles of a scheme's configuration.
_SETTLED = {"peft_type", "task_type", "inference_mode", "base_model_name_or_path", "auto_mapping", "peft_version"}


def add_lora(lm: LanguageModel, config: StepOptions) -> None:
    """Add low-rank matrices beside linear layers (Hu et al., 2021); the outcome is the model's own at first.

    Raises:
        UsageError: a layer or module that does not exist is named.
    """
    from peft import LoraConfig

    path, layers = stack_of(lm.base)
    first = first_layer(len(layers), config.tuned_layers)
    linear = {n.rpartition(".")[2] for n, m in lm.module.named_modules() if isinstance(m, nn.Linear)}
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
    _wrap(lm, lora, config.seed)


def first_layer(num_layers: int, tuned_layers: int | None) -> int:
    """The lowest of the last `tuned_layers` layers (of all, where it is None), counted from 0.

    >>> first_layer(12, None), first_layer(12, 2)
    (0, 10)
    """
    if tuned_layers is not None and tuned_layers > num_layers:
        raise UsageError(f"tuned_layers is {tuned_layers}, but the model has {num_layers} layers.")
    return num_layers - (tuned_layers or num_layers)


def add_prefix(lm: LanguageModel, config: StepOptions) -> None:
    """Put tuned keys and values before those of every layer (Li and Liang, 2021), as they come from real tokens."""
    from peft import PrefixTuningConfig

    tokens = real_tokens(lm, config.num_virtual_tokens or PREFIX_TOKENS, config.seed)
    keys_values = keys_and_values(lm.base, tokens)
    _wrap(lm, PrefixTuningConfig(num_virtual_tokens=len(tokens), task_type=_task_type(lm)), config.seed)
    _set_virtual_tokens(lm, keys_values)


def add_prompt(lm: LanguageModel, config: StepOptions) -> None:
    """Put tuned embeddings before those of the input (Lester et al., 2021), those of real tokens at first."""
    from peft import PromptTuningConfig

    embeddings = lm.base.get_input_embeddings()
    tokens = real_tokens(lm, config.num_virtual_tokens or PROMPT_TOKENS, config.seed)
    with torch.no_grad():
        rows = embeddings(tokens.to(lm.device)).float()
    prompt = PromptTuningConfig(num_virtual_tokens=len(tokens), token_dim=rows.shape[1], task_type=_task_type(lm))
    _wrap(lm, prompt, config.seed)
    _set_virtual_tokens(lm, rows)


def add_by_name(lm: LanguageModel, config: StepOptions) -> None:
    """Add the scheme of peft that `peft_type` names, with the keys of `peft_config`.

    Raises:
        UsageError: there is no such scheme or key, or peft cannot add it to this model.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    schemes = {str(kind.value).lower(): schema for kind, schema in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    name = (config.peft_type or "").lower()
    if name not in schemes:
        raise UsageError(f"peft_type: peft has no scheme {config.peft_type!r}.{did_you_mean(name, schemes)}")
    known = {field.name for field in dataclasses.fields(schemes[name]) if field.init} - _SETTLED
    for key in config.peft_options:
        if key not in known:
            raise UsageError(f"peft_config: {name} of peft has no key {key!r}.{did_you_mean(key, known)}")
    try:
        _wrap(lm, schemes[name](task_type=_task_type(lm), **config.peft_options), config.seed)
        one = torch.ones(1, 1, dtype=torch.long, device=lm.device)
        with torch.no_grad():
            lm.read(one, one)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, NotImplementedError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"peft cannot tune {lm.name} with {name} as configured: {reason} "
            f"Its keys go into --peft-config, for instance {', '.join(sorted(known)[:5])}."
        ) from error


def real_tokens(lm: LanguageModel, count: int, seed: int) -> Tensor:
    """(count,) ids of ordinary tokens of the vocabulary, drawn by `seed` alone."""
    special = set(lm.tokenizer.all_special_ids)
    ordinary = [i for i in range(min(len(lm.tokenizer), lm.config.vocab_size)) if i not in special]
    drawn = torch.randint(len(ordinary), (count,), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(ordinary)[drawn]


@torch.no_grad()
def keys_and_values(model: nn.Module, tokens: Tensor) -> Tensor:
    """(T, layers · 2 · heads · head size) keys and values of T tokens read by the model, layer by layer, fp32."""
    from transformers import DynamicCache

    cache = DynamicCache()
    device = next(model.parameters()).device
    model(input_ids=tokens[None].to(device), **{cache_argument(model): cache})
    pairs = torch.stack([t[0] for layer in cache.layers for t in (layer.keys, layer.values)])
    # (2 · layers, heads, T, head size) → a row for each token
    return pairs.permute(2, 0, 1, 3).reshape(len(tokens), -1).float()


def _set_virtual_tokens(lm: LanguageModel, values: Tensor) -> None:
    encoder: Any = lm.module.prompt_encoder
    (virtual,) = encoder.parameters()
    if virtual.shape != values.shape:
        raise UsageError(
            f"the layers of {lm.name} differ in the shape of their keys, which a prefix cannot follow. "
            "Tune a prompt or a LoRA adapter (--tuning prompt, lora)."
        )
    with torch.no_grad():
        virtual.copy_(values)


def _task_type(lm: LanguageModel) -> str:
    if lm.classifies:
        return "SEQ_CLS"
    # peft has no class for masked language models; of its classes this one passes everything through.
    return "FEATURE_EXTRACTION" if lm.masked else "CAUSAL_LM"


def _wrap(lm: LanguageModel, adapter: Any, seed: int) -> None:
    from peft import get_peft_model

    if adapter.is_prompt_learning:
        accept_old_name(lm.base)
    # peft draws an adapter's first weights from torch's global generators; leave those as they were.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        lm.module = get_peft_model(lm.module, adapter)
    lm.module.eval()
