"""The noise of `spec.py` as Triton kernels, fused with the arithmetic that uses it.

A program works on a tile: the elements [TILE k, TILE (k + 1)) of a tensor, so that each block of noise is
made once, by one program, whatever slice of the tensor is asked for. 16-bit weights come as their bit
patterns; `KIND` says which of `FLOAT`, `BFLOAT16` and `FLOAT16` they are, `ROUNDING` by which stream results are
rounded: 0 for to nearest, the stream of updates, or that of probes, whose seed is the direction's. The seeds and
scales are read from the device's memory (see `launch._terms_on`): a step's launches differ from the last step's in
data alone.

The kernels must be launched with `enable_fp_fusion=False`: a fused multiply-add would change bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zotune.noise import spec

# The benchmark's content keys of results of a CPU leave out this module.
COUNTS_FOR_RESULTS = "on cuda"
FLOAT, BFLOAT16, FLOAT16 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_RADEMACHER, _GAUSSIAN = tl.constexpr(spec.RADEMACHER), tl.constexpr(spec.GAUSSIAN)
_ROUNDING, _MASK, _PROBE = tl.constexpr(spec.ROUNDING), tl.constexpr(spec.MASK), tl.constexpr(spec.PROBE)


@triton.jit
def _words(seed, tensor, stream, first, N: tl.constexpr):
    """The four words of each of N blocks from `first` on; each word apart, shape (N,)."""
    block = first + tl.arange(0, N)
    low = block.to(tl.uint32)
    purpose = ((block >> 32) << 8).to(tl.uint32) + stream
    lower = tl.zeros_like(low) + tensor.to(tl.uint32)
    upper = tl.zeros_like(low) + (tensor >> 32).to(tl.uint32)
    return tl.philox_impl(low, upper, lower, purpose, seed.to(tl.uint32), (seed >> 32).to(tl.uint32))


@triton.jit
def _id(low, high):
    """A tensor's id of 64 bits from its halves, which come as arguments of 32 bits: a type that fits any value."""
    return (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def _in_order(a, b, c, d):
    """a₀ b₀ c₀ d₀ a₁ b₁ …"""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def _signs(seed, tensor, tile, TILE: tl.constexpr):
    w0, w1, w2, w3 = _words(seed, tensor, _RADEMACHER, tile * (TILE // 128), TILE // 128)
    bits = _in_order(w0, w1, w2, w3)[:, None] >> tl.arange(0, 32)[None, :].to(tl.uint32)
    return tl.reshape(((bits << 31) | 0x3F800000).to(tl.float32, bitcast=True), [TILE])


@triton.jit
def _normal_pair(word_r, word_a):
    x = (word_r.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2⁻³²
    bits = x.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    m = (bits - (e << 23)).to(tl.float32, bitcast=True)
    s = tl.div_rn(m - 1.0, m + 1.0)
    z = s * s
    p = z * (1 / 9) + (1 / 7)
    p = p * z + (1 / 5)
    p = p * z + (1 / 3)
    p = p * z + 1.0
    r = tl.sqrt_rn(-2.0 * (2.0 * s * p + e.to(tl.float32) * 0.6931471805599453))

    turned = word_a + 0x20000000
    quadrant = turned >> 30
    f = (turned & 0x3FFFFFFF).to(tl.int32) - 0x20000000
    y = f.to(tl.float32) * 1.4629180792671596e-09  # (π/2) / 2³⁰
    z = y * y
    sine = z * (1 / 362880) + (-1 / 5040)
    sine = sine * z + (1 / 120)
    sine = sine * z + (-1 / 6)
    sine = (sine * z + 1.0) * y
    cosine = z * (-1 / 3628800) + (1 / 40320)
    cosine = cosine * z + (-1 / 720)
    cosine = cosine * z + (1 / 24)
    cosine = cosine * z + (-1 / 2)
    cosine = cosine * z + 1.0
    odd = (quadrant & 1) == 1
    return r * _flipped(tl.where(odd, sine, cosine), quadrant + 1), r * _flipped(tl.where(odd, cosine, sine), quadrant)


@triton.jit
def _flipped(x, quadrant):
    """-x where bit 1 of the quadrant is set."""
    return (x.to(tl.uint32, bitcast=True) ^ ((quadrant & 2) << 30)).to(tl.float32, bitcast=True)


@triton.jit
def _normals(seed, tensor, tile, TILE: tl.constexpr):
    w0, w1, w2, w3 = _words(seed, tensor, _GAUSSIAN, tile * (TILE // 4), TILE // 4)
    a, b = _normal_pair(w0, w1)
    c, d = _normal_pair(w2, w3)
    return _in_order(a, b, c, d)


@triton.jit
def _direction(seed, tensor, tile, STREAM: tl.constexpr, TILE: tl.constexpr):
    """The elements of u in a tile."""
    if STREAM == _RADEMACHER:
        u = _signs(seed, tensor, tile, TILE)
    else:
        u = _normals(seed, tensor, tile, TILE)
    return u


@triton.jit
def _random16(terms, tensor, tile, ROUNDING: tl.constexpr, TILE: tl.constexpr):
    """The numbers of 16 bits for a tile: of an update's seed, or of the first direction's."""
    if ROUNDING == _ROUNDING:
        w0, w1, w2, w3 = _words(tl.load(terms), tensor, _ROUNDING, tile * (TILE // 8), TILE // 8)
        words = _in_order(w0, w1, w2, w3)
        random = tl.interleave(words & 0xFFFF, words >> 16)
    else:
        w0, w1, w2, w3 = _words(tl.load(terms + 1), tensor, _PROBE, tile * (TILE // 128), TILE // 128)
        words = _in_order(w0, w1, w2, w3)[:, None]
        numbers = (words & 0xFFFF) * tl.arange(0, 32)[None, :].to(tl.uint32) + (words >> 16)
        random = tl.reshape(numbers & 0xFFFF, [TILE])
    return random


@triton.jit
def _sum(terms, q, tensor, tile, STREAM: tl.constexpr, TILE: tl.constexpr):
    """Σ scales[i] uᵢ in a tile, in the order of the terms."""
    # -0 is what leaves the first term as it is, its sign included; 0 + -0 would be 0.
    total = tl.full([TILE], 0x80000000, tl.uint32).to(tl.float32, bitcast=True)
    for i in range(q):
        scale = tl.load(terms + 2 * i + 2).to(tl.int32).to(tl.float32, bitcast=True)
        total += scale * _direction(tl.load(terms + 2 * i + 1), tensor, tile, STREAM, TILE)
    return total


@triton.jit
def _from_half(bits):
    """Float16 patterns in any integer type as float32."""
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _widened(x, KIND: tl.constexpr):
    if KIND == FLOAT:
        y = x
    elif KIND == BFLOAT16:
        y = (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        y = _from_half(x)
    return y


@triton.jit
def _nearest(y, KIND: tl.constexpr):
    if KIND == FLOAT:
        rounded = y
    elif KIND == BFLOAT16:
        bits = y.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
    else:
        rounded = y.to(tl.float16).to(tl.uint16, bitcast=True)
    return rounded


@triton.jit
def _at_random(y, random, KIND: tl.constexpr):
    """The rule of `spec.round_stochastically`, without branches on the data."""
    bits = y.to(tl.uint32, bitcast=True)
    if KIND == BFLOAT16:
        lower = (bits & 0x7FFFFFFF) >> 16
        up = ((bits & 0xFFFF) + random) >> 16
        up = tl.where(lower + up < 0x7F80, up, 0)
    else:
        magnitude = tl.abs(y)
        nearest = magnitude.to(tl.float16)
        lower = nearest.to(tl.uint16, bitcast=True).to(tl.uint32) - (nearest.to(tl.float32) > magnitude).to(tl.uint32)
        below = _from_half(lower)
        gap = (_from_half(lower + 1) - below).to(tl.uint32, bitcast=True)
        # The gap is a power of two, so 2¹⁶ over it is exact, and is made in its exponent; so is the product.
        share = (magnitude - below) * (0x87000000 - gap).to(tl.float32, bitcast=True)
        up = (tl.where(lower < 0x7BFF, share, 0.0).to(tl.uint32) + random) >> 16
    return ((lower + up) | ((bits >> 16) & 0x8000)).to(tl.uint16)


@triton.jit
def _load(x, first, n, TILE: tl.constexpr):
    """Elements first … first + TILE - 1 of x, which has n; those that it lacks are anything."""
    lane = tl.arange(0, TILE)
    if (first >= 0) & (first + TILE <= n):  # without a mask, loads are as wide as they can be
        values = tl.load(x + first + lane)
    else:
        values = tl.load(x + first + lane, mask=(first + lane >= 0) & (first + lane < n))
    return values


@triton.jit
def _store(out, first, n, values, TILE: tl.constexpr):
    """As `_load`."""
    lane = tl.arange(0, TILE)
    if (first >= 0) & (first + TILE <= n):
        tl.store(out + first + lane, values)
    else:
        tl.store(out + first + lane, values, mask=(first + lane >= 0) & (first + lane < n))


@triton.jit
def _rounded(y, terms, tensor, tile, KIND: tl.constexpr, ROUNDING: tl.constexpr, TILE: tl.constexpr):
    if ROUNDING:
        bits = _at_random(y, _random16(terms, tensor, tile, ROUNDING, TILE), KIND)
    else:
        bits = _nearest(y, KIND)
    return bits


@triton.jit
def _add_tile(
    out,
    x,
    first,
    n,
    tile,
    terms,
    q,
    tensor,
    STREAM: tl.constexpr,
    KIND: tl.constexpr,
    ROUNDING: tl.constexpr,
    TILE: tl.constexpr,
):
    """Out = x + Σ scales[i] uᵢ for the tile that begins at element `first` of out and x, which have n."""
    y = _widened(_load(x, first, n, TILE), KIND) + _sum(terms, q, tensor, tile, STREAM, TILE)
    _store(out, first, n, _rounded(y, terms, tensor, tile, KIND, ROUNDING, TILE), TILE)


@triton.jit(do_not_specialize=["low", "high"])
def fill(out, start, n, terms, low, high, STREAM: tl.constexpr, TILE: tl.constexpr):
    """Out = u, from element `start` on."""
    tensor = _id(low, high)
    tile = start // TILE + tl.program_id(0).to(tl.int64)
    _store(out, tile * TILE - start, n, _direction(tl.load(terms + 1), tensor, tile, STREAM, TILE), TILE)


@triton.jit(do_not_specialize=["low", "high", "threshold"])
def mask(out, start, n, threshold, terms, low, high, TILE: tl.constexpr):
    """Out = 0 where the mask stream's word is below the threshold."""
    tensor = _id(low, high)
    tile = start // TILE + tl.program_id(0).to(tl.int64)
    w0, w1, w2, w3 = _words(tl.load(terms + 1), tensor, _MASK, tile * (TILE // 4), TILE // 4)
    first = tile * TILE - start
    kept = _in_order(w0, w1, w2, w3).to(tl.int64) >= threshold
    _store(out, first, n, tl.where(kept, _load(out, first, n, TILE), 0.0), TILE)


@triton.jit(do_not_specialize=["low", "high"])
def round_half(out, y, start, n, terms, low, high, KIND: tl.constexpr, ROUNDING: tl.constexpr, TILE: tl.constexpr):
    """Out = y, rounded at random."""
    tensor = _id(low, high)
    tile = start // TILE + tl.program_id(0).to(tl.int64)
    first = tile * TILE - start
    _store(out, first, n, _rounded(_load(y, first, n, TILE), terms, tensor, tile, KIND, ROUNDING, TILE), TILE)


@triton.jit(do_not_specialize=["low", "high"])
def add(
    out,
    x,
    start,
    n,
    terms,
    q,
    low,
    high,
    STREAM: tl.constexpr,
    KIND: tl.constexpr,
    ROUNDING: tl.constexpr,
    TILE: tl.constexpr,
):
    """Out = x + Σ scales[i] uᵢ, from element `start` on."""
    tensor = _id(low, high)
    tile = start // TILE + tl.program_id(0).to(tl.int64)
    _add_tile(out, x, tile * TILE - start, n, tile, terms, q, tensor, STREAM, KIND, ROUNDING, TILE)


@triton.jit(do_not_specialize=["low", "high"])
def axpy_pair(
    plus,
    minus,
    x,
    start,
    n,
    terms,
    low,
    high,
    STREAM: tl.constexpr,
    KIND: tl.constexpr,
    ROUNDING: tl.constexpr,
    TILE: tl.constexpr,
):
    """Plus, minus = x + scale u, x - scale u, from element `start` on; both are rounded by the same numbers."""
    tensor = _id(low, high)
    tile = start // TILE + tl.program_id(0).to(tl.int64)
    first = tile * TILE - start
    y, move = _widened(_load(x, first, n, TILE), KIND), _sum(terms, 1, tensor, tile, STREAM, TILE)
    if ROUNDING:
        random = _random16(terms, tensor, tile, ROUNDING, TILE)
        above, below = _at_random(y + move, random, KIND), _at_random(y - move, random, KIND)
    else:
        above, below = _nearest(y + move, KIND), _nearest(y - move, KIND)
    _store(plus, first, n, above, TILE)
    _store(minus, first, n, below, TILE)


@triton.jit
def foreach_axpy_(
    table,
    terms,
    q,
    STREAM: tl.constexpr,
    KIND: tl.constexpr,
    ROUNDING: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    """X += Σ scales[i] uᵢ for many tensors: a program and a row of the table a chunk (see `launch._chunks_on`)."""
    row = table + 4 * tl.program_id(0).to(tl.int64)
    address, n, tensor, start = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    if KIND == FLOAT:
        x = address.to(tl.pointer_type(tl.float32))
    else:
        x = address.to(tl.pointer_type(tl.uint16))
    if ALIGNED:
        x = tl.multiple_of(x, 16)
    for first in range(0, n, TILE):
        _add_tile(x, x, first, n, (start + first) // TILE, terms, q, tensor, STREAM, KIND, ROUNDING, TILE)


@triton.jit(do_not_specialize=["low", "high"])
def add_rows(
    rows,
    indices,
    width,
    terms,
    low,
    high,
    STREAM: tl.constexpr,
    KIND: tl.constexpr,
    ROUNDING: tl.constexpr,
    TILE: tl.constexpr,
):
    """rows[i] += scale u, where rows[i] is row indices[i] of the whole tensor; a program a row and tile."""
    tensor = _id(low, high)
    i = tl.program_id(0).to(tl.int64)
    start = tl.load(indices + i) * width
    tile = start // TILE + tl.program_id(1)
    row = rows + i * width
    _add_tile(row, row, tile * TILE - start, width, tile, terms, 1, tensor, STREAM, KIND, ROUNDING, TILE)
