"""The noise of `spec.py` in torch operations: the same bits on any device that torch has.

Slower than a kernel, for every step makes a temporary, but it needs nothing but torch. 32-bit words
are kept in int64 tensors, whose products wrap modulo 2⁶⁴ as Philox wants them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zotune.noise.spec import GAUSSIAN, MASK, PROBE, RADEMACHER, ROUNDING

_MASK = 0xFFFFFFFF
# What is made at a time: bounds the temporaries to some ten megabytes.
_ELEMENTS = 1 << 18
# Elements of a stream in a block.
_PER_BLOCK = {RADEMACHER: 128, GAUSSIAN: 4, ROUNDING: 8, PROBE: 128}
_BITS_OF_ONE = 0x3F800000


def _words(seed: int, tensor_id: int, stream: int, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c0, c1 = blocks & _MASK, torch.full_like(blocks, tensor_id >> 32)
    c2, c3 = torch.full_like(blocks, tensor_id & _MASK), stream + ((blocks >> 32) << 8)
    k0, k1 = seed & _MASK, seed >> 32
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def _blocks(start: int, size: int, per_block: int, device: torch.device) -> tuple[Tensor, int]:
    """The numbers of the blocks that hold elements start … start + size - 1, and where the first lies in its block."""
    first, last = start // per_block, -(-(start + size) // per_block)
    return torch.arange(first, last, dtype=torch.int64, device=device), start % per_block


def _stream(
    seed: int, tensor_id: int, stream: int, start: int, size: int, per_block: int, device: torch.device
) -> tuple[Tensor, int]:
    blocks, offset = _blocks(start, size, per_block, device)
    return torch.stack(_words(seed, tensor_id, stream, blocks), dim=1), offset


def _log(x: Tensor) -> Tensor:
    bits = x.view(torch.int32)
    e = (bits - 0x3F3504F3) >> 23
    m = (bits - (e << 23)).view(torch.float32)
    s = (m - 1) / (m + 1)
    z = s * s
    p = torch.full_like(z, 1 / 9)
    for c in (1 / 7, 1 / 5, 1 / 3, 1.0):
        p = p * z + c
    return 2 * s * p + e.to(torch.float32) * 0.6931471805599453


def _sqrt(x: Tensor) -> Tensor:
    """The square root rounded as IEEE 754 wants it: on a CPU torch's own (that of MKL) may be one unit off."""
    return torch.sqrt(x.double()).float() if x.device.type == "cpu" else torch.sqrt(x)


def _cosine_and_sine(w: Tensor) -> tuple[Tensor, Tensor]:
    turned = (w + (1 << 29)) & _MASK
    quadrant = turned >> 30
    y = ((turned & 0x3FFFFFFF) - (1 << 29)).to(torch.float32) * (1.5707963267948966 / (1 << 30))
    z = y * y
    s, c = torch.full_like(z, 1 / 362880), torch.full_like(z, -1 / 3628800)
    for a in (-1 / 5040, 1 / 120, -1 / 6, 1.0):
        s = s * z + a
    for a in (1 / 40320, -1 / 720, 1 / 24, -1 / 2, 1.0):
        c = c * z + a
    s = s * y
    odd = (quadrant & 1) == 1
    cos, sin = torch.where(odd, s, c), torch.where(odd, c, s)
    cos = torch.where((quadrant == 1) | (quadrant == 2), -cos, cos)
    return cos, torch.where(quadrant >= 2, -sin, sin)


def fill(out: Tensor, stream: int, seed: int, tensor_id: int, start: int) -> None:
    """Fill a flat float32 tensor with elements start, start + 1, … of a direction."""
    for lo in range(0, out.numel(), _ELEMENTS):
        _fill(out[lo : lo + _ELEMENTS], stream, seed, tensor_id, start + lo)


def _fill(out: Tensor, stream: int, seed: int, tensor_id: int, start: int) -> None:
    out.copy_(_slice(stream, seed, tensor_id, start, out.numel(), out.device))


def _slice(stream: int, seed: int, tensor_id: int, start: int, size: int, device: torch.device) -> Tensor:
    """Elements start … start + size - 1 of a stream."""
    blocks, offset = _blocks(start, size, _PER_BLOCK[stream], device)
    return _elements(stream, seed, tensor_id, blocks)[offset : offset + size]


def _elements(stream: int, seed: int, tensor_id: int, blocks: Tensor) -> Tensor:
    """All elements of a stream in some blocks, in the order of the blocks."""
    words = torch.stack(_words(seed, tensor_id, stream, blocks), dim=1)
    if stream in (ROUNDING, PROBE):
        low, high = words & 0xFFFF, words >> 16
        if stream == ROUNDING:
            return torch.stack((low, high), dim=2).flatten()
        places = torch.arange(32, device=blocks.device)
        return ((low.unsqueeze(2) * places + high.unsqueeze(2)) & 0xFFFF).flatten()
    if stream == RADEMACHER:
        shifts = torch.arange(31, -1, -1, dtype=torch.int32, device=blocks.device)
        signs = (words.to(torch.int32).unsqueeze(2) << shifts) & -(1 << 31)
        return (signs | _BITS_OF_ONE).view(torch.float32).flatten()
    pairs = words.view(-1, 2)
    uniform = (pairs[:, 0].to(torch.float32) + 0.5) * 2.0**-32
    radius = _sqrt(-2 * _log(uniform))
    cos, sin = _cosine_and_sine(pairs[:, 1])
    return torch.stack((radius * cos, radius * sin), dim=1).flatten()


def mask(out: Tensor, threshold: int, seed: int, tensor_id: int, start: int) -> None:
    """Set elements of a flat tensor to zero where the mask stream's word is below `threshold`."""
    for lo in range(0, out.numel(), _ELEMENTS):
        part = out[lo : lo + _ELEMENTS]
        words, first = _stream(seed, tensor_id, MASK, start + lo, part.numel(), 4, out.device)
        part.masked_fill_(words.flatten()[first : first + part.numel()] < threshold, 0.0)


def round_half(
    out: Tensor, y: Tensor, rounding_seed: int, tensor_id: int, start: int, rounding: int = ROUNDING
) -> None:
    """Out = y (flat, float32) rounded by a stream to out's 16-bit dtype, so that the mean is y."""
    for lo in range(0, y.numel(), _ELEMENTS):
        part = slice(lo, min(lo + _ELEMENTS, y.numel()))
        random = _slice(rounding, rounding_seed, tensor_id, start + lo, part.stop - lo, y.device)
        out[part].copy_(_rounded(y[part], random, out.dtype))


def round_rows(rows: Tensor, y: Tensor, indices: Tensor, seed: int, tensor_id: int) -> None:
    """As `noise.round_rows`."""
    width = rows.shape[1]
    if width > _ELEMENTS:
        for row, its_y, index in zip(rows, y, indices.tolist(), strict=True):
            round_half(row, its_y, seed, tensor_id, index * width, PROBE)
        return
    at_once = _ELEMENTS // max(1, width)
    for lo in range(0, len(rows), at_once):
        random = _rows(PROBE, seed, tensor_id, indices[lo : lo + at_once] * width, width)
        rows[lo : lo + at_once].copy_(_rounded(y[lo : lo + at_once], random, rows.dtype))


def _rounded(y: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """The rule of `spec.round_stochastically`."""
    magnitude = y.abs()
    if dtype == torch.bfloat16:
        lower = magnitude.view(torch.int32) >> 16
    else:
        nearest = magnitude.to(dtype)
        lower = nearest.view(torch.int16).to(torch.int32) - (nearest.float() > magnitude).to(torch.int32)
    below, above = (b.to(torch.int16).view(dtype).float() for b in (lower, lower + 1))
    k = ((magnitude - below) / (above - below) * 65536).to(torch.int64)
    up = ((k + random) >= 65536) & torch.isfinite(above)
    rounded = (lower + up.to(torch.int32)).to(torch.int16).view(dtype)
    return torch.where(torch.signbit(y), -rounded, rounded)


def add(
    out: Tensor,
    x: Tensor,
    stream: int,
    seeds: Sequence[int],
    scales: Sequence[float],
    tensor_id: int,
    start: int,
    rounding_seed: int | None,
    rounding: int = ROUNDING,
) -> None:
    """Out = x + Σ scales[i] uᵢ, the sum taken first; 16-bit results at random if given a seed, else to nearest."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    for lo in range(0, x.numel(), _ELEMENTS):
        part = slice(lo, min(lo + _ELEMENTS, x.numel()))
        u = torch.empty(part.stop - lo, dtype=torch.float32, device=x.device)
        # -0 is what leaves every first term as it is, its sign included; 0 + -0 would be 0.
        total = torch.full((part.stop - lo,), -0.0, dtype=dtype, device=x.device)
        for seed, scale in zip(seeds, scales, strict=True):
            fill(u, stream, seed, tensor_id, start + lo)
            # Two operations, not one with alpha: a fused multiply-add would round once instead of twice.
            total += u.to(dtype) * torch.tensor(scale, dtype=dtype, device="cpu")
        y = x[part].to(dtype) + total
        if x.dtype in (torch.bfloat16, torch.float16) and rounding_seed is not None:
            round_half(out[part], y, rounding_seed, tensor_id, start + lo, rounding)
        else:
            out[part].copy_(y)


def axpy_pair(
    plus: Tensor, minus: Tensor, x: Tensor, stream: int, seed: int, scale: float, tensor_id: int, start: int
) -> None:
    """Plus = x + scale · u and minus = x - scale · u; 16-bit results by the probe stream."""
    for out, a in ((plus, scale), (minus, -scale)):
        add(out, x, stream, (seed,), (a,), tensor_id, start, seed, PROBE)


def foreach_axpy_(
    xs: Sequence[Tensor],
    tensor_ids: Sequence[int],
    stream: int,
    seeds: Sequence[int],
    scales: Sequence[float],
    rounding_seed: int | None,
    rounding: int = ROUNDING,
) -> None:
    """As `noise.foreach_axpy_`: x += Σ scales[i] uᵢ for each of some whole tensors."""
    for x, tensor_id in zip(xs, tensor_ids, strict=True):
        add(x, x, stream, seeds, scales, tensor_id, 0, rounding_seed, rounding)


def add_rows(rows: Tensor, indices: Tensor, stream: int, seed: int, scale: float, tensor_id: int) -> None:
    """rows[i] += scale u, where rows[i] is row indices[i] of the whole tensor; 16-bit results by the probe stream."""
    width = rows.shape[1]
    if width > _ELEMENTS:
        for row, index in zip(rows, indices.tolist(), strict=True):
            add(row, row, stream, (seed,), (scale,), tensor_id, index * width, seed, PROBE)
        return
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    a, at_once = torch.tensor(scale, dtype=dtype, device="cpu"), _ELEMENTS // max(1, width)
    for lo in range(0, len(rows), at_once):
        part, places = rows[lo : lo + at_once], indices[lo : lo + at_once]
        y = part.to(dtype) + _rows(stream, seed, tensor_id, places * width, width).to(dtype) * a
        if part.dtype in (torch.bfloat16, torch.float16):
            round_rows(part, y, places, seed, tensor_id)
        else:
            part.copy_(y)


def _rows(stream: int, seed: int, tensor_id: int, starts: Tensor, width: int) -> Tensor:
    """Elements start … start + width - 1 of a stream for each of some starts: (starts, width)."""
    per_block = _PER_BLOCK[stream]
    # As many blocks as a row can touch, wherever it begins in the first of them.
    blocks = torch.arange(-(-(width + per_block - 1) // per_block), device=starts.device)
    blocks = (starts // per_block).unsqueeze(1) + blocks
    elements = _elements(stream, seed, tensor_id, blocks.flatten()).view(len(starts), -1)
    return elements.gather(1, (starts % per_block).unsqueeze(1) + torch.arange(width, device=starts.device))
