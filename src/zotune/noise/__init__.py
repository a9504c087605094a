"""Counter-based noise on torch tensors: one interface over the kernels of each device.

`fill` makes a part of a direction, `add` moves weights along a few directions in one pass, `round_to`
writes float32 numbers into half-precision weights without bias. Tensors here are flat and contiguous;
`start` is the index of their first element within the whole tensor T that `tensor_id` names.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
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


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which weights of `dtype` are moved: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fill(out: Tensor, stream: int, seed: int, tensor_id: int, start: int = 0) -> None:
    """Fill `out` (float32) with elements start, start + 1, … of the direction `seed` for tensor `tensor_id`."""
    if (kernels := _accelerated(out)) is not None:
        kernels.fill(out, stream, seed, tensor_id, start)
    else:
        _cpu().fill(_array(out), stream, seed, tensor_id, start)


def mask(out: Tensor, sparsity: float, seed: int, tensor_id: int, start: int = 0) -> None:
    """Set elements start, start + 1, … of tensor `tensor_id` in `out` (float32) to zero with probability `sparsity`."""
    threshold = round(sparsity * 2**32)
    if (kernels := _accelerated(out)) is not None:
        kernels.mask(out, threshold, seed, tensor_id, start)
    else:
        _cpu().mask(_array(out), threshold, seed, tensor_id, start)


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
    if (kernels := _accelerated(x)) is not None:
        kernels.add(out, x, stream, seeds, scales, tensor_id, start, rounding_seed)
    else:
        kind = _KINDS[x.dtype]
        _cpu().add(_array(out), _array(x), kind, stream, seeds, scales, rounding_seed, tensor_id, start)


def add_both(
    plus: Tensor, minus: Tensor, x: Tensor, stream: int, seed: int, scale: float, tensor_id: int, start: int = 0
) -> None:
    """Write x + scale · u and x - scale · u, to the bits of `add`; x is read and u is made but once."""
    if (kernels := _accelerated(x)) is not None:
        kernels.add_both(plus, minus, x, stream, seed, scale, tensor_id, start)
    else:
        arrays = _array(plus), _array(minus), _array(x)
        _cpu().add_both(*arrays, _KINDS[x.dtype], stream, seed, scale, tensor_id, start)


def add_many(
    xs: Sequence[Tensor],
    tensor_ids: Sequence[int],
    stream: int,
    seeds: Sequence[int],
    scales: Sequence[float],
    rounding_seed: int | None = None,
) -> None:
    """As `add` in place for whole tensors of one device and dtype: on a GPU one launch for all of them."""
    if (kernels := _accelerated(xs[0])) is not None:
        kernels.add_many(xs, tensor_ids, stream, seeds, scales, rounding_seed)
        return
    for x, tensor_id in zip(xs, tensor_ids, strict=True):
        add(x, x, stream, seeds, scales, tensor_id, 0, rounding_seed)


def adds_products(device: torch.device) -> bool:
    """Whether there is a kernel for `add_products` on a device."""
    return device.type == "cpu" and hasattr(_cpu(), "add_products")


def add_products(
    out: Tensor,
    x: Tensor,
    factors: Sequence[tuple[Tensor, Tensor]],
    scales: Sequence[float],
    tensor_id: int,
    start: int = 0,
    rounding_seed: int | None = None,
) -> None:
    """As `add`, where uᵢ is a matrix of low rank; see `reference.low_rank`.

    Of each term `factors` holds Aᵢ/√r, of those rows that the elements of x are in, and Bᵢ: (rows, r) and (columns, r),
    contiguous, float32.
    """
    arrays = [(_array(left), _array(right)) for left, right in factors]
    _cpu().add_products(_array(out), _array(x), _KINDS[x.dtype], arrays, scales, rounding_seed, tensor_id, start)


def has_steps(x: Tensor) -> bool:
    """Whether `step` can be taken with x."""
    return x.device.type == "cpu" and x.dtype != torch.float64 and hasattr(_cpu(), "step")


def step(
    x: Tensor,
    states: Sequence[Tensor],
    rule: int,
    constants: Any,
    terms: tuple[int, Sequence[int], Sequence[float]],
    rounding_seed: int | None,
    tensor_id: int,
    start: int,
    *,
    first: bool,
    writes: bool,
) -> None:
    """One step of a rule with a state, in place; see `zotune.fused`. Only where `has_steps`.

    The `states` of the rule are float32 and as large as x; `terms` are stream, seeds and scales of the directions.
    If it is the `first` step, the state begins here, whatever is in `states`; unless it `writes`, x stays.
    """
    kind, arrays = _KINDS[x.dtype], [_array(s) for s in states]
    place = (terms, rounding_seed, tensor_id, start)
    _cpu().step(_array(x), arrays, kind, rule, constants, *place, first=first, writes=writes)


def adds_thin(out: Tensor, x: Tensor) -> bool:
    """Whether `add_thin` has a kernel for tensors like these."""
    alike = out.device.type == "cpu" and x.dtype == out.dtype and x.is_contiguous()
    return alike and x.dtype != torch.float64 and hasattr(_cpu(), "add_thin")


def add_thin(out: Tensor, x: Tensor, factors: Sequence[tuple[Tensor, Tensor]], scales: Sequence[float]) -> None:
    """Add to each of equal shares of out (rows, m) that of x (rows, n) times a right leftᵀ. Only where `adds_thin`.

    Of each share `factors` holds left (m, r) and right (n, r), float32 and contiguous, `scales` a. Sums are float32.
    """
    rank, shape = factors[0][0].shape[1], (out.shape[0], out.shape[1], x.shape[1])
    if rank > 1:  # else the one column lies in memory as a row does
        factors = [(left.t().contiguous(), right.t().contiguous()) for left, right in factors]
    _cpu().add_thin(out.data_ptr(), x.data_ptr(), _KINDS[x.dtype], shape, rank, factors, scales)


def add_rows(rows: Tensor, indices: Tensor, stream: int, seed: int, scale: float, tensor_id: int) -> None:
    """rows[i] += scale · u for rows of a matrix, where rows[i] is its row indices[i]."""
    if (kernels := _accelerated(rows)) is not None:
        kernels.add_rows(rows, indices, stream, seed, scale, tensor_id)
    else:
        _cpu().add_rows(_array(rows), indices.long().numpy(), _KINDS[rows.dtype], stream, seed, scale, tensor_id)


def round_to(out: Tensor, y: Tensor, rounding_seed: int | None, tensor_id: int, start: int = 0) -> None:
    """Write y into `out`: rounded to nearest, or for half precision at random without bias if given a seed."""
    if out.dtype not in _HALF or rounding_seed is None:
        out.copy_(y)
    elif (kernels := _accelerated(out)) is not None:
        kernels.round_half(out, y, rounding_seed, tensor_id, start)
    else:
        _cpu().round_half(_array(out), _array(y), _KINDS[out.dtype], rounding_seed, tensor_id, start)


def _accelerated(t: Tensor) -> ModuleType | None:
    """The kernels for a tensor's device; None for the CPU, whose kernels take arrays."""
    return None if t.device.type == "cpu" else _accelerator(t.device)


@cache
def _accelerator(device: torch.device) -> ModuleType:
    """A device's kernels, at their first use: Triton's on a GPU where they work, else torch operations."""
    if device.type == "cuda" and find_spec("triton") is not None:
        from zotune.noise import gpu

        if gpu.is_usable(device):
            return gpu
    return eager


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
