"""The CPU's kernels by numba, where no C compiler is at hand: which of them serves which dtype and rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zotune.noise import kernels
from zotune.noise.kernels import BFLOAT16, DOUBLE, FLOAT, FLOAT16

# What the kernels call each dtype.
_KINDS = {torch.float32: FLOAT, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16, torch.float64: DOUBLE}
_HALF = (torch.bfloat16, torch.float16)

# A range shorter than this is not worth handing to a second thread.
_THREAD_ELEMENTS = 1 << 17
# Ranges start at multiples of this, so that no block of noise is made twice.
_ALIGNMENT = 1024


def fill(out: Tensor, stream: int, seed: int, tensor_id: int, start: int) -> None:
    """As `noise.fill`."""
    array, key = out.numpy(), np.uint64(seed)
    _parallel(lambda lo, hi: kernels.fill(array, stream, key, tensor_id, start, lo, hi), array.size)


def add(
    out: Tensor,
    x: Tensor,
    stream: int,
    seeds: Sequence[int],
    scales: Sequence[float],
    tensor_id: int,
    start: int,
    rounding_seed: int | None,
) -> None:
    """As `noise.add`."""
    kind, to, given = _KINDS[x.dtype], _array(out), _array(x)
    u, a = np.array(seeds, np.uint64), np.array(scales, np.float64 if kind == DOUBLE else np.float32)

    def run(lo: int, hi: int) -> None:
        if kind in (FLOAT, DOUBLE):
            kernels.add(to, given, stream, u, a, tensor_id, start, lo, hi)
        elif rounding_seed is None:
            kernels.add_half(to, given, kind, stream, u, a, tensor_id, start, lo, hi)
        else:
            random = np.uint64(rounding_seed)
            kernels.add_half_stochastic(to, given, kind, stream, u, a, random, tensor_id, start, lo, hi)

    _parallel(run, given.size)


def add_both(
    plus: Tensor, minus: Tensor, x: Tensor, stream: int, seed: int, scale: float, tensor_id: int, start: int
) -> None:
    """As `noise.add_both`."""
    for out, a in ((plus, scale), (minus, -scale)):
        add(out, x, stream, [seed], [a], tensor_id, start, None)


def add_many(
    xs: Sequence[Tensor],
    tensor_ids: Sequence[int],
    stream: int,
    seeds: Sequence[int],
    scales: Sequence[float],
    rounding_seed: int | None,
) -> None:
    """As `noise.add_many`, one by one."""
    for x, tensor_id in zip(xs, tensor_ids, strict=True):
        add(x, x, stream, seeds, scales, tensor_id, 0, rounding_seed)


def add_rows(rows: Tensor, indices: Tensor, stream: int, seed: int, scale: float, tensor_id: int) -> None:
    """As `noise.add_rows`."""
    kind, array, places = _KINDS[rows.dtype], _array(rows), indices.numpy()
    u, a = np.array([seed], np.uint64), np.array([scale], np.float64 if kind == DOUBLE else np.float32)
    if kind in (FLOAT, DOUBLE):
        kernels.add_rows(array, places, stream, u, a, tensor_id)
    else:
        kernels.add_rows_half(array, places, kind, stream, u, a, tensor_id)


def round_half(out: Tensor, y: Tensor, rounding_seed: int, tensor_id: int, start: int) -> None:
    """As `noise.round_to`, at random."""
    kind, to, given, random = _KINDS[out.dtype], _array(out), y.numpy(), np.uint64(rounding_seed)
    _parallel(
        lambda lo, hi: kernels.round_half(to, given, kind, random, tensor_id, start, lo, hi),
        given.size,
    )


def mask(out: Tensor, threshold: int, seed: int, tensor_id: int, start: int) -> None:
    """As `noise.mask`; the threshold is that of the mask stream's words."""
    array, limit, key = out.numpy(), np.uint64(threshold), np.uint64(seed)
    _parallel(lambda lo, hi: kernels.mask(array, limit, key, tensor_id, start, lo, hi), array.size)


def _array(t: Tensor) -> Any:
    """A NumPy view; 16-bit floats as their bit patterns."""
    return (t.view(torch.uint16) if t.dtype in _HALF else t).numpy()


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
