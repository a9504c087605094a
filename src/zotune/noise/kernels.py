"""The noise of `reference.py` as numba kernels, fused with the arithmetic that uses it.

A kernel works on a range of elements in tiles that stay in the first-level cache: make u for the tile,
scale and sum the terms, add them to the weights, round, store. It holds no lock, so several threads
share one tensor, each with its own range; the bits do not depend on how many there are.

Half-precision tensors come as their raw 16-bit patterns, for numba has no such types on the CPU; the
argument `kind` says which of `FLOAT`, `BFLOAT16`, `FLOAT16` and `DOUBLE` an array holds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from zotune.noise.reference import GAUSSIAN, MASK, RADEMACHER, ROUNDING

FLOAT, BFLOAT16, FLOAT16, DOUBLE = 0, 1, 2, 3
TILE = 1024

_u32, _f32, _u64 = np.uint32, np.float32, np.uint64
_ONE, _MINUS_ONE = np.float32(1), np.float32(-1)


def _bitcast(source: Any, target: Any, through: ir.Type | None = None) -> Any:
    """An intrinsic that reads the bits of one scalar type as another, by way of LLVM's `half` if asked."""

    @intrinsic
    def cast(typingctx: Any, x: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value = args[0]
            if through is not None and source is types.uint16:
                return builder.fpext(builder.bitcast(value, through), ir.FloatType())
            if through is not None:
                return builder.bitcast(builder.fptrunc(value, through), ir.IntType(16))
            return builder.bitcast(value, context.get_value_type(target))

        return target(source), codegen

    return cast


_bits = _bitcast(types.float32, types.uint32)
_float = _bitcast(types.uint32, types.float32)
_from_half = _bitcast(types.uint16, types.float32, ir.HalfType())
_to_half = _bitcast(types.float32, types.uint16, ir.HalfType())


@njit(inline="always")
def _philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    for _ in range(10):
        p0 = _u64(0xD2511F53) * _u64(c0)
        p1 = _u64(0xCD9E8D57) * _u64(c2)
        c0 = _u32(_u32(p1 >> _u64(32)) ^ c1 ^ k0)
        c2 = _u32(_u32(p0 >> _u64(32)) ^ c3 ^ k1)
        c1 = _u32(p1)
        c3 = _u32(p0)
        k0 = _u32(k0 + _u32(0x9E3779B9))
        k1 = _u32(k1 + _u32(0xBB67AE85))
    return c0, c1, c2, c3


@njit(inline="always")
def _block(seed: Any, tensor_id: Any, stream: Any, block: Any) -> Any:
    return _philox(
        _u32(block),
        _u32(_u64(block) >> _u64(32)),
        _u32(tensor_id),
        _u32(stream),
        _u32(seed),
        _u32(_u64(seed) >> _u64(32)),
    )


@njit(inline="always")
def _sign(word: Any, k: Any) -> Any:
    """±1 as float bits: bit k of the word moved to the place of the sign."""
    return _float(((word >> _u32(k)) << _u32(31)) | _u32(0x3F800000))


@njit(cache=True, nogil=True, error_model="numpy")
def _rademacher(out: Any, seed: Any, tensor_id: Any, first_block: Any) -> None:
    for b in range(out.size // 128):
        w0, w1, w2, w3 = _block(seed, tensor_id, RADEMACHER, first_block + b)
        for k in range(32):
            out[128 * b + k] = _sign(w0, k)
            out[128 * b + 32 + k] = _sign(w1, k)
            out[128 * b + 64 + k] = _sign(w2, k)
            out[128 * b + 96 + k] = _sign(w3, k)


@njit(inline="always")
def _normal_pair(word_r: Any, word_a: Any) -> Any:
    x = (_f32(word_r) + _f32(0.5)) * _f32(2.0**-32)
    bits = np.int32(_bits(x))
    e = np.int32(bits - np.int32(0x3F3504F3)) >> np.int32(23)
    m = _float(_u32(bits - np.int32(e << np.int32(23))))
    s = (m - _f32(1)) / (m + _f32(1))
    z = s * s
    p = _f32(1 / 9)
    p = p * z + _f32(1 / 7)
    p = p * z + _f32(1 / 5)
    p = p * z + _f32(1 / 3)
    p = p * z + _f32(1.0)
    r = np.sqrt(_f32(-2) * (_f32(2) * s * p + _f32(e) * _f32(0.6931471805599453)))

    turned = _u32(word_a + _u32(1 << 29))
    quadrant = turned >> _u32(30)
    y = _f32(np.int32(turned & _u32(0x3FFFFFFF)) - np.int32(1 << 29)) * _f32(1.5707963267948966 / (1 << 30))
    z = y * y
    sin = _f32(1 / 362880)
    sin = sin * z + _f32(-1 / 5040)
    sin = sin * z + _f32(1 / 120)
    sin = sin * z + _f32(-1 / 6)
    sin = sin * z + _f32(1.0)
    sin = sin * y
    cos = _f32(-1 / 3628800)
    cos = cos * z + _f32(1 / 40320)
    cos = cos * z + _f32(-1 / 720)
    cos = cos * z + _f32(1 / 24)
    cos = cos * z + _f32(-1 / 2)
    cos = cos * z + _f32(1.0)
    odd = quadrant & _u32(1)
    a = sin if odd else cos
    b = cos if odd else sin
    a = -a if _u32(quadrant + _u32(1)) & _u32(2) else a
    b = -b if quadrant & _u32(2) else b
    return r * a, r * b


@njit(cache=True, nogil=True, error_model="numpy")
def _gaussian(out: Any, seed: Any, tensor_id: Any, first_block: Any) -> None:
    n = out.size // 4
    w = np.empty((4, n), np.uint32)
    for b in range(n):
        w[0, b], w[1, b], w[2, b], w[3, b] = _block(seed, tensor_id, GAUSSIAN, first_block + b)
    for pair in range(2):
        for b in range(n):
            cos, sin = _normal_pair(w[2 * pair, b], w[2 * pair + 1, b])
            out[4 * b + 2 * pair] = cos
            out[4 * b + 2 * pair + 1] = sin


@njit(cache=True, nogil=True, error_model="numpy")
def _random16(out: Any, seed: Any, tensor_id: Any, first_block: Any) -> None:
    for b in range(out.size // 8):
        w0, w1, w2, w3 = _block(seed, tensor_id, ROUNDING, first_block + b)
        out[8 * b] = w0 & _u32(0xFFFF)
        out[8 * b + 1] = w0 >> _u32(16)
        out[8 * b + 2] = w1 & _u32(0xFFFF)
        out[8 * b + 3] = w1 >> _u32(16)
        out[8 * b + 4] = w2 & _u32(0xFFFF)
        out[8 * b + 5] = w2 >> _u32(16)
        out[8 * b + 6] = w3 & _u32(0xFFFF)
        out[8 * b + 7] = w3 >> _u32(16)


@njit(cache=True, nogil=True)
def _noise(tile: Any, stream: Any, seed: Any, tensor_id: Any, start: Any) -> Any:
    """Fill a tile from the block that holds element `start`; the index of that element in the tile."""
    if stream == RADEMACHER:
        _rademacher(tile, seed, tensor_id, start // 128)
        return start % 128
    _gaussian(tile, seed, tensor_id, start // 4)
    return start % 4


@njit(cache=True, nogil=True)
def fill(out: Any, stream: int, seed: Any, tensor_id: int, start: int, lo: int, hi: int) -> None:
    """out[lo:hi] = elements start + lo … start + hi - 1 of a direction (float32)."""
    tile = np.empty(TILE + 128, np.float32)
    for t in range(lo, hi, TILE):
        m = min(TILE, hi - t)
        first = _noise(tile, stream, seed, tensor_id, start + t)
        out[t : t + m] = tile[first : first + m]


@njit(cache=True, nogil=True)
def mask(out: Any, threshold: Any, seed: Any, tensor_id: int, start: int, lo: int, hi: int) -> None:
    """out[lo:hi] = 0 where the mask stream's word is below the threshold."""
    for block in range((start + lo) // 4, (start + hi + 3) // 4):
        words = _block(seed, tensor_id, MASK, block)
        for j in range(4):
            at = 4 * block + j - start
            if lo <= at < hi and _u64(words[j]) < threshold:
                out[at] = _f32(0)


@njit(inline="always")
def _load(x: Any, kind: Any) -> Any:
    if kind == BFLOAT16:
        return _float(_u32(x) << _u32(16))
    return _from_half(x)


@njit(inline="always")
def _nearest(y: Any, kind: Any) -> Any:
    if kind == BFLOAT16:
        bits = _bits(y)
        return np.uint16(_u32(bits + _u32(0x7FFF) + ((bits >> _u32(16)) & _u32(1))) >> _u32(16))
    return _to_half(y)


@njit(inline="always")
def _stochastic(y: Any, random: Any, kind: Any) -> Any:
    """The rule of `reference.round_stochastically`, written without branches on the data."""
    magnitude = abs(y)
    sign = np.uint16((_bits(y) >> _u32(16)) & _u32(0x8000))
    if kind == BFLOAT16:
        bits = _bits(magnitude)
        lower = bits >> _u32(16)
        up = _u32((bits & _u32(0xFFFF)) + random) >> _u32(16)
        up = up if lower + up < _u32(0x7F80) else _u32(0)
        return np.uint16(np.uint16(lower + up) | sign)
    nearest = _to_half(magnitude)
    low16 = np.uint16(nearest - np.uint16(1)) if _from_half(nearest) > magnitude else nearest
    below = _from_half(low16)
    gap = _from_half(np.uint16(low16 + np.uint16(1))) - below
    k = _u32((magnitude - below) / gap * _f32(65536))
    up = _u32(k + random) >> _u32(16)
    up = up if _u32(low16) + up < _u32(0x7C00) else _u32(0)
    return np.uint16(np.uint16(_u32(low16) + up) | sign)


@njit(cache=True, nogil=True)
def _sum_terms(total: Any, tile: Any, stream: Any, seeds: Any, scales: Any, tensor_id: Any, start: Any) -> None:
    """Total = Σ scales[i] uᵢ for the elements from `start` on, in the order of the terms."""
    m = total.size
    for i in range(seeds.size):
        first = _noise(tile, stream, seeds[i], tensor_id, start)
        u = tile[first : first + m]
        if i == 0:
            for k in range(m):
                total[k] = scales[0] * u[k]
        else:
            for k in range(m):
                total[k] += scales[i] * u[k]


@njit(cache=True, nogil=True)
def add(out: Any, x: Any, stream: int, seeds: Any, scales: Any, tensor_id: int, start: int, lo: int, hi: int) -> None:
    """out[lo:hi] = x[lo:hi] + Σ scales[i] uᵢ, float32 or float64, the sum taken before it is added."""
    tile = np.empty(TILE + 128, np.float32)
    total = np.empty(TILE, scales.dtype)
    for t in range(lo, hi, TILE):
        m = min(TILE, hi - t)
        _sum_terms(total[:m], tile, stream, seeds, scales, tensor_id, start + t)
        to, of = out[t : t + m], x[t : t + m]
        for k in range(m):
            to[k] = of[k] + total[k]


@njit(cache=True, nogil=True, error_model="numpy")
def add_half(
    out: Any,
    x: Any,
    kind: int,
    stream: int,
    seeds: Any,
    scales: Any,
    tensor_id: int,
    start: int,
    lo: int,
    hi: int,
) -> None:
    """As `add` for 16-bit weights, in float32, rounded to nearest even."""
    tile = np.empty(TILE + 128, np.float32)
    total = np.empty(TILE, np.float32)
    for t in range(lo, hi, TILE):
        m = min(TILE, hi - t)
        _sum_terms(total[:m], tile, stream, seeds, scales, tensor_id, start + t)
        to, of = out[t : t + m], x[t : t + m]
        if kind == BFLOAT16:
            for k in range(m):
                to[k] = _nearest(_load(of[k], BFLOAT16) + total[k], BFLOAT16)
        else:
            for k in range(m):
                to[k] = _nearest(_load(of[k], FLOAT16) + total[k], FLOAT16)


@njit(cache=True, nogil=True)
def add_rows(rows: Any, indices: Any, stream: int, seeds: Any, scales: Any, tensor_id: int) -> None:
    """rows[i] += Σ scales u, where rows[i] is row indices[i] of the whole tensor."""
    width = rows.shape[1]
    for i in range(indices.size):
        add(rows[i], rows[i], stream, seeds, scales, tensor_id, indices[i] * width, 0, width)


@njit(cache=True, nogil=True)
def add_rows_half(rows: Any, indices: Any, kind: int, stream: int, seeds: Any, scales: Any, tensor_id: int) -> None:
    """As `add_rows` for 16-bit weights, rounded to nearest even."""
    width = rows.shape[1]
    for i in range(indices.size):
        add_half(rows[i], rows[i], kind, stream, seeds, scales, tensor_id, indices[i] * width, 0, width)


@njit(cache=True, nogil=True, error_model="numpy")
def round_half(out: Any, y: Any, kind: int, rounding_seed: Any, tensor_id: int, start: int, lo: int, hi: int) -> None:
    """out[lo:hi] = y[lo:hi] (float32) as 16-bit patterns, rounded at random so that the mean is y."""
    random = np.empty(TILE + 8, np.uint32)
    for t in range(lo, hi, TILE):
        m = min(TILE, hi - t)
        _random16(random, rounding_seed, tensor_id, (start + t) // 8)
        r, to, of = random[(start + t) % 8 :], out[t : t + m], y[t : t + m]
        if kind == BFLOAT16:
            for k in range(m):
                to[k] = _stochastic(of[k], r[k], BFLOAT16)
        else:
            for k in range(m):
                to[k] = _stochastic(of[k], r[k], FLOAT16)


@njit(cache=True, nogil=True)
def add_half_stochastic(
    out: Any,
    x: Any,
    kind: int,
    stream: int,
    seeds: Any,
    scales: Any,
    rounding_seed: Any,
    tensor_id: int,
    start: int,
    lo: int,
    hi: int,
) -> None:
    """As `add_half`, rounded by the rounding stream instead of to nearest."""
    tile = np.empty(TILE + 128, np.float32)
    total = np.empty(TILE, np.float32)
    for t in range(lo, hi, TILE):
        m = min(TILE, hi - t)
        _sum_terms(total[:m], tile, stream, seeds, scales, tensor_id, start + t)
        of = x[t : t + m]
        if kind == BFLOAT16:
            for k in range(m):
                total[k] += _load(of[k], BFLOAT16)
        else:
            for k in range(m):
                total[k] += _load(of[k], FLOAT16)
        round_half(out[t : t + m], total, kind, rounding_seed, tensor_id, start + t, 0, m)
