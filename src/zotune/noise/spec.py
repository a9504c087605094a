"""The noise specification, version 2, as plain NumPy: the bits that every kernel must reproduce.

Element j of the part of a direction u for tensor T is a pure function of (seed, id of T, j). The
generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011):
a keyed bijection of a 128-bit counter, so any element can be made at any time, in any order, on any
device. The key is the 64-bit seed; the counter is

    (block & 0xFFFFFFFF, id of T >> 32, id of T & 0xFFFFFFFF, stream + (block >> 32) · 2⁸)

for blocks below 2⁵⁶, and a block gives four 32-bit words. What a stream takes from a block:

    stream          elements a block   element j
    1 rademacher    128                +1 or -1 by bit (j % 32) of word (j % 128) // 32; a set bit is -1
    2 gaussian      4                  Box-Muller on the word pair (0, 1) or (2, 3): cosine, then sine
    3 rounding      8                  16 bits: the low, then the high half of word (j % 8) // 2
    4 mask          4                  the word j % 4; the element is masked if it is below sparsity · 2³²
    5 probe         128                16 bits: (low half · (j % 32) + high half) mod 2¹⁶ of word (j % 128) // 32

Streams 3 and 5 give the random numbers of `round_stochastically`. Updates take stream 3 with a seed of their own for
each step. A probe x + a·u takes stream 5 with the seed of u, at both of its ends. Each number of stream 5 is uniform
and independent of u. Two numbers of one word, i places apart, are uniform over the pairs whose difference is a multiple
of the largest power of two in i (at most 16), which for the chance to round up is as good as independent. So variances
of rounding add up, at the cost of one block for 128 elements.

The id of T is a 64-bit hash of its canonical name, `tensor_id`. Version 1 has its lower half alone, which is a 32-bit
id. Such an id gives the same bits here as it gave there in every tensor of fewer than 2³⁴ elements, for there the
counter was (block & 0xFFFFFFFF, block >> 32, id of T, stream). So a ledger of version 1 is replayed by its ids alone.

Everything is integer arithmetic and IEEE-754 single precision addition, multiplication, division and
square root in the order written here, without fused multiply-add, so the bits are portable.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

NOISE_VERSION: Final = 2
# What can be replayed.
NOISE_VERSIONS: Final = (1, 2)

SEEDS, RADEMACHER, GAUSSIAN, ROUNDING, MASK, PROBE = 0, 1, 2, 3, 4, 5

Words = NDArray[np.uint32]
Floats = NDArray[np.float32]

_MASK = np.uint64(0xFFFFFFFF)
_WORD = 0xFFFFFFFF
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def tensor_id(name: str, version: int = NOISE_VERSION) -> int:
    """The id of the tensor with a canonical name: the first four bytes of two BLAKE2s hashes of it, little endian.

    The lower half is of the hash with a digest of 4 bytes, the upper half of that with one of 8 bytes. Version 1 has
    the lower half alone.

    >>> hex(tensor_id("lm_head.weight")), hex(tensor_id("lm_head.weight", version=1))
    ('0x5b1d8a123ce0cb5', '0x23ce0cb5')
    """
    low, high = (hashlib.blake2s(name.encode(), digest_size=size).digest()[:4] for size in (4, 8))
    return int.from_bytes(low if version == 1 else low + high, "little")


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Philox4x32-10 of arrays of counters (four words each) under one key (two words).

    The first known-answer vector of the Random123 library:

    >>> zero = np.zeros(1, np.uint32)
    >>> [hex(int(w[0])) for w in philox((zero, zero, zero, zero), (0, 0))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = (c.astype(np.uint64) for c in counter)
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p1 & _MASK,
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p0 & _MASK,
        )
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return (c0.astype(np.uint32), c1.astype(np.uint32), c2.astype(np.uint32), c3.astype(np.uint32))


def words(seed: int, tensor_id: int, stream: int, first_block: int, num_blocks: int) -> Words:
    """The words of blocks first_block, first_block + 1, …: shape (num_blocks, 4)."""
    block = np.arange(first_block, first_block + num_blocks, dtype=np.uint64)
    low, high = (block & _MASK).astype(np.uint32), (block >> np.uint64(32)).astype(np.uint32)
    lower, upper = (np.full(num_blocks, half, np.uint32) for half in (tensor_id & 0xFFFFFFFF, tensor_id >> 32))
    purpose = np.uint32(stream) + (high << np.uint32(8))
    return np.stack(philox((low, upper, lower, purpose), (seed & 0xFFFFFFFF, seed >> 32)), axis=1)


def _elements(seed: int, tensor_id: int, stream: int, start: int, stop: int, per_block: int) -> Words:
    """The blocks that hold elements start … stop - 1, and nothing else."""
    first, last = start // per_block, -(-stop // per_block)
    return words(seed, tensor_id, stream, first, last - first)


def rademacher(seed: int, tensor_id: int, start: int, stop: int) -> Floats:
    """Elements start … stop - 1 of a direction of independent signs: +1 or -1 with probability 1/2 each.

    >>> rademacher(seed=7, tensor_id=1, start=0, stop=8).tolist()
    [1.0, -1.0, -1.0, 1.0, 1.0, 1.0, -1.0, -1.0]
    >>> bool((rademacher(7, 1, 0, 999)[130:] == rademacher(7, 1, 130, 999)).all())
    True
    """
    blocks = _elements(seed, tensor_id, RADEMACHER, start, stop, 128)
    bits = (blocks[:, :, None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
    signs = np.float32(1) - np.float32(2) * bits.astype(np.float32)
    return np.asarray(signs.reshape(-1)[start % 128 :][: stop - start], np.float32)


def log(x: Floats) -> Floats:
    """The natural logarithm of normal positive numbers: 2 artanh((m - 1) / (m + 1)) + e ln 2, x = m 2^e.

    With 1/√2 ≤ m < √2 the series up to the ninth power is within one part in 10⁷.
    """
    bits = x.view(np.int32)
    e = (bits - np.int32(0x3F3504F3)) >> np.int32(23)
    m = (bits - (e << np.int32(23))).view(np.float32)
    s = (m - np.float32(1)) / (m + np.float32(1))
    z = s * s
    p: Any = np.float32(1 / 9)
    for c in (1 / 7, 1 / 5, 1 / 3, 1.0):
        p = p * z + np.float32(c)
    return np.asarray(np.float32(2) * s * p + e.astype(np.float32) * np.float32(0.6931471805599453), np.float32)


def cosine_and_sine(w: Words) -> tuple[Floats, Floats]:
    """Cos and sin of 2π w / 2³²: a quarter turn from the top bits, Taylor polynomials on |y| ≤ π/4."""
    turned = w + np.uint32(1 << 29)
    quadrant = turned >> np.uint32(30)
    f = (turned & np.uint32(0x3FFFFFFF)).astype(np.int32) - np.int32(1 << 29)
    y = f.astype(np.float32) * np.float32(1.5707963267948966 / (1 << 30))
    z = y * y
    s: Any = np.float32(1 / 362880)
    c: Any = np.float32(-1 / 3628800)
    for a in (-1 / 5040, 1 / 120, -1 / 6, 1.0):
        s = s * z + np.float32(a)
    for a in (1 / 40320, -1 / 720, 1 / 24, -1 / 2, 1.0):
        c = c * z + np.float32(a)
    s = s * y
    odd = (quadrant & np.uint32(1)) == 1
    cos, sin = np.where(odd, s, c), np.where(odd, c, s)
    cos = np.where((quadrant == 1) | (quadrant == 2), -cos, cos)
    return cos, np.where(quadrant >= 2, -sin, sin)


def gaussian(seed: int, tensor_id: int, start: int, stop: int) -> Floats:
    """Elements start … stop - 1 of a direction of independent standard normal numbers (Box-Muller).

    The radius comes from a uniform number in [2⁻³³, 1], so |u| ≤ 6.77.

    >>> [round(float(z), 4) for z in gaussian(seed=7, tensor_id=1, start=0, stop=4)]
    [0.2205, -2.2389, -0.1101, -1.311]
    """
    blocks = _elements(seed, tensor_id, GAUSSIAN, start, stop, 4).reshape(-1, 2)
    uniform = (blocks[:, 0].astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    radius = np.sqrt(np.float32(-2) * log(uniform))
    cos, sin = cosine_and_sine(blocks[:, 1])
    normals = np.stack((radius * cos, radius * sin), axis=1).reshape(-1)
    return np.asarray(normals[start % 4 :][: stop - start], np.float32)


def low_rank(left: Floats, right: Floats) -> Floats:
    """The matrix A Bᵀ/√r of a direction of low rank, from factors A (m, r) and B (n, r) of another stream's elements.

    A is that stream's first m r elements as an (m, r) matrix, B its first n r with a seed of their own. Element (i, j)
    is the sum over s, in that order, of (A_is · 1/√r) B_js; 1/√r is rounded once.

    >>> low_rank(rademacher(7, 1, 0, 2).reshape(2, 1), rademacher(8, 1, 0, 3).reshape(3, 1)).tolist()
    [[1.0, -1.0, -1.0], [-1.0, 1.0, 1.0]]
    """
    rank = left.shape[1]
    scaled = left * np.float32(1 / np.sqrt(rank))
    total = scaled[:, :1] * right[:, 0]
    for s in range(1, rank):
        total = total + scaled[:, s : s + 1] * right[:, s]
    return np.asarray(total, np.float32)


def random16(seed: int, tensor_id: int, start: int, stop: int) -> Words:
    """Elements start … stop - 1 of the rounding stream: integers in [0, 65536)."""
    blocks = _elements(seed, tensor_id, ROUNDING, start, stop, 8)
    halves = np.stack((blocks & np.uint32(0xFFFF), blocks >> np.uint32(16)), axis=2)
    return halves.reshape(-1)[start % 8 :][: stop - start]


def probe16(seed: int, tensor_id: int, start: int, stop: int) -> Words:
    """Elements start … stop - 1 of the probe stream: integers in [0, 65536).

    >>> probe16(seed=7, tensor_id=1, start=0, stop=4).tolist()
    [21864, 60724, 34048, 7372]
    """
    blocks = _elements(seed, tensor_id, PROBE, start, stop, 128)[:, :, None]
    numbers = (blocks & np.uint32(0xFFFF)) * np.arange(32, dtype=np.uint32) + (blocks >> np.uint32(16))
    return (numbers & np.uint32(0xFFFF)).reshape(-1)[start % 128 :][: stop - start]


def masked(seed: int, tensor_id: int, start: int, stop: int, threshold: int) -> NDArray[np.bool_]:
    """Whether elements start … stop - 1 are masked: each with probability threshold / 2³², independently.

    >>> round(float(masked(seed=7, tensor_id=1, start=0, stop=10**6, threshold=1 << 30).mean()), 2)
    0.25
    """
    blocks = _elements(seed, tensor_id, MASK, start, stop, 4)
    return np.asarray(blocks.reshape(-1)[start % 4 :][: stop - start] < np.uint64(threshold))


def round_stochastically(x: Floats, random: Words, dtype: str) -> NDArray[np.uint16]:
    """The bits of x rounded to "bfloat16" or "float16", up or down at random so that the mean is x.

    Of the two neighbours of |x|, the upper one is taken if random + k ≥ 65536, where k is the distance
    of |x| from the lower one in units of 2⁻¹⁶ of their gap, rounded down. For bfloat16, and for float16
    outside the subnormal range, k is exact and the rounding is unbiased; for subnormal float16 the bias
    is below 2⁻¹⁶ of a gap. The largest finite number is never rounded up to infinity.
    """
    magnitude = np.abs(x)
    if dtype == "bfloat16":
        lower = (magnitude.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        below, above = (_from_bfloat16(b) for b in (lower, lower + np.uint16(1)))
    else:
        with np.errstate(over="ignore"):
            nearest = magnitude.astype(np.float16)
        lower = nearest.view(np.uint16) - (nearest.astype(np.float32) > magnitude).astype(np.uint16)
        below, above = (b.view(np.float16).astype(np.float32) for b in (lower, lower + np.uint16(1)))
    k = ((magnitude - below) / (above - below) * np.float32(65536)).astype(np.uint32)
    up = ((k + random.astype(np.uint32)) >= 65536) & np.isfinite(above)
    sign = np.signbit(x).astype(np.uint16) << np.uint16(15)
    return np.asarray((lower + up.astype(np.uint16)) | sign, np.uint16)


def _from_bfloat16(bits: NDArray[np.uint16]) -> Floats:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def derive_seed(seed: int, *path: int) -> int:
    """A 64-bit seed for one purpose of one step: up to three integers below 2³² name it.

    >>> derive_seed(0, 1, 0) != derive_seed(0, 0, 1)
    True
    """
    if not all(0 <= part <= _WORD for part in path):
        raise ValueError(f"the path of a seed is of integers in [0, 2**32), got {path}")
    low, high, *_ = _philox_of_one((*(*path, 0, 0, 0)[:3], SEEDS), (seed & _WORD, seed >> 32))
    return low | high << 32


def _philox_of_one(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """As `philox`, of a single counter of plain integers, without the cost of arrays.

    >>> [hex(w) for w in _philox_of_one((0, 0, 0, 0), (0, 0))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    first, second = int(_M0), int(_M1)
    for _ in range(10):
        p0, p1 = first * c0, second * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _WORD, (p0 >> 32) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _W0) & _WORD, (k1 + _W1) & _WORD
    return c0, c1, c2, c3
