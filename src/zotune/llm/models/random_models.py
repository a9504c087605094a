"""The paper's architectures by name, to measure memory and speed without a download, and a tiny one of each family.

`random:NAME` has the size of the published model, random weights and a tokenizer of bytes; its accuracy is that of
chance.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any


def _opt(width: int, layers: int, heads: int, **other: Any) -> Any:
    from transformers import OPTConfig

    sizes = {"word_embed_proj_dim": width, "ffn_dim": 4 * width, **other}
    return OPTConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, **sizes)


def _llama(width: int, inner: int, layers: int, heads: int, **other: Any) -> Any:
    from transformers import LlamaConfig

    sizes = {"max_position_embeddings": 4096, **other}
    return LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads, **sizes
    )


def _mistral(width: int, inner: int, layers: int, heads: int, kv_heads: int, **other: Any) -> Any:
    from transformers import MistralConfig

    sizes = {"max_position_embeddings": 32768, "sliding_window": 4096, **other}
    return MistralConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        **sizes,
    )


def _qwen3(width: int, inner: int, layers: int, heads: int, kv_heads: int, **other: Any) -> Any:
    from transformers import Qwen3Config

    sizes = {"head_dim": 128, "max_position_embeddings": 40960, "tie_word_embeddings": True, **other}
    return Qwen3Config(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        **sizes,
    )


def _gemma3(width: int, inner: int, layers: int, heads: int, kv_heads: int, **other: Any) -> Any:
    from transformers import Gemma3TextConfig

    sizes = {"head_dim": 256, "sliding_window": 512, "max_position_embeddings": 32768, **other}
    # The byte tokenizer's ids. By default padding is 0, there the first of each text: its row of zeros has no slope
    # that a norm after norm could be followed by.
    sizes |= {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    return Gemma3TextConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        query_pre_attn_scalar=sizes["head_dim"],
        **sizes,
    )


def _roberta(width: int, layers: int, heads: int, **other: Any) -> Any:
    from transformers import RobertaConfig

    sizes = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5, **other}
    return RobertaConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads, **sizes
    )


# The tiny models of these families have sliding windows and head sizes of their own, as the full ones do.
_SLIDING_AND_FULL = ["sliding_attention", "full_attention"]
_TINY = {"vocab_size": 320, "max_position_embeddings": 512}

ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "roberta-large": partial(_roberta, 1024, 24, 16),
    "opt-125m": partial(_opt, 768, 12, 12),
    "opt-350m": partial(_opt, 1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "opt-1.3b": partial(_opt, 2048, 24, 32),
    "opt-2.7b": partial(_opt, 2560, 32, 32),
    "opt-6.7b": partial(_opt, 4096, 32, 32),
    "opt-13b": partial(_opt, 5120, 40, 40),
    "opt-30b": partial(_opt, 7168, 48, 56),
    "opt-66b": partial(_opt, 9216, 64, 72),
    "llama2-7b": partial(_llama, 4096, 11008, 32, 32),
    "llama2-13b": partial(_llama, 5120, 13824, 40, 40),
    "vicuna-7b": partial(_llama, 4096, 11008, 32, 32),
    "mistral-7b": partial(_mistral, 4096, 14336, 32, 32, 8),
    "qwen3-0.6b": partial(_qwen3, 1024, 3072, 28, 16, 8),
    "gemma3-270m": partial(_gemma3, 640, 2048, 18, 4, 1, vocab_size=262144),
    "roberta-tiny": partial(_roberta, 32, 2, 4, **_TINY),
    "opt-tiny": partial(_opt, 32, 2, 4, **_TINY),
    "llama-tiny": partial(_llama, 32, 64, 2, 4, **_TINY),
    "mistral-tiny": partial(_mistral, 32, 64, 2, 4, 2, sliding_window=16, **_TINY),
    "qwen3-tiny": partial(_qwen3, 32, 64, 2, 4, 2, head_dim=16, **_TINY),
    "gemma3-tiny": partial(
        _gemma3, 32, 64, 2, 4, 1, head_dim=16, sliding_window=16, layer_types=_SLIDING_AND_FULL, **_TINY
    ),
}
"""The architectures by name: functions that return their configuration."""

_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
# Words of the tasks' verbalizers, which are single tokens in real vocabularies too.
_WORDS = (
    *(" terrible", " great", " bad", " okay", " good", " Yes", " No", " Maybe"),
    *(" Description", " Entity", " Expression", " Human", " Location", " Number"),
)


def byte_tokenizer(config: Any) -> Any:
    """Return a tokenizer of bytes and a few whole words, for models with random weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*_SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    ends = "<s> $A </s>" if config.model_type == "roberta" else "<s> $A"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=ends, special_tokens=[(token, vocabulary[token]) for token in ("<s>", "</s>")]
    )
    names = dict(zip(("bos", "pad", "eos", "unk", "mask"), _SPECIAL, strict=True))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{f"{name}_token": t for name, t in names.items()})
    fast.add_tokens(list(_WORDS))
    return fast
