"""Virtual tokens: a prefix of keys and values in every layer, or a prompt of embeddings before the input's.

A prefix is initialised with the keys and values of real tokens, a prompt with their embeddings (Malladi et al., 2023;
Lester et al., 2021), because random virtual tokens are unlike any input that the model was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zotune.errors import UsageError, is_out_of_memory
from zotune.llm.config.step import StepOptions
from zotune.llm.models.adapters.peft_wrapper import read_a_token, task_type, wrap_with_peft
from zotune.llm.models.cache_argument import cache_argument
from zotune.llm.models.language_model import LanguageModel
from zotune.model.parameters import input_device

PREFIX_TOKENS, PROMPT_TOKENS = 5, 10
# Names under which peft looks for a model's sizes.
_KNOWN_SIZES = {
    "token_dim": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
}
_NO_PREFIX = (
    "a prefix is keys and values of one shape that every layer takes in, and the layers of {} do not. Tune a prompt or "
    "a LoRA adapter (--tuning prompt, lora)."
)
_NO_PROMPT = (
    "a prompt of virtual tokens is embeddings that the model reads in place of tokens, and {} does not. Tune a LoRA "
    "adapter (--tuning lora)."
)


def add_prefix(lm: LanguageModel, config: StepOptions) -> None:
    """Put tuned keys and values before those of every layer (Li and Liang, 2021), initialised from real tokens.

    Raises:
        UsageError: the model's layers have no such keys and values.
    """
    from peft import PrefixTuningConfig

    tokens = real_tokens(lm, config.num_virtual_tokens or PREFIX_TOKENS, config.seed)
    with _refused_in_words(lm, _NO_PREFIX):
        keys_values = keys_and_values(lm.base, tokens)
        prefix = PrefixTuningConfig(num_virtual_tokens=len(tokens), task_type=task_type(lm), **_sizes(lm))
        wrap_with_peft(lm, prefix, config)
    _set_virtual_tokens(lm, keys_values)
    with _refused_in_words(lm, _NO_PREFIX):
        read_a_token(lm)


def add_prompt(lm: LanguageModel, config: StepOptions) -> None:
    """Put tuned embeddings before those of the input (Lester et al., 2021), initialised from real tokens.

    Raises:
        UsageError: the model does not read embeddings in place of tokens.
    """
    from peft import PromptTuningConfig

    embeddings = lm.base.get_input_embeddings()
    tokens = real_tokens(lm, config.num_virtual_tokens or PROMPT_TOKENS, config.seed)
    with _refused_in_words(lm, _NO_PROMPT):
        with torch.no_grad():
            rows = embeddings(tokens.to(lm.device)).float()
        sizes = {**_sizes(lm), "token_dim": rows.shape[1]}
        prompt = PromptTuningConfig(num_virtual_tokens=len(tokens), task_type=task_type(lm), **sizes)
        wrap_with_peft(lm, prompt, config)
        read_a_token(lm)  # with random embeddings: Gemma 4 reads those of real tokens, and no others
    _set_virtual_tokens(lm, rows)


@contextmanager
def _refused_in_words(lm: LanguageModel, message: str) -> Iterator[None]:
    """Within this context an error of peft or of the model means that it does not take virtual tokens."""
    try:
        yield
    except (UsageError, Warning):
        raise
    except Exception as error:  # a model may fail in any way on inputs that it was not written for
        if is_out_of_memory(error):
            raise
        raise UsageError(message.format(f"{lm.name} ({lm.config.model_type})")) from error


def real_tokens(lm: LanguageModel, count: int, seed: int) -> Tensor:
    """Return the (count,) ids of random ordinary tokens of the vocabulary, drawn with `seed`."""
    special = set(lm.tokenizer.all_special_ids)
    ordinary = [i for i in range(min(len(lm.tokenizer), lm.vocabulary)) if i not in special]
    drawn = torch.randint(len(ordinary), (count,), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(ordinary)[drawn]


def _sizes(lm: LanguageModel) -> dict[str, int]:
    """Return the model's sizes that its configuration has under names that peft does not know, as peft names them."""
    config = lm.config.get_text_config()
    written = config.to_dict()
    values = {"token_dim": getattr(config, "hidden_size", None)}
    values["num_attention_heads"] = getattr(config, "num_attention_heads", None)
    return {
        name: value
        for name, value in values.items()
        if value is not None and not any(known in written for known in _KNOWN_SIZES[name])
    }


@torch.no_grad()
def keys_and_values(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the keys and values of T tokens in every layer, (T, layers · 2 · heads · head size) in float32."""
    from transformers import DynamicCache

    cache = DynamicCache()
    device = input_device(model)
    model(input_ids=tokens[None].to(device), **{cache_argument(model): cache})
    pairs = torch.stack([t[0] for layer in cache.layers for t in (layer.keys, layer.values)])
    # (2 · layers, heads, T, head size) → a row for each token
    return pairs.permute(2, 0, 1, 3).reshape(len(tokens), -1).float()


def _set_virtual_tokens(lm: LanguageModel, values: Tensor) -> None:
    encoder: Any = lm.module.prompt_encoder
    (virtual,) = encoder.parameters()
    if virtual.shape != values.shape:
        raise UsageError(
            f"the layers of {lm.name} differ in the shape of their keys, which a prefix of peft does not support. "
            "Tune a prompt or a LoRA adapter (--tuning prompt, lora)."
        )
    with torch.no_grad():
        virtual.copy_(values)
