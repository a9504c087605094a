"""Counter-based noise on torch tensors: one interface over the kernels of each device.

`fill` makes a part of a direction, `add` moves weights along a few directions in one pass, `round_to`
writes float32 numbers into half-precision weights without bias. Tensors here are flat and contiguous;
`start` is the index of their first element within the whole tensor T that `tensor_id` names.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from zotune.noise.back_ends import EAGER, HALF, back_end
from zotune.noise.spec import GAUSSIAN as GAUSSIAN
from zotune.noise.spec import NOISE_VERSION as NOISE_VERSION
from zotune.noise.spec import RADEMACHER as RADEMACHER
from zotune.noise.spec import derive_seed as derive_seed


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which weights of `dtype` are moved: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fill(out: Tensor, stream: int, seed: int, tensor_id: int, start: int = 0) -> None:
    """Fill `out` (float32) with elements start, start + 1, … of the direction `seed` for tensor `tensor_id`."""
    _kernels("fill", out).fill(out, stream, seed, tensor_id, start)


def mask(out: Tensor, sparsity: float, seed: int, tensor_id: int, start: int = 0) -> None:
    """Set elements start, start + 1, … of tensor `tensor_id` in `out` (float32) to zero with probability `sparsity`."""
    _kernels("mask", out).mask(out, round(sparsity * 2**32), seed, tensor_id, start)


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
    _kernels("add", x).add(out, x, stream, seeds, scales, tensor_id, start, rounding_seed)


def axpy_pair(
    plus: Tensor, minus: Tensor, x: Tensor, stream: int, seed: int, scale: float, tensor_id: int, start: int = 0
) -> None:
    """Write x + scale · u and x - scale · u, to the bits of `add`; x is read and u is made but once."""
    _kernels("axpy_pair", x).axpy_pair(plus, minus, x, stream, seed, scale, tensor_id, start)


def foreach_axpy_(
    xs: Sequence[Tensor],
    tensor_ids: Sequence[int],
    stream: int,
    seeds: Sequence[int],
    scales: Sequence[float],
    rounding_seed: int | None = None,
) -> None:
    """As `add` in place for whole tensors of one device and dtype: in one launch, or call of the C kernels."""
    _kernels("foreach_axpy_", xs[0]).foreach_axpy_(xs, tensor_ids, stream, seeds, scales, rounding_seed)


def adds_products(device: torch.device) -> bool:
    """Whether there is a kernel for `add_products` on a device."""
    return back_end(device).has("add_products", torch.float32)


def add_products(
    out: Tensor,
    x: Tensor,
    factors: Sequence[tuple[Tensor, Tensor]],
    scales: Sequence[float],
    tensor_id: int,
    start: int = 0,
    rounding_seed: int | None = None,
) -> None:
    """As `add`, where uᵢ is a matrix of low rank; see `spec.low_rank`.

    Of each term `factors` holds Aᵢ/√r, of those rows that the elements of x are in, and Bᵢ: (rows, r) and (columns, r),
    contiguous, float32.
    """
    _kernels("add_products", x).add_products(out, x, factors, scales, tensor_id, start, rounding_seed)


def has_steps(x: Tensor) -> bool:
    """Whether `step` can be taken with x."""
    return back_end(x.device).has("step", x.dtype)


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
    """One step of a rule with a state, in place; see `zotune.apply.fused`. Only where `has_steps`.

    The `states` of the rule are float32 and as large as x; `terms` are stream, seeds and scales of the directions.
    If it is the `first` step, the state begins here, whatever is in `states`; unless it `writes`, x stays.
    """
    _kernels("step", x).step(
        x, states, rule, constants, terms, rounding_seed, tensor_id, start, first=first, writes=writes
    )


def has_low_rank_matmul_add(out: Tensor, x: Tensor) -> bool:
    """Whether `low_rank_matmul_add_` has a kernel for tensors like these."""
    alike = x.dtype == out.dtype and x.is_contiguous() and out.is_contiguous()
    return alike and back_end(out.device).has("low_rank_matmul_add_", x.dtype)


def low_rank_matmul_add_(
    out: Tensor,
    x: Tensor,
    factors: Sequence[tuple[Tensor, Tensor]],
    scales: Sequence[float],
    biases: Tensor | None = None,
) -> None:
    """Add to each of equal shares of out (rows, m) that of x (rows, n) times a right leftᵀ.

    Only where `has_low_rank_matmul_add`.

    Of each share `factors` holds left (m, r) and right (n, r), float32 and contiguous, `scales` a, and `biases`
    (shares, m) what is added to each of its rows besides. Sums are float32.
    """
    _kernels("low_rank_matmul_add_", x).low_rank_matmul_add_(out, x, factors, scales, biases)


def add_rows(rows: Tensor, indices: Tensor, stream: int, seed: int, scale: float, tensor_id: int) -> None:
    """rows[i] += scale · u for rows of a matrix, where rows[i] is its row indices[i]."""
    _kernels("add_rows", rows).add_rows(rows, indices.long(), stream, seed, scale, tensor_id)


def round_to(out: Tensor, y: Tensor, rounding_seed: int | None, tensor_id: int, start: int = 0) -> None:
    """Write y into `out`: rounded to nearest, or for half precision at random without bias if given a seed."""
    if out.dtype not in HALF or rounding_seed is None:
        out.copy_(y)
    else:
        _kernels("round_half", out).round_half(out, y, rounding_seed, tensor_id, start)


def _kernels(function: str, t: Tensor) -> ModuleType:
    """The module with a function for tensors like t: of the back end of its device, or of torch operations."""
    serving = back_end(t.device)
    return serving.kernels if serving.has(function, t.dtype) else EAGER.kernels
