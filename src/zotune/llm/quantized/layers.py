"""Layers that store their weights in GGUF blocks and dequantise them during the forward pass.

The blocks never change. The tunable part of such a layer is the scale Δ of each block, W = Δ ⊙ W̄ (QZO,
arXiv:2505.13430): `unpack_scales` makes it a float32 parameter. The values of a block are then those of the file times
Δ / Δ₀, with Δ₀ the scale in the file. They equal the file's values exactly as long as Δ = Δ₀, in every format, with or
without a minimum per block. A negative Δ / Δ₀ is read as 0, so that no block changes its sign.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zotune.estimate.perturb import piece_elements
from zotune.llm.quantized.gguf_blocks import BlockFormat


class _PackedMatrix(nn.Module):
    """A matrix in packed blocks.

    Attributes:
        weight: (rows, bytes) uint8, the blocks.
        scales: (rows, blocks) float32 if they are tuned, else None.
        format: the format of the blocks.
        dtype: the dtype of the dequantised values.
    """

    weight: nn.Parameter
    scales: nn.Parameter | None
    format: BlockFormat
    dtype: torch.dtype

    def set_blocks(self, blocks: nn.Parameter, format: BlockFormat, dtype: torch.dtype) -> None:
        """Set the packed blocks; the scales are not tuned."""
        self.weight, self.format, self.dtype = blocks, format, dtype
        self.register_parameter("scales", None)

    @property
    def width(self) -> int:
        """The number of values per row."""
        return self.weight.shape[1] // self.format.bytes * self.format.numbers

    @torch.no_grad()
    def dequantised(self) -> Tensor:
        """Return the whole matrix, (rows, width)."""
        return self._dequantise(self.weight, self.scales)

    def rows(self, indices: Tensor) -> Tensor:
        """Return some rows, (*indices, width)."""
        flat = indices.reshape(-1)
        scales = None if self.scales is None else F.embedding(flat, self.scales)
        return self._dequantise(self.weight[flat], scales).view(*indices.shape, -1)

    def _dequantise(self, packed: Tensor, scales: Tensor | None) -> Tensor:
        values = self.format.dequantised(packed)
        if scales is not None:
            values = (values.view(*scales.shape, -1) * _ratio(scales, self.format.scales(packed))).flatten(1)
        return values.to(self.dtype)


def _ratio(scales: Tensor, of_file: Tensor) -> Tensor:
    """Return Δ / Δ₀, (rows, blocks, 1), at least 0; 1 where Δ₀ is 0, because the block then does not depend on it."""
    ratio = torch.where(of_file == 0, 1.0, scales / of_file)
    return torch.relu(ratio).unsqueeze(-1)


class PackedLinear(_PackedMatrix, nn.Linear):  # type: ignore[misc] # its weights are packed
    """A linear layer whose weights stay packed and are dequantised a few rows at a time."""

    def __init__(
        self, blocks: nn.Parameter, format: BlockFormat, dtype: torch.dtype, bias: nn.Parameter | None
    ) -> None:
        nn.Module.__init__(self)
        self.set_blocks(blocks, format, dtype)
        self.in_features, self.out_features = self.width, blocks.shape[0]
        self.register_parameter("bias", bias)

    def forward(self, input: Tensor) -> Tensor:
        """X Wᵀ + b."""
        at_once = max(1, piece_elements(self.weight.device.type) // self.in_features)
        if at_once >= self.out_features:
            return F.linear(input, self._dequantise(self.weight, self.scales), self.bias)
        blocks = torch.split(self.weight, at_once)
        # One split for all pieces, so that the scales are read, and perturbed, once.
        scales = [None] * len(blocks) if self.scales is None else torch.split(self.scales, at_once)
        parts = [F.linear(input, self._dequantise(b, s)) for b, s in zip(blocks, scales, strict=True)]
        out = torch.cat(parts, dim=-1)
        return out if self.bias is None else out + self.bias


class PackedEmbedding(_PackedMatrix, nn.Embedding):  # type: ignore[misc] # its table is packed
    """An embedding whose table stays packed; only the rows that are looked up are dequantised."""

    def __init__(self, blocks: nn.Parameter, format: BlockFormat, dtype: torch.dtype, scale: Any = None) -> None:
        nn.Module.__init__(self)
        self.set_blocks(blocks, format, dtype)
        self.num_embeddings, self.embedding_dim = blocks.shape[0], self.width
        self.padding_idx, self.embed_scale = None, scale

    def forward(self, input: Tensor) -> Tensor:
        """Return rows of the table."""
        rows = self.rows(input)
        return rows if self.embed_scale is None else rows * self.embed_scale.to(rows.dtype)


def has_packed_layers(model: nn.Module) -> bool:
    """Whether a model has packed layers of a GGUF file."""
    return any(isinstance(m, _PackedMatrix) for m in model.modules())


def unpack_scales(layers: Iterable[_PackedMatrix]) -> None:
    """Give packed layers the scales of their blocks as a parameter, which tied layers share."""
    parameters: dict[int, nn.Parameter] = {}
    for layer in layers:
        key = id(layer.weight)
        if key not in parameters:
            parameters[key] = nn.Parameter(layer.format.scales(layer.weight.detach()), requires_grad=False)
        layer.scales = parameters[key]
