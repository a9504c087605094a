"""Tuning the scales Δ of a quantised base, W = Δ ⊙ W̄ with fixed integers W̄ (QZO, arXiv:2505.13430).

Layers of a GGUF file get their scales unpacked (`zotune.llm.quantized.layers`). bitsandbytes passes its scales to its
kernels in each forward pass; during a pass they are replaced by those of a parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zotune.errors import UsageError
from zotune.llm.quantized.layers import PackedEmbedding, PackedLinear, unpack_scales

SCALES = "scales"


def layers_with_scales(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers whose scales can be tuned, by name."""
    return {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, (PackedLinear, PackedEmbedding)) or _find_scales(m) is not None
    }


def add_scales(layers: Mapping[str, nn.Module]) -> None:
    """Give these layers their scales as a parameter, which tied layers share.

    Raises:
        UsageError: the scales are quantised themselves.
    """
    unpack_scales([m for m in layers.values() if isinstance(m, (PackedLinear, PackedEmbedding))])
    for name, layer in layers.items():
        if isinstance(layer, (PackedLinear, PackedEmbedding)) or hasattr(layer, SCALES):
            continue
        if getattr(layer.weight, "CB", None) is not None:
            layer.init_8bit_state()  # type: ignore[operator]
        holder, attribute = _scale_location(layer)
        scales = getattr(holder, attribute)
        if not scales.is_floating_point():
            raise UsageError(
                f"the scales of {name} are quantised themselves ({scales.dtype}), so they cannot be tuned. Load the "
                f"model "
                "without bnb_4bit_use_double_quant, or tune an adapter (--tuning lora)."
            )
        layer.register_parameter(SCALES, nn.Parameter(scales.detach().float().clone(), requires_grad=False))
        layer.register_forward_pre_hook(_use_parameter)
        layer.register_forward_hook(_restore_scales, always_call=True)


def state_dict_with_scales(model: Any) -> dict[str, Tensor]:
    """Return the state dict to save, with tuned scales in the place where bitsandbytes stores them."""
    with scales_in_place(model):
        return dict(model.state_dict())


def save_pretrained(model: Any, folder: str, **options: Any) -> None:
    """Call `model.save_pretrained` with tuned scales in the place where bitsandbytes stores them."""
    with scales_in_place(model):
        model.save_pretrained(folder, **options)


def _find_scales(layer: nn.Module) -> tuple[Any, str] | None:
    """Return the object and attribute that hold the scales of a layer of bitsandbytes; None for any other layer."""
    weight = getattr(layer, "weight", None)
    if getattr(weight, "quant_state", None) is not None:
        return weight.quant_state, "absmax"  # type: ignore[union-attr]
    return (layer.state, "SCB") if getattr(weight, "SCB", None) is not None or hasattr(weight, "CB") else None


def _scale_location(layer: nn.Module) -> tuple[Any, str]:
    location = _find_scales(layer)
    assert location is not None
    return location


def _use_parameter(layer: Any, args: Any) -> None:
    # A torch function reads the parameter, so a probe's perturbation applies to the scales.
    layer.scales_of_base = getattr(*_scale_location(layer))
    holder, attribute = _scale_location(layer)
    setattr(holder, attribute, torch.relu(layer.scales))


def _restore_scales(layer: Any, args: Any, output: Any) -> None:
    holder, attribute = _scale_location(layer)
    setattr(holder, attribute, layer.scales_of_base)
    del layer.scales_of_base


@contextmanager
def scales_in_place(model: nn.Module) -> Iterator[None]:
    """Within this context bitsandbytes holds the tuned scales, and no layer has a parameter of that name."""
    replaced = []
    for layer in model.modules():
        scales = layer._parameters.get(SCALES)
        if scales is not None and not isinstance(layer, (PackedLinear, PackedEmbedding)):
            holder, attribute = _scale_location(layer)
            replaced.append((layer, holder, attribute, getattr(holder, attribute), scales))
            setattr(holder, attribute, torch.relu(scales.detach()))
            del layer._parameters[SCALES]
    try:
        yield
    finally:
        for layer, holder, attribute, before, scales in replaced:
            setattr(holder, attribute, before)
            layer._parameters[SCALES] = scales
