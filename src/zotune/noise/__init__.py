"""Counter-based noise on torch tensors: one interface over the kernels of each device.

`fill` makes a part of a direction, `add` moves weights along a few directions in one pass, `round_to`
writes float32 numbers into half-precision weights without bias. Tensors here are flat and contiguous;
`start` is the index of their first element within the whole tensor T that `tensor_id` names. Half-precision results
are rounded by a stream of random numbers: `ROUNDING` for updates, `PROBE` for probes, whose seed is their direction's.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from zotune.noise import checks, eager
from zotune.noise.back_ends import EAGER, back_end
from zotune.noise.checks import HALF as HALF
from zotune.noise.checks import SINGLE, check_alike, check_factors, check_readable, check_rows, check_span
from zotune.noise.spec import GAUSSIAN as GAUSSIAN
from zotune.noise.spec import NOISE_VERSION as NOISE_VERSION
from zotune.noise.spec import PROBE as PROBE
from zotune.noise.spec import RADEMACHER as RADEMACHER
from zotune.noise.spec import ROUNDING as ROUNDING
from zotune.noise.spec import derive_seed as derive_seed


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which weights of `dtype` are moved: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fill(out: Tensor, stream: int, seed: int, tensor_id: int, start: int = 0) -> None:
    """Fill `out` (float32) with elements start, start + 1, … of the direction `seed` for tensor `tensor_id`."""
    check_readable("fill", out, SINGLE)
    _kernels("fill", out).fill(out, stream, seed, tensor_id, start)


def mask(out: Tensor, sparsity: float, seed: int, tensor_id: int, start: int = 0) -> None:
    """Set elements start, start + 1, … of tensor `tensor_id` in `out` (float32) to zero with probability `sparsity`."""
    check_readable("mask", out, SINGLE)
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
    rounding: int = ROUNDING,
) -> None:
    """Write x + Σ scales[i] uᵢ into `out`, which may be `x`, in one pass.

    The sum is taken in float32 (float64 for float64 weights) before it is added. Half-precision results
    are rounded to nearest even, or at random without bias, by the stream `rounding`, if a `rounding_seed` is given.
    """
    check_alike("add", x, out)
    check_span("add", start, seeds, scales)
    _kernels("add", x).add(out, x, stream, seeds, scales, tensor_id, start, rounding_seed, rounding)


def axpy_pair(
    plus: Tensor, minus: Tensor, x: Tensor, stream: int, seed: int, scale: float, tensor_id: int, start: int = 0
) -> None:
    """Write x + scale · u and x - scale · u, to the bits of `add`; x is read and u is made but once.

    Half-precision results are rounded without bias, by the same numbers of the probe stream.
    """
    check_alike("axpy_pair", x, plus, minus)
    check_span("axpy_pair", start, (seed,), (scale,))
    if x.data_ptr() in (plus.data_ptr(), minus.data_ptr()) and x.numel() and not x.is_meta:
        raise checks.refuse("axpy_pair", "an end of the pair would be written over x")
    _kernels("axpy_pair", x).axpy_pair(plus, minus, x, stream, seed, scale, tensor_id, start)


def foreach_axpy_(
    xs: Sequence[Tensor],
    tensor_ids: Sequence[int],
    stream: int,
    seeds: Sequence[int],
    scales: Sequence[float],
    rounding_seed: int | None = None,
    rounding: int = ROUNDING,
) -> None:
    """As `add` in place for whole tensors of one device and dtype: in one launch, or call of the C kernels."""
    check_span("foreach_axpy_", 0, seeds, scales)
    for x in xs:
        check_readable("foreach_axpy_", x)
    if len(tensor_ids) != len(xs) or len({(x.dtype, x.device) for x in xs}) != 1:
        raise checks.refuse("foreach_axpy_", "its tensors are not of one dtype and device, with an id each")
    _kernels("foreach_axpy_", xs[0]).foreach_axpy_(xs, tensor_ids, stream, seeds, scales, rounding_seed, rounding)


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
    rounding: int = ROUNDING,
) -> None:
    """As `add`, where uᵢ is a matrix of low rank; see `spec.low_rank`.

    Of each term `factors` holds Aᵢ/√r, of those rows that the elements of x are in, and Bᵢ: (rows, r) and (columns, r),
    contiguous, float32.
    """
    check_alike("add_products", x, out)
    columns = factors[0][1].shape[0] if factors else 0
    rows = (start + x.numel() - 1) // columns - start // columns + 1 if columns and x.numel() else 0
    check_factors("add_products", x, factors, scales, rows, columns)
    check_span("add_products", start, scales, scales)  # type: ignore[arg-type]
    if x.numel():
        place = tensor_id, start, rounding_seed, rounding
        _kernels("add_products", x).add_products(out, x, factors, scales, *place)


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
    check_readable("step", x)
    checks.check_states("step", x, states)
    check_span("step", start, *terms[1:])
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
    rounding_seeds: Sequence[int] | None = None,
    tensor_id: int = 0,
) -> None:
    """Add to each of equal shares of out (rows, m) that of x (rows, n) times a right leftᵀ.

    Only where `has_low_rank_matmul_add`.

    Of each share `factors` holds left (m, r) and right (n, r), float32 and contiguous, `scales` a, and `biases`
    (shares, m) what is added to each of its rows besides. Sums are float32. Half-precision results are rounded to
    nearest even, or without bias by the probe stream of a share's `rounding_seeds`, each element at its place in the
    share.
    """
    name = "low_rank_matmul_add_"
    for matrix in (out, x):
        check_readable(name, matrix)
    same = out.dtype == x.dtype and out.device == x.device and out.dim() == x.dim() == 2 and len(out) == len(x)
    if not same or not factors or len(out) % len(factors):
        raise checks.refuse(name, f"{len(factors)} equal shares of a product do not fit its tensors")
    check_factors(name, x, factors, scales, out.shape[1], x.shape[1])
    if biases is not None and (biases.shape != (len(factors), out.shape[1]) or biases.device != out.device):
        raise checks.refuse(name, "a bias is not as wide as the product, or on another device")
    checks.check_overlap(name, (out, x))
    if out.numel():
        _kernels(name, x).low_rank_matmul_add_(out, x, factors, scales, biases, rounding_seeds, tensor_id)


def add_rows(rows: Tensor, indices: Tensor, stream: int, seed: int, scale: float, tensor_id: int) -> None:
    """rows[i] += scale · u for rows of a matrix, where rows[i] is its row indices[i].

    Half-precision results are rounded without bias by the probe stream.
    """
    indices = indices.long()
    check_rows("add_rows", rows, indices)
    _kernels("add_rows", rows).add_rows(rows, indices, stream, seed, scale, tensor_id)


def round_to(
    out: Tensor, y: Tensor, rounding_seed: int | None, tensor_id: int, start: int = 0, rounding: int = ROUNDING
) -> None:
    """Write y into `out`: rounded to nearest, or for half precision at random without bias if given a seed."""
    at_random = out.dtype in HALF and rounding_seed is not None
    check_readable("round_to", out)
    check_readable("round_to", y, SINGLE if at_random else checks.FLOATING)
    if out.device != y.device or out.numel() != y.numel() or start < 0:
        raise checks.refuse("round_to", f"{tuple(y.shape)} on {y.device} is not {tuple(out.shape)} on {out.device}")
    if not at_random or rounding_seed is None:
        out.copy_(y)
        return
    _kernels("round_half", out).round_half(out, y, rounding_seed, tensor_id, start, rounding)


def round_rows(rows: Tensor, y: Tensor, indices: Tensor, seed: int, tensor_id: int) -> None:
    """Write y into rows of a matrix, where rows[i] is its row indices[i]; half precision by the probe stream of u."""
    if rows.dtype not in HALF:
        rows.copy_(y)
        return
    indices = indices.long()
    check_rows("round_rows", rows, indices)
    check_readable("round_rows", y, SINGLE)
    if y.shape != rows.shape or y.device != rows.device:
        raise checks.refuse("round_rows", f"{tuple(y.shape)} on {y.device} is not {tuple(rows.shape)} on {rows.device}")
    eager.round_rows(rows, y, indices, seed, tensor_id)


def _kernels(function: str, t: Tensor) -> ModuleType:
    """The module with a function for tensors like t: of the back end of its device, or of torch operations."""
    serving = back_end(t.device)
    return serving.kernels if serving.has(function, t.dtype) else EAGER.kernels
