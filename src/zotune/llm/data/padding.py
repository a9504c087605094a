"""Whether a row's results are the same in a padded batch as alone; if that is not known, rows of a length go together.

Padding on the right changes nothing for causal models, whose positions see no later ones. Bidirectional models must
mask it everywhere; some mix padding in nevertheless (Fourier transforms, convolutions). For generated text padding is
on the left, which recurrent models may read as text. Some rotary embeddings depend on the longest row of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zotune.llm.data.collator import Batch

# Models by transformers' `model_type` whose rows `tests/llm/models/test_padding.py` compares with each row alone.
MASKED = frozenset(
    {"albert", "bert", "camembert", "data2vec-text", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "esm"}
    | {"eurobert", "flaubert", "longformer", "luke", "megatron-bert", "modernbert", "mpnet", "nomic_bert", "rembert"}
    | {"roberta", "roformer", "squeezebert", "xlm", "xlm-roberta", "xlm-roberta-xl", "xmod"}
)
"""Bidirectional models whose masks keep padding out."""

LEFT_PADDED = frozenset(
    {"bamba", "biogpt", "bloom", "codegen", "cohere", "deepseek_v3", "exaone4", "falcon", "falcon_mamba", "gemma"}
    | {"gemma2", "gemma3_text", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe"}
    | {"jetmoe", "lfm2", "llama", "llama4_text", "mamba", "mamba2", "minimax", "mistral", "mixtral", "mpt", "nemotron"}
    | {"olmo2", "olmoe", "opt", "persimmon", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next"}
    | {"smollm3", "starcoder2", "xglm"}
)
"""Causal models that generate the same text after padding on the left."""

# Causal models whose results depend on the length of the batch: they cut it into chunks.
_IN_CHUNKS = frozenset({"reformer"})


def reads_padded(config: Any, longest: int, *, masked: bool) -> bool:
    """Return whether rows of at most `longest` positions may share a pass, with padding on the right."""
    kind = config.get_text_config().model_type
    known = kind in MASKED if masked else kind not in _IN_CHUNKS
    return known and longest <= _rope_limit(config)


def generates_padded(config: Any, longest: int) -> bool:
    """Return whether text of at most `longest` positions may be generated in one batch, with padding on the left."""
    return config.get_text_config().model_type in LEFT_PADDED and longest <= _rope_limit(config)


def rope_grows(config: Any) -> bool:
    """Return whether rotary embeddings keep the frequencies of the longest row so far."""
    return any("dynamic" in str(rope.get("rope_type", "")) for rope in _ropes(config))


def _ropes(config: Any) -> list[dict[str, Any]]:
    """Return the parameters of the rotary embeddings, which may differ between kinds of layers."""
    every = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return [every, *(value for value in every.values() if isinstance(value, dict))]


def _rope_limit(config: Any) -> float:
    """Return the length from which rotary embeddings depend on the longest row of a batch."""
    text = config.get_text_config()
    limits = [float("inf")]
    for rope in _ropes(config):
        kind = str(rope.get("rope_type", ""))
        if kind == "longrope":
            limits.append(rope.get("original_max_position_embeddings") or text.max_position_embeddings)
        elif "dynamic" in kind:
            limits.append(text.max_position_embeddings)
    return min(limits)


def reset_rope(module: torch.nn.Module) -> None:
    """Return rotary embeddings that grew with the longest row so far to their first frequencies."""
    for part in module.modules():
        for name in [key for key in vars(part) if key.endswith("max_seq_len_cached")]:
            setattr(part, name, part.original_max_seq_len)
        for name, frequencies in dict(part.named_buffers(recurse=False)).items():
            first = getattr(part, f"{name.removesuffix('inv_freq')}original_inv_freq", None)
            if name.endswith("inv_freq") and not name.endswith("original_inv_freq") and first is not None:
                part.register_buffer(name, first.to(frequencies.device, copy=True), persistent=False)


def by_length(batch: Batch) -> Iterator[tuple[Batch, Tensor]]:
    """Yield the parts of a batch whose sequences have one length, without padding, and the places of their tokens.

    A place is an index into the batch's (M,) candidate tokens.
    """
    width = batch.input_ids.shape[1]
    device = batch.input_ids.device
    lengths = torch.tensor([len(s) for s in batch.sequences], device=device)
    sequence_of = batch.positions // width
    for length in torch.unique(lengths).tolist():
        rows = (lengths == length).nonzero()[:, 0]
        number = torch.full_like(lengths, -1).index_copy(0, rows, torch.arange(len(rows), device=device))
        kept = (number[sequence_of] >= 0).nonzero()[:, 0]
        slot = torch.full_like(batch.positions, -1).index_copy(0, kept, torch.arange(len(kept), device=device))
        places = (slot[batch.rows] >= 0).nonzero()[:, 0]
        positions = batch.positions[kept]
        part = replace(
            batch,
            sequences=tuple(batch.sequences[i] for i in rows.tolist()),
            input_ids=batch.input_ids[rows, :length],
            attention_mask=batch.attention_mask[rows, :length],
            positions=number[positions // width] * length + positions % width,
            rows=slot[batch.rows[places]],
            tokens=batch.tokens[places],
            exact=True,
        )
        yield part, places
