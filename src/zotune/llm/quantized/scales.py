"""The scales of a quantised base as what is tuned: W = Δ ⊙ W̄, the integers W̄ stay as they are (QZO).

The method is that of arXiv:2505.13430. Layers of a GGUF file have theirs unpacked (`zotune.llm.quantized.layers`).
bitsandbytes keeps its scales beside its integers, as tensors that its kernels are given at each forward pass: here they are given
those of a parameter.
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
    """The layers whose scales can be tuned, by name."""
    return {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, (PackedLinear, PackedEmbedding)) or _holder(m) is not None
    }


def add_scales(layers: Mapping[str, nn.Module]) -> None:
    """Give these layers their scales as a parameter; those that are tied share it.

    Raises:
        UsageError: scales are quantised themselves.
    """
    unpack_scales([m for m in layers.values() if isinstance(m, (PackedLinear, PackedEmbedding))])
    for name, layer in layers.items():
        if isinstance(layer, (PackedLinear, PackedEmbedding)) or hasattr(layer, SCALES):
            continue
        if getattr(layer.weight, "CB", None) is not None:
            layer.init_8bit_state()  # type: ignore[operator]
        holder, attribute = _held(layer)
        own = getattr(holder, attribute)
        if not own.is_floating_point():
            raise UsageError(
                f"the scales of {name} are quantised in turn ({own.dtype}), so they cannot be tuned. Load the model "
                "without bnb_4bit_use_double_quant, or tune an adapter (--tuning lora)."
            )
        layer.register_parameter(SCALES, nn.Parameter(own.detach().float().clone(), requires_grad=False))
        layer.register_forward_pre_hook(_give)
        layer.register_forward_hook(_take_back, always_call=True)


def saved_state(model: Any) -> dict[str, Tensor]:
    """What is saved of a model: scales that were tuned where bitsandbytes has them."""
    with scales_in_place(model):
        return dict(model.state_dict())


def save_pretrained(model: Any, folder: str, **options: Any) -> None:
    """As `model.save_pretrained`, with the scales as `saved_state` has them."""
    with scales_in_place(model):
        model.save_pretrained(folder, **options)


def _holder(layer: nn.Module) -> tuple[Any, str] | None:
    """Where a layer of bitsandbytes has its scales; None for any other layer."""
    weight = getattr(layer, "weight", None)
    if getattr(weight, "quant_state", None) is not None:
        return weight.quant_state, "absmax"  # type: ignore[union-attr]
    return (layer.state, "SCB") if getattr(weight, "SCB", None) is not None or hasattr(weight, "CB") else None


def _held(layer: nn.Module) -> tuple[Any, str]:
    held = _holder(layer)
    assert held is not None
    return held


def _give(layer: Any, args: Any) -> None:
    # A torch function reads the parameter, so what is given is displaced while a probe is on its way.
    layer.scales_of_base = getattr(*_held(layer))
    holder, attribute = _held(layer)
    setattr(holder, attribute, torch.relu(layer.scales))


def _take_back(layer: Any, args: Any, output: Any) -> None:
    holder, attribute = _held(layer)
    setattr(holder, attribute, layer.scales_of_base)
    del layer.scales_of_base


@contextmanager
def scales_in_place(model: nn.Module) -> Iterator[None]:
    """Within this context bitsandbytes has the tuned scales, and no layer has a parameter of that name."""
    kept = []
    for layer in model.modules():
        scales = layer._parameters.get(SCALES)
        if scales is not None and not isinstance(layer, (PackedLinear, PackedEmbedding)):
            holder, attribute = _held(layer)
            kept.append((layer, holder, attribute, getattr(holder, attribute), scales))
            setattr(holder, attribute, torch.relu(scales.detach()))
            del layer._parameters[SCALES]
    try:
        yield
    finally:
        for layer, holder, attribute, before, scales in kept:
            setattr(holder, attribute, before)
            layer._parameters[SCALES] = scales
