"""Counter-based noise on torch tensors: one interface over the kernels of each device.

`fill` makes a part of a direction, `add` moves weights along a few directions in one pass, `round_to`
writes float32 numbers into half-precision weights without bias. Tensors here are flat and contiguous;
`start` is the index of their first element within the whole tensor T that `tensor_id` names.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from zotune.noise import eager
from zotune.noise.reference import GAUSSIAN as GAUSSIAN
from zotune.noise.reference import NOISE_VERSION as NOISE_VERSION
from zotune.noise.reference import RADEMACHER as RADEMACHER
from zotune.noise.reference import derive_seed as derive_seed

# What the kernels call each dtype.
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_HALF = (torch.bfloat16, torch.float16)

# What the torch fallback makes at a time: bounds its temporaries to some ten megabytes.
_EAGER_ELEMENTS = 1 << 18


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which weights of `dtype` are moved: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fill(out: Tensor, stream: int, seed: int, tensor_id: int, start: int = 0) -> None:
    """Fill `out` (float32) with elements start, start + 1, … of the direction `seed` for tensor `tensor_id`."""
    if out.device.type == "cpu":
        _cpu().fill(_array(out), stream, seed, tensor_id, start)
        return
    for lo in range(0, out.numel(), _EAGER_ELEMENTS):
        eager.fill(out[lo : lo + _EAGER_ELEMENTS], stream, seed, tensor_id, start + lo)


def mask(out: Tensor, sparsity: float, seed: int, tensor_id: int, start: int = 0) -> None:
    """Set elements start, start + 1, … of tensor `tensor_id` in `out` (float32) to zero with probability `sparsity`."""
    threshold = round(sparsity * 2**32)
    if out.device.type == "cpu":
        _cpu().mask(_array(out), threshold, seed, tensor_id, start)
        return
    for lo in range(0, out.numel(), _EAGER_ELEMENTS):
        eager.mask(out[lo : lo + _EAGER_ELEMENTS], threshold, seed, tensor_id, start + lo)


def add(
    out: Tensor,
    x: Tensor,
    stream: int,
    seeds: Sequence[int],
    scales: Sequence[float],
    tensor_id: int,
    start: int = 0,
    rounding_seed: int | None = None,
) -> None:
    """Write x + Σ scales[i] uᵢ into `out`, which may be `x`, in one pass.

    The sum is taken in float32 (float64 for float64 weights) before it is added. Half-precision results
    are rounded to nearest even, or at random without bias if a `rounding_seed` is given.
    """
    if x.device.type != "cpu":
        _add_eagerly(out, x, stream, seeds, scales, tensor_id, start, rounding_seed)
        return
    kind = _KINDS[x.dtype]
    _cpu().add(_array(out), _array(x), kind, stream, seeds, scales, rounding_seed, tensor_id, start)


def add_both(
    plus: Tensor, minus: Tensor, x: Tensor, stream: int, seed: int, scale: float, tensor_id: int, start: int = 0
) -> None:
    """Write x + scale · u and x - scale · u, to the bits of `add`; x is read and u is made but once."""
    if x.device.type == "cpu":
        arrays = _array(plus), _array(minus), _array(x)
        _cpu().add_both(*arrays, _KINDS[x.dtype], stream, seed, scale, tensor_id, start)
        return
    for out, a in ((plus, scale), (minus, -scale)):
        _add_eagerly(out, x, stream, [seed], [a], tensor_id, start, None)


def add_rows(rows: Tensor, indices: Tensor, stream: int, seed: int, scale: float, tensor_id: int) -> None:
    """rows[i] += scale · u for rows of a matrix on the CPU, where rows[i] is its row indices[i]."""
    _cpu().add_rows(_array(rows), indices.long().numpy(), _KINDS[rows.dtype], stream, seed, scale, tensor_id)


def round_to(out: Tensor, y: Tensor, rounding_seed: int | None, tensor_id: int, start: int = 0) -> None:
    """Write y into `out`: rounded to nearest, or for half precision at random without bias if given a seed."""
    if out.dtype not in _HALF or rounding_seed is None:
        out.copy_(y)
    elif out.device.type == "cpu":
        _cpu().round_half(_array(out), _array(y), _KINDS[out.dtype], rounding_seed, tensor_id, start)
    else:
        eager.round_half(out, y, rounding_seed, tensor_id, start)


def _add_eagerly(
    out: Tensor,
    x: Tensor,
    stream: int,
    seeds: Sequence[int],
    scales: Sequence[float],
    tensor_id: int,
    start: int,
    rounding_seed: int | None,
) -> None:
    dtype = compute_dtype(x.dtype)
    for lo in range(0, x.numel(), _EAGER_ELEMENTS):
        part = slice(lo, min(lo + _EAGER_ELEMENTS, x.numel()))
        u = torch.empty(part.stop - lo, dtype=torch.float32, device=x.device)
        # -0 is what leaves every first term as it is, its sign included; 0 + -0 would be 0.
        total = torch.full((part.stop - lo,), -0.0, dtype=dtype, device=x.device)
        for seed, scale in zip(seeds, scales, strict=True):
            eager.fill(u, stream, seed, tensor_id, start + lo)
            # Two operations, not one with alpha: a fused multiply-add would round once instead of twice.
            total += u.to(dtype) * torch.tensor(scale, dtype=dtype, device=x.device)
        round_to(out[part], x[part].to(dtype) + total, rounding_seed, tensor_id, start + lo)


@cache
def _cpu() -> ModuleType:
    """The CPU's kernels, at their first use: in C where there is a compiler, else numba's."""
    from zotune.noise import native

    if native.library() is not None:
        return native
    from zotune.noise import cpu

    return cpu


def _array(t: Tensor) -> Any:
    """A NumPy view; 16-bit floats as their bit patterns."""
    return (t.view(torch.uint16) if t.dtype in _HALF else t).numpy()
