"""Dequantising a model: each packed matrix becomes floating-point numbers, with tuned scales applied.

An adapter cannot be merged into packed integers without rounding them again. The dequantised weights equal, up to
rounding, those that the tuned model computes with, and any tool can load them; they need the memory of a full model.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from zotune.llm.quantized.backends import is_packed
from zotune.llm.quantized.gguf_model import matrices_on_meta, set_in_model
from zotune.llm.quantized.layers import PackedEmbedding, PackedLinear
from zotune.llm.quantized.scales import scales_in_place


@torch.no_grad()
def dequantised_model(model: Any) -> Any:
    """Return a copy of a model whose packed matrices are dequantised, with tuned scales applied."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with matrices_on_meta():
        plain = type(model)(config)
    with scales_in_place(model):
        for name, _ in list(plain.named_parameters()):
            owner, _, attribute = name.rpartition(".")
            set_in_model(
                plain, name, nn.Parameter(_dequantised_parameter(model.get_submodule(owner), attribute, model.dtype))
            )
    plain.tie_weights()
    plain.generation_config, plain.name_or_path = model.generation_config, model.name_or_path
    return plain.eval()


def _dequantised_parameter(layer: Any, attribute: str, dtype: torch.dtype) -> Tensor:
    """Return a parameter of a layer as floating-point numbers."""
    value: Any = getattr(layer, attribute)
    if not is_packed(value):
        return value.data  # type: ignore[no-any-return]
    if isinstance(layer, (PackedLinear, PackedEmbedding)):
        return layer.dequantised()
    if getattr(value, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(value.data, value.quant_state).to(dtype)  # type: ignore[no-any-return]
    if hasattr(value, "CB"):  # rows of int8, each scaled by the largest magnitude of the row
        scales = layer.state.SCB if value.SCB is None else value.SCB
        return (value.data.float() * (scales.float() / 127)[:, None]).to(dtype)  # type: ignore[no-any-return]
    return value.dequantize().to(dtype)  # type: ignore[no-any-return]
