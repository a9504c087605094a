"""Dequantising blocks of GGUF formats: integers of a few bits times the scale of their block.

The formats are those of the ggml library (llama.cpp). Each value results from the same float32 operations in the same
order as in the NumPy code of the `gguf` package, so it has the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockFormat:
    """A quantised format.

    Attributes:
        name: ggml's name of the format.
        numbers, bytes: values and bytes per block.
        scale_at: byte offset of the block's scale, a float16.
        unpack: function from (n, bytes) uint8 to (n, numbers) float32.
    """

    name: str
    numbers: int
    bytes: int
    scale_at: int
    unpack: Callable[[Tensor], Tensor]

    def bytes_of(self, numbers: int) -> int:
        """Return the bytes of a row of so many values."""
        return numbers // self.numbers * self.bytes

    def dequantised(self, packed: Tensor) -> Tensor:
        """Dequantise (rows, bytes) uint8 to (rows, numbers) float32.

        >>> block = torch.tensor([[0x00, 0x3C] + [0x21] * 16], dtype=torch.uint8)  # the scale is 1.0
        >>> FORMATS["Q4_0"].dequantised(block)[0, [0, 16]]
        tensor([-7., -6.])
        """
        return self.unpack(packed.reshape(-1, self.bytes)).view(packed.shape[0], -1)

    def scales(self, packed: Tensor) -> Tensor:
        """Return the scale of each block of (rows, bytes), as (rows, blocks) float32."""
        return _half(packed.view(packed.shape[0], -1, self.bytes), self.scale_at)


def _half(blocks: Tensor, at: int) -> Tensor:
    """Return the float16 at a byte offset of each block, as float32; the last dimension is removed."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16)[..., 0].float()


def _shifted(data: Tensor, shifts: range) -> Tensor:
    """Shift each group by each of `shifts`: (n, k) or (n, groups, k) bytes to (n, groups, shifts, k)."""
    by = torch.tensor(list(shifts), dtype=torch.uint8, device=data.device)
    return data.unsqueeze(-2) >> by[:, None]


def _nibbles(data: Tensor, width: int) -> Tensor:
    """Split (n, k) bytes into (n, 2 k) 4-bit values; of each `width` bytes the low halves come first."""
    groups = data.reshape(len(data), -1, width)
    return (_shifted(groups, range(0, 8, 4)) & 15).reshape(len(data), -1)


def _bits(data: Tensor) -> Tensor:
    """Split (n, 4) bytes into (n, 32) bits, the lowest first."""
    by = torch.arange(8, dtype=torch.uint8, device=data.device)
    return ((data.unsqueeze(-1) >> by) & 1).flatten(1)


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0)[:, None] * (_nibbles(blocks[:, 2:], 16).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0)[:, None] * _nibbles(blocks[:, 4:], 16).float() + _half(blocks, 2)[:, None]


def _q5_0(blocks: Tensor) -> Tensor:
    q = _nibbles(blocks[:, 6:], 16) | (_bits(blocks[:, 2:6]) << 4)
    return _half(blocks, 0)[:, None] * (q.float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    q = _nibbles(blocks[:, 8:], 16) | (_bits(blocks[:, 4:8]) << 4)
    return _half(blocks, 0)[:, None] * q.float() + _half(blocks, 2)[:, None]


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float() * _half(blocks, 0)[:, None]


def _sub_scales(data: Tensor) -> tuple[Tensor, Tensor]:
    """Return the 6-bit scales and minima of a block's eight parts, twice (n, 8), from (n, 12) bytes."""
    low, middle, high = data.view(-1, 3, 4).unbind(1)
    scales = torch.cat((low & 63, (high & 15) | ((low >> 2) & 48)), dim=1)
    minima = torch.cat((middle & 63, (high >> 4) | ((middle >> 2) & 48)), dim=1)
    return scales.float(), minima.float()


def _by_parts(blocks: Tensor, q: Tensor) -> Tensor:
    """Dequantise 4- or 5-bit values in eight parts of 32, each with a scale and a minimum of its own."""
    scales, minima = _sub_scales(blocks[:, 4:16])
    d = (_half(blocks, 0)[:, None] * scales)[:, :, None]
    least = (_half(blocks, 2)[:, None] * minima)[:, :, None]
    return (d * q.view(-1, 8, 32).float() - least).flatten(1)


def _q4_k(blocks: Tensor) -> Tensor:
    return _by_parts(blocks, _nibbles(blocks[:, 16:], 32))


def _q5_k(blocks: Tensor) -> Tensor:
    fifth = (_shifted(blocks[:, None, 16:48], range(8)) & 1).flatten(1)
    return _by_parts(blocks, _nibbles(blocks[:, 48:], 32) | (fifth << 4))


def _q6_k(blocks: Tensor) -> Tensor:
    high = (_shifted(blocks[:, 128:192].reshape(-1, 2, 32), range(0, 8, 2)) & 3).flatten(1)
    q = (_nibbles(blocks[:, :128], 64) | (high << 4)).float() - 32
    d = _half(blocks, 208)[:, None] * blocks[:, 192:208].view(torch.int8).float()
    return (d[:, :, None] * q.view(-1, 16, 16)).flatten(1)


FORMATS = {
    f.name: f
    for f in (
        BlockFormat("Q4_0", 32, 18, 0, _q4_0),
        BlockFormat("Q4_1", 32, 20, 0, _q4_1),
        BlockFormat("Q5_0", 32, 22, 0, _q5_0),
        BlockFormat("Q5_1", 32, 24, 0, _q5_1),
        BlockFormat("Q8_0", 32, 34, 0, _q8_0),
        BlockFormat("Q4_K", 256, 144, 0, _q4_k),
        BlockFormat("Q5_K", 256, 176, 0, _q5_k),
        BlockFormat("Q6_K", 256, 210, 208, _q6_k),
    )
}
"""The supported formats, by name."""
