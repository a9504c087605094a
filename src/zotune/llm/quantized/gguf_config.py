"""The configuration of a GGUF file: each key of its architecture is computed with, or refused by name.

transformers turns the keys that it knows into a configuration and leaves out the others, among them the scaling of
rotary positions. The file itself holds the frequency factors of Llama 3.1 as a tensor, `rope_freqs.weight`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from zotune.errors import UsageError

ROPE_FACTORS = "rope_freqs.weight"

# Keys of an architecture, and the attributes that hold them in a configuration of transformers.
_ATTRIBUTES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "vocab_size": "vocab_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
# Keys that change nothing in the logits of a text, or that are handled by name below.
_WITHOUT_EFFECT = {"pooling_type", "rope.scaling.finetuned"}
_BY_NAME = {
    *("block_count", "rope.freq_base", "rope.dimension_count", "rope.scale_linear", "rope.scaling.type"),
    *("rope.scaling.factor", "rope.scaling.original_context_length", "attention.causal"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
}
# The parameters of Llama 3.1 and 3.2 (transformers calls the scaling "llama3"); the factor differs.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def complete_config(
    config: Any, architecture: str, keys: Mapping[str, Any], rope_factors: np.ndarray[Any, Any] | None, file: str
) -> None:
    """Write what a GGUF file says about its model into a configuration of transformers.

    Args:
        config: the configuration, which is changed.
        architecture: the file's architecture.
        keys: the file's keys and values.
        rope_factors: the values of the file's `rope_freqs.weight`, by which the rotary frequencies are divided.
        file: the file's name, for errors.

    Raises:
        UsageError: a key says what the model cannot compute; the message names it.
    """
    prefix = f"{architecture}."
    own = {key.removeprefix(prefix): value for key, value in keys.items() if key.startswith(prefix)}

    def refuse(key: str) -> None:
        raise UsageError(
            f"{file} sets {prefix}{key}: {own[key]}, which zotune does not compute with. Convert the model to a folder "
            "of safetensors, and quantise that (--quantization)."
        )

    for key, value in own.items():
        if key in _ATTRIBUTES and not isinstance(value, tuple):
            if not _equal(getattr(config, _ATTRIBUTES[key], None), value):
                setattr(config, _ATTRIBUTES[key], value)
        elif key not in (*_BY_NAME, *_WITHOUT_EFFECT) and value not in (0, False, "", "none"):
            refuse(key)
    if own.get("attention.causal", True) is False:
        refuse("attention.causal")
    if own.get("block_count", config.num_hidden_layers) != config.num_hidden_layers:
        refuse("block_count")
    if own.get("attention.value_length", config.head_dim) != own.get("attention.key_length", config.head_dim):
        refuse("attention.value_length")
    if own.get("rope.dimension_count", config.head_dim) != config.head_dim:
        refuse("rope.dimension_count")
    _complete_rope(config, own, rope_factors, refuse, file)


def _complete_rope(
    config: Any, own: Mapping[str, Any], factors: np.ndarray[Any, Any] | None, refuse: Any, file: str
) -> None:
    """Write the base, the scaling and the factors of rotary positions into a configuration."""
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)  # gemma3 scales the positions of its layers of full attention alone
    rope["rope_theta"] = own.get("rope.freq_base", rope.get("rope_theta", 10000.0))
    factor = own.get("rope.scaling.factor", own.get("rope.scale_linear", 1.0))
    scaling = own.get("rope.scaling.type", "linear" if factor not in (0.0, 1.0) else "none")
    original = own.get("rope.scaling.original_context_length", config.max_position_embeddings)
    if scaling == "linear" and factor not in (0.0, 1.0):
        rope |= {"rope_type": "linear", "factor": factor}
    elif scaling == "yarn":
        rope |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        betas = {name: own.get(f"rope.scaling.yarn_{name}") for name in ("beta_fast", "beta_slow")}
        rope |= {name: value for name, value in betas.items() if value is not None}
    elif scaling not in ("none", "linear"):
        refuse("rope.scaling.type")
    if factors is None or np.all(factors == 1):
        return
    if rope.get("rope_type", "default") not in ("default", "llama3") or len(factors) != config.head_dim // 2:
        raise UsageError(
            f"{file} holds {ROPE_FACTORS} of {len(factors)} factors beside a scaling of type {scaling!r} and heads of "
            f"{config.head_dim} values, which zotune does not compute with."
        )
    rope |= _scaling_of_factors(factors, config.head_dim, float(rope["rope_theta"]), original)


def _scaling_of_factors(factors: np.ndarray[Any, Any], head_dim: int, theta: float, original: int) -> dict[str, Any]:
    """Return parameters of transformers with which rotary frequencies are divided by these factors.

    They are those of Llama 3 if these give the factors; else "longrope", which takes any factors.
    """
    if np.allclose(factors, llama3_factors(head_dim, theta, float(factors.max())), rtol=1e-4):
        return {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA3}
    listed = [float(f) for f in factors]
    return {
        "rope_type": "longrope",
        "short_factor": listed,
        "long_factor": listed,
        "attention_factor": 1.0,
        "original_max_position_embeddings": original,
    }


def llama3_factors(head_dim: int, theta: float, factor: float) -> np.ndarray[Any, Any]:
    """Return the factors by which Llama 3 divides its rotary frequencies.

    Frequencies whose wave is longer than the original context are divided by `factor`, those with at least four waves
    in it stay, and those between are interpolated (Llama 3.1, section 3.4.2 of arXiv:2407.21783).

    >>> llama3_factors(8, 500000.0, 8.0).round(3).tolist()
    [1.0, 1.0, 2.695, 8.0]
    """
    waves = _LLAMA3["original_max_position_embeddings"] / (
        2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    )
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    kept = np.clip((waves - low) / (high - low), 0, 1)
    return 1 / (kept + (1 - kept) / factor)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)
