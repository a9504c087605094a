"""The CPU's kernels by numba, where no C compiler is at hand: which of them serves which dtype and rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch

from zotune.noise import kernels
from zotune.noise.kernels import DOUBLE, FLOAT

# A range shorter than this is not worth handing to a second thread.
_THREAD_ELEMENTS = 1 << 17
# Ranges start at multiples of this, so that no block of noise is made twice.
_ALIGNMENT = 1024


def fill(out: Any, stream: int, seed: int, tensor_id: int, start: int) -> None:
    """Fill `out` (float32) with elements start, start + 1, … of a direction."""
    key = np.uint64(seed)
    _parallel(lambda lo, hi: kernels.fill(out, stream, key, tensor_id, start, lo, hi), out.size)


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
) -> None:
    """Out = x + Σ scales[i] uᵢ; 16-bit results at random if given a seed, else to nearest."""
    u, a = np.array(seeds, np.uint64), np.array(scales, np.float64 if kind == DOUBLE else np.float32)

    def run(lo: int, hi: int) -> None:
        if kind in (FLOAT, DOUBLE):
            kernels.add(out, x, stream, u, a, tensor_id, start, lo, hi)
        elif rounding_seed is None:
            kernels.add_half(out, x, kind, stream, u, a, tensor_id, start, lo, hi)
        else:
            random = np.uint64(rounding_seed)
            kernels.add_half_stochastic(out, x, kind, stream, u, a, random, tensor_id, start, lo, hi)

    _parallel(run, x.size)


def add_both(
    plus: Any, minus: Any, x: Any, kind: int, stream: int, seed: int, scale: float, tensor_id: int, start: int
) -> None:
    """Plus = x + scale · u and minus = x - scale · u."""
    for out, a in ((plus, scale), (minus, -scale)):
        add(out, x, kind, stream, [seed], [a], None, tensor_id, start)


def add_rows(rows: Any, indices: Any, kind: int, stream: int, seed: int, scale: float, tensor_id: int) -> None:
    """rows[i] += scale u, where rows[i] is row indices[i] of the whole tensor."""
    u, a = np.array([seed], np.uint64), np.array([scale], np.float64 if kind == DOUBLE else np.float32)
    if kind in (FLOAT, DOUBLE):
        kernels.add_rows(rows, indices, stream, u, a, tensor_id)
    else:
        kernels.add_rows_half(rows, indices, kind, stream, u, a, tensor_id)


def round_half(out: Any, y: Any, kind: int, rounding_seed: int, tensor_id: int, start: int) -> None:
    """Write y (float32) into 16-bit `out`, at random so that the mean is y."""
    random = np.uint64(rounding_seed)
    _parallel(lambda lo, hi: kernels.round_half(out, y, kind, random, tensor_id, start, lo, hi), y.size)


def mask(out: Any, threshold: int, seed: int, tensor_id: int, start: int) -> None:
    """Set elements of `out` (float32) to zero where the mask stream says so."""
    limit, key = np.uint64(threshold), np.uint64(seed)
    _parallel(lambda lo, hi: kernels.mask(out, limit, key, tensor_id, start, lo, hi), out.size)


@cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="zotune-noise")


def _parallel(kernel: Callable[[int, int], None], size: int) -> None:
    """Run kernel(lo, hi) over [0, size), split among as many threads as torch uses."""
    num_threads = min(torch.get_num_threads(), -(-size // _THREAD_ELEMENTS))
    if num_threads <= 1:
        kernel(0, size)
        return
    step = -(-size // (num_threads * _ALIGNMENT)) * _ALIGNMENT
    ranges = [(lo, min(lo + step, size)) for lo in range(0, size, step)]
    others = [_pool(num_threads - 1).submit(kernel, lo, hi) for lo, hi in ranges[1:]]
    kernel(*ranges[0])
    for other in others:
        other.result()
