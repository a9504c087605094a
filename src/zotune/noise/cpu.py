"""The CPU's kernels by numba, where no C compiler is at hand: which of them serves which dtype and rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from zotune.noise import kernels
from zotune.noise.kernels import DOUBLE, FLOAT

# Does its work for elements lo … hi - 1.
Kernel = Callable[[int, int], None]


def fill(out: Any, stream: int, seed: int, tensor_id: int, start: int) -> Kernel:
    """A kernel that fills ranges of `out` (float32) with elements start, start + 1, … of a direction."""
    return lambda lo, hi: kernels.fill(out, stream, np.uint64(seed), tensor_id, start, lo, hi)


def add(
    out: Any,
    x: Any,
    kind: int,
    stream: int,
    seeds: Sequence[int],
    scales: Sequence[float],
    rounding_seed: int | None,
    tensor_id: int,
    start: int,
) -> Kernel:
    """A kernel for ranges of out = x + Σ scales[i] uᵢ; 16-bit results at random if given a seed, else to nearest."""
    u, a = np.array(seeds, np.uint64), np.array(scales, np.float64 if kind == DOUBLE else np.float32)
    if kind in (FLOAT, DOUBLE):
        return lambda lo, hi: kernels.add(out, x, stream, u, a, tensor_id, start, lo, hi)
    if rounding_seed is None:
        return lambda lo, hi: kernels.add_half(out, x, kind, stream, u, a, tensor_id, start, lo, hi)
    random = np.uint64(rounding_seed)
    return lambda lo, hi: kernels.add_half_stochastic(out, x, kind, stream, u, a, random, tensor_id, start, lo, hi)


def add_rows(rows: Any, indices: Any, kind: int, stream: int, seed: int, scale: float, tensor_id: int) -> None:
    """rows[i] += scale u, where rows[i] is row indices[i] of the whole tensor."""
    u, a = np.array([seed], np.uint64), np.array([scale], np.float64 if kind == DOUBLE else np.float32)
    if kind in (FLOAT, DOUBLE):
        kernels.add_rows(rows, indices, stream, u, a, tensor_id)
    else:
        kernels.add_rows_half(rows, indices, kind, stream, u, a, tensor_id)


def round_half(out: Any, y: Any, kind: int, rounding_seed: int, tensor_id: int, start: int) -> Kernel:
    """A kernel that writes ranges of y (float32) into 16-bit `out`, at random so that the mean is y."""
    random = np.uint64(rounding_seed)
    return lambda lo, hi: kernels.round_half(out, y, kind, random, tensor_id, start, lo, hi)


def mask(out: Any, threshold: int, seed: int, tensor_id: int, start: int) -> Kernel:
    """A kernel that sets elements of `out` (float32) to zero where the mask stream says so."""
    limit, key = np.uint64(threshold), np.uint64(seed)
    return lambda lo, hi: kernels.mask(out, limit, key, tensor_id, start, lo, hi)
