"""Blocks of GGUF's quantised formats to numbers: integers of a few bits times the scale of their block.

The formats are those of the ggml library (llama.cpp). Each number is made by the same float32 operations in the same
order as in the `gguf` package's NumPy code, so it has the same bits.
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
        name: as ggml calls it.
        numbers, bytes: how many a block holds, and takes.
        scale_at: the byte at which the block's scale stands, a float16.
        unpack: (n, bytes) uint8 to (n, numbers) float32.
    """

    name: str
    numbers: int
    bytes: int
    scale_at: int
    unpack: Callable[[Tensor], Tensor]

    def bytes_of(self, numbers: int) -> int:
        """What a row of so many numbers takes."""
        return numbers // self.numbers * self.bytes

    def dequantised(self, packed: Tensor) -> Tensor:
        """(rows, bytes) uint8 to (rows, numbers) float32.

        >>> block = torch.tensor([[0x00, 0x3C] + [0x21] * 16], dtype=torch.uint8)  # the scale is 1.0
        >>> FORMATS["Q4_0"].dequantised(block)[0, [0, 16]]
        tensor([-7., -6.])
        """
        return self.unpack(packed.reshape(-1, self.bytes)).view(packed.shape[0], -1)

    def scales(self, packed: Tensor) -> Tensor:
        """(rows, blocks) float32: the scale of each block of (rows, bytes)."""
        return _half(packed.view(packed.shape[0], -1, self.bytes), self.scale_at)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at some byte of each block, as float32; the last dimension goes."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16)[..., 0].float()


def _shifted(data: Tensor, shifts: range) -> Tensor:
    """(n, k) bytes, or (n, groups, k), to (n, groups, shifts, k): each group shifted by each of `shifts`."""
    by = torch.tensor(list(shifts), dtype=torch.uint8, device=data.device)
    return data.unsqueeze(-2) >> by[:, None]


def _nibbles(data: Tensor, width: int) -> Tensor:
    """(n, k) bytes to (n, 2 k) numbers of 4 bits: of each `width` bytes the low halves first, then the high ones."""
    groups = data.reshape(len(data), -1, width)
    return (_shifted(groups, range(0, 8, 4)) & 15).reshape(len(data), -1)


def _bits(data: Tensor) -> Tensor:
    """(n, 4) bytes to (n, 32) bits, the lowest first."""
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
    """(n, 12) bytes to twice (n, 8): the 6-bit scales and minima of a block's eight parts."""
    low, middle, high = data.view(-1, 3, 4).unbind(1)
    scales = torch.cat((low & 63, (high & 15) | ((low >> 2) & 48)), dim=1)
    minima = torch.cat((middle & 63, (high >> 4) | ((middle >> 2) & 48)), dim=1)
    return scales.float(), minima.float()


def _by_parts(blocks: Tensor, q: Tensor) -> Tensor:
    """Numbers of 4 or 5 bits in eight parts of 32, each with a scale and a minimum of its own."""
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
"""The formats that can be computed with, by name."""
