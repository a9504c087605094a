"""Layers that keep their weights in GGUF's blocks, and make numbers of them where they are read.

The blocks are never written. What can be tuned of such a layer is the scale Δ of each block, W = Δ ⊙ W̄ (QZO,
arXiv:2505.13430): `unpack_scales` makes it a float32 parameter of its own. A block's numbers are then those of the file
times Δ / Δ₀, with Δ₀ the scale in the file: exactly the file's while Δ is Δ₀, in every format, whether or not its
blocks have a minimum besides. Where Δ / Δ₀ falls below 0 it is read as 0, so that no block is turned over.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zotune.estimate.perturb import piece_elements
from zotune.llm.quantized.block_formats import BlockFormat


class _Packed(nn.Module):
    """A matrix in blocks.

    Attributes:
        weight: (rows, bytes) uint8, the blocks.
        scales: (rows, blocks) float32, where they are tuned; else None.
        format: of the blocks.
        dtype: of the numbers that are made.
    """

    weight: nn.Parameter
    scales: nn.Parameter | None
    format: BlockFormat
    dtype: torch.dtype

    def hold(self, blocks: nn.Parameter, format: BlockFormat, dtype: torch.dtype) -> None:
        """Keep these blocks."""
        self.weight, self.format, self.dtype = blocks, format, dtype
        self.register_parameter("scales", None)

    @property
    def width(self) -> int:
        """Numbers a row."""
        return self.weight.shape[1] // self.format.bytes * self.format.numbers

    @torch.no_grad()
    def dequantised(self) -> Tensor:
        """(rows, width): the whole matrix, as it is read."""
        return self._numbers(self.weight, self.scales)

    def rows(self, indices: Tensor) -> Tensor:
        """(*indices, width): some rows."""
        flat = indices.reshape(-1)
        scales = None if self.scales is None else F.embedding(flat, self.scales)
        return self._numbers(self.weight[flat], scales).view(*indices.shape, -1)

    def _numbers(self, packed: Tensor, scales: Tensor | None) -> Tensor:
        numbers = self.format.dequantised(packed)
        if scales is not None:
            numbers = (numbers.view(*scales.shape, -1) * _ratio(scales, self.format.scales(packed))).flatten(1)
        return numbers.to(self.dtype)


def _ratio(scales: Tensor, of_file: Tensor) -> Tensor:
    """(rows, blocks, 1): Δ / Δ₀, at least 0; 1 where Δ₀ is 0, for then the block does not depend on it."""
    ratio = torch.where(of_file == 0, 1.0, scales / of_file)
    return torch.relu(ratio).unsqueeze(-1)


class PackedLinear(_Packed, nn.Linear):  # type: ignore[misc] # its weights are packed
    """A linear layer whose weights stay packed, and become numbers some rows at a time."""

    def __init__(
        self, blocks: nn.Parameter, format: BlockFormat, dtype: torch.dtype, bias: nn.Parameter | None
    ) -> None:
        nn.Module.__init__(self)
        self.hold(blocks, format, dtype)
        self.in_features, self.out_features = self.width, blocks.shape[0]
        self.register_parameter("bias", bias)

    def forward(self, input: Tensor) -> Tensor:
        """X Wᵀ + b."""
        at_once = max(1, piece_elements(self.weight.device.type) // self.in_features)
        if at_once >= self.out_features:
            return F.linear(input, self._numbers(self.weight, self.scales), self.bias)
        blocks = torch.split(self.weight, at_once)
        # One read for all pieces, so that the scales are displaced once.
        scales = [None] * len(blocks) if self.scales is None else torch.split(self.scales, at_once)
        parts = [F.linear(input, self._numbers(b, s)) for b, s in zip(blocks, scales, strict=True)]
        out = torch.cat(parts, dim=-1)
        return out if self.bias is None else out + self.bias


class PackedEmbedding(_Packed, nn.Embedding):  # type: ignore[misc] # its table is packed
    """An embedding whose table stays packed; only the rows that are looked up become numbers."""

    def __init__(self, blocks: nn.Parameter, format: BlockFormat, dtype: torch.dtype, scale: Any = None) -> None:
        nn.Module.__init__(self)
        self.hold(blocks, format, dtype)
        self.num_embeddings, self.embedding_dim = blocks.shape[0], self.width
        self.padding_idx, self.embed_scale = None, scale

    def forward(self, input: Tensor) -> Tensor:
        """The rows of the table."""
        rows = self.rows(input)
        return rows if self.embed_scale is None else rows * self.embed_scale.to(rows.dtype)


def has_packed_layers(model: nn.Module) -> bool:
    """Whether a model has layers of a GGUF file."""
    return any(isinstance(m, _Packed) for m in model.modules())


def unpack_scales(layers: Iterable[_Packed]) -> None:
    """Give packed layers their blocks' scales as a parameter; layers that are tied share it."""
    made: dict[int, nn.Parameter] = {}
    for layer in layers:
        key = id(layer.weight)
        if key not in made:
            made[key] = nn.Parameter(layer.format.scales(layer.weight.detach()), requires_grad=False)
        layer.scales = made[key]
