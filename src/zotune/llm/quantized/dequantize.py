"""A model on a quantised base as a plain one: each packed matrix made numbers, tuned scales and adapters put in.

Packed integers cannot take an adapter in without being rounded again. These weights are what the tuned model computes
with, to rounding, and any tool loads them; they take the memory that the base never did.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from zotune.llm.quantized.backends import is_packed
from zotune.llm.quantized.gguf_model import matrices_on_meta, put
from zotune.llm.quantized.layers import PackedEmbedding, PackedLinear
from zotune.llm.quantized.scales import scales_in_place


def dense(module: Any) -> Any:
    """The model without packed tensors and without an adapter; the one that is given is of no use afterwards."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    if not hasattr(module, "peft_config"):
        return _plain(module)
    adapter, state = module.active_peft_config, get_peft_model_state_dict(module, save_embedding_layers=False)
    again = get_peft_model(_plain(module.unload()), adapter)
    set_peft_model_state_dict(again, state)
    return again.merge_and_unload()


@torch.no_grad()
def _plain(model: Any) -> Any:
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with matrices_on_meta():
        plain = type(model)(config)
    with scales_in_place(model):
        for name, _ in list(plain.named_parameters()):
            owner, _, attribute = name.rpartition(".")
            put(plain, name, nn.Parameter(_numbers(model.get_submodule(owner), attribute, model.dtype)))
    plain.tie_weights()
    plain.generation_config, plain.name_or_path = model.generation_config, model.name_or_path
    return plain.eval()


def _numbers(layer: Any, attribute: str, dtype: torch.dtype) -> Tensor:
    """A parameter of a layer as numbers."""
    value: Any = getattr(layer, attribute)
    if not is_packed(value):
        return value.data  # type: ignore[no-any-return]
    if isinstance(layer, (PackedLinear, PackedEmbedding)):
        return layer.dequantised()
    if getattr(value, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(value.data, value.quant_state).to(dtype)  # type: ignore[no-any-return]
    if hasattr(value, "CB"):  # rows of int8, each with the greatest magnitude of its row
        scales = layer.state.SCB if value.SCB is None else value.SCB
        return (value.data.float() * (scales.float() / 127)[:, None]).to(dtype)  # type: ignore[no-any-return]
    return value.dequantize().to(dtype)  # type: ignore[no-any-return]
