"""Merging an adapter into the weights of its base model, so that the result computes what the adapted model does.

An adapter may lie on one of two tied matrices, for instance on the embedding of a model whose output layer is the same
matrix. Merged into the shared matrix it would change the other module too, so the two are untied first. Whether the
merged model computes the same is tried on a few tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zotune.errors import UsageError
from zotune.llm.quantized.backends import is_quantised
from zotune.llm.quantized.dequantize_model import dequantised_model
from zotune.model.shards import mesh_of
from zotune.model.streaming import stream_of

# Merging rounds each weight once, in the model's precision; a quantised base also computes with rounded activations.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_ROUGH = 0.1


def is_adapter(module: nn.Module) -> bool:
    """Whether a model is wrapped by an adapter of peft; one that was unwrapped may still have its configuration."""
    return hasattr(module, "peft_config") and hasattr(module, "get_base_model")


def merged_model(module: Any, read: Callable[[Any, Tensor], Tensor], name: str) -> Any:
    """Return a model with its adapter, if any, merged into its weights, which are dequantised if need be.

    The model that is passed must not be used afterwards.

    Args:
        module: the model.
        read: function from a model and (1, L) tokens to its logits.
        name: the model's name, for errors.

    Raises:
        UsageError: its adapter cannot be merged, or the merged model would compute something else.
    """
    if stream_of(module) is not None:
        raise UsageError(
            f"the adapter {name} cannot be merged into weights that are streamed. Merge it first, without "
            "--offload-folder and --device-map: zotune merge."
        )
    if mesh_of(module) is not None:
        raise UsageError(
            f"the adapter {name} cannot be merged into weights that lie in shards. Merge it first, without --shard: "
            "zotune merge."
        )
    quantised = is_quantised(module.get_base_model() if is_adapter(module) else module)
    if is_adapter(module) and not hasattr(module, "merge_and_unload"):
        raise UsageError(
            f"the adapter {name} puts virtual tokens before the input, which cannot be merged into weights."
        )
    tokens = torch.arange(3, 11)[None] % int(module.config.get_text_config().vocab_size)
    with torch.no_grad():
        before = read(module, tokens)
        merged = _dequantised(module) if quantised else _merged(module)
        after = read(merged, tokens)
    if not before.is_meta:
        difference, size = float((after - before).abs().max()), float(before.abs().max())
        if not difference <= (_ROUGH if quantised else _TOLERANCE.get(before.dtype, _ROUGH)) * max(size, 1.0):
            raise UsageError(
                f"the adapter {name} cannot be merged into the weights: the merged model's logits differ from those of "
                f"the adapted one by up to {difference:.2g}. Use the adapter itself."
            )
    return merged


def _dequantised(module: Any) -> Any:
    """Return a quantised model with its adapter, if any, merged into dequantised weights."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    if not is_adapter(module):
        return dequantised_model(module)
    adapter, state = module.active_peft_config, get_peft_model_state_dict(module, save_embedding_layers=False)
    rewrapped = get_peft_model(dequantised_model(module.unload()), adapter)
    set_peft_model_state_dict(rewrapped, state)
    return _merged(rewrapped)


def _merged(module: Any) -> Any:
    """Merge the adapter into the weights, each matrix of them being a matrix of its own."""
    _untie_adapted(module.get_base_model())
    merged = module.merge_and_unload()
    _tie_equal(merged)
    return merged


def _untie_adapted(base: Any) -> None:
    """Give each module that shares a matrix with an adapted module a matrix of its own."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    adapted = {
        id(p)
        for m in base.modules()
        if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        for p in m.parameters()
    }
    seen: set[int] = set()
    for name, p in list(base.named_parameters(remove_duplicate=False)):
        owner, _, attribute = name.rpartition(".")
        if id(p) in seen and id(p) in adapted and "lora_" not in name and "trainable_tokens" not in name:
            setattr(base.get_submodule(owner), attribute, nn.Parameter(p.detach().clone(), requires_grad=False))
            _set_tied(base, tied=False)
        seen.add(id(p))


def _tie_equal(merged: Any) -> None:
    """Tie the output layer to the embedding again if they were untied and have the same values after all."""
    head, embedding = merged.get_output_embeddings(), merged.get_input_embeddings()
    one, other = getattr(head, "weight", None), getattr(embedding, "weight", None)
    if one is None or other is None or one is other or one.is_meta or one.shape != other.shape:
        return
    if getattr(merged, "was_untied", False) and torch.equal(one, other):
        head.weight = other
        _set_tied(merged, tied=True)


def _set_tied(model: Any, *, tied: bool) -> None:
    model.was_untied = not tied
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = tied
