"""The kernels of `native.c`, which the build compiles into this folder (see `hatch_build.py`).

There is a library for each width of vectors, named by a hash of its source and by its width; the widest that the
processor has is loaded. It is used only if it reproduces the specification on a sample. Nothing is compiled here, and
no library of another source is loaded: without the one that belongs to `native.c`, or with `ZOTUNE_NATIVE=0`, torch
operations (`eager.py`) serve, and a line in the log says why and what that costs.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zotune.noise import spec

_SOURCE = Path(__file__).with_name("native.c")
# By what torch says of the processor: the widths that it has, the widest first. torch builds kernels of its own for
# the same instructions; `ATEN_CPU_CAPABILITY` narrows both.
_WIDTHS = {"AVX2": ("avx2", "baseline"), "AVX512": ("avx512", "avx2", "baseline")}

_u64, _i64, _int, _p = ctypes.c_uint64, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p
_double = ctypes.c_double
# The last three of most: the index of the first element, how many there are, and how many threads.
_SIGNATURES = {
    "zotune_fill": (_p, _int, _u64, _u64, _u64, _i64, _int),
    "zotune_add": (_p, _p, _int, _int, _int, _p, _p, _int, _u64, _u64, _u64, _i64, _int),
    "zotune_foreach_axpy": (_int, _p, _p, _p, _p, _int, _int, _int, _p, _p, _int, _u64),
    "zotune_add_products": (_p, _p, _int, _int, _p, _p, _int, _i64, _p, _int, _u64, _u64, _u64, _i64, _int),
    "zotune_low_rank_matmul_add": (_p, _p, _int, _i64, _i64, _i64, _int, _int, _p, _p, _p, _p, _p, _u64, _int),
    "zotune_axpy_pair": (_p, _p, _p, _int, _int, _u64, _double, _u64, _u64, _i64, _int),
    "zotune_step": (_p, _p, _p, _p, _int, _int, _int, _int, _p, _int, _int, _p, _p, _int, _u64, _u64, _u64, _i64, _int),
    "zotune_add_rows": (_p, _p, _i64, _i64, _i64, _int, _int, _u64, _double, _u64),
    "zotune_mask": (_p, _u64, _u64, _u64, _u64, _i64, _int),
    "zotune_round": (_p, _p, _int, _int, _u64, _u64, _u64, _i64, _int),
}
# What the kernels call each dtype.
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_HALF = (torch.bfloat16, torch.float16)
# A step of zo_sgd on SmolLM2-135M in float32, batches of 4 sequences of 32 tokens, on one thread of a CPU with AVX2.
_COST = "a step takes 4 times as long with rademacher directions, 12 times with gaussian ones"
# A thread for every so many elements: fewer are made faster than a second thread is woken.
_THREAD_ELEMENTS = 1 << 14


@cache
def library() -> Any:
    """The loaded library; None where there is none, or none that reproduces the specification, which is then logged."""
    if os.environ.get("ZOTUNE_NATIVE") == "0":
        return None
    capability = torch.backends.cpu.get_cpu_capability()
    names = [f"native-{source_hash()}-{width}.so" for width in _WIDTHS.get(capability, ("baseline",))]
    found = [path for name in names if (path := _SOURCE.with_name(name)).is_file()]
    if not found:
        _log_loss(_why_missing())
        return None
    try:
        loaded = _loaded(found[0])
    except OSError as error:
        _log_loss(f"{found[0].name} cannot be loaded ({error})")
        return None
    if not _reproduces_the_specification(loaded):
        _log_loss(f"{found[0].name} gives other bits than the specification")
        return None
    return loaded


def source_hash() -> str:
    """The part of a library's name that says which `native.c` it was compiled from."""
    return hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:12]


def _why_missing() -> str:
    if any(_SOURCE.parent.glob("native-*.so")):
        return "native.c is not the one that the installed kernels were compiled from"
    return "zotune was installed without a C compiler"


def _log_loss(reason: str) -> None:
    """Say once a process (`library` is cached) that torch operations serve, why, what it costs and what to do."""
    logging.getLogger("zotune").warning(
        "zotune: torch operations replace the C kernels, to the same bits: %s (%s). To get the kernels, "
        "install a C compiler and then zotune again.",
        _COST,
        reason,
    )


def _loaded(path: Path) -> Any:
    """A library with its signatures. Its threads are those of the OpenMP runtime that torch has loaded for all."""
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError:  # a torch without OpenMP
        ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
        loaded = ctypes.CDLL(str(path))
    for name, types in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = types, None
    return loaded


def _reproduces_the_specification(loaded: Any) -> bool:
    """Samplers, products, mask and both kinds of rounding, on samples that begin and end within blocks and tiles."""
    seed, tensor_id, start, n = 2**63 + 5, 7 << 32 | 7, 130, 5000
    place = (seed, tensor_id, start, n, 2)
    samplers = ((spec.RADEMACHER, spec.rademacher), (spec.GAUSSIAN, spec.gaussian))
    for stream, specified in samplers:
        out = np.empty(n, np.float32)
        loaded.zotune_fill(_at(out), stream, *place)
        if not np.array_equal(out, specified(seed, tensor_id, start, start + n)):
            return False
    left, right = np.ascontiguousarray(out[:15].reshape(5, 3)), out[:2700].reshape(900, 3)
    product, room = spec.low_rank(left, right).ravel()[130:], np.zeros(4370, np.float32)
    left = left * np.float32(1 / np.sqrt(3))
    x, *factors = map(torch.from_numpy, (room, left, right))
    _add_products(loaded, x, x, [factors], [0.7], tensor_id, 130, None, spec.ROUNDING)
    if not np.array_equal(room, np.float32(0.7) * product):
        return False
    expected = np.where(spec.masked(seed, tensor_id, start, start + n, 1 << 30), np.float32(0), out)
    loaded.zotune_mask(_at(out), 1 << 30, *place)
    if not np.array_equal(out, expected):
        return False
    # From below the least subnormal number of either format to beyond the largest of float16.
    out *= np.exp2(np.linspace(-40, 17, n, dtype=np.float32))
    for rounding, numbers in ((spec.ROUNDING, spec.random16), (spec.PROBE, spec.probe16)):
        random = numbers(seed, tensor_id, start, start + n)
        for kind, dtype in ((1, "bfloat16"), (2, "float16")):
            bits = np.empty(n, np.uint16)
            loaded.zotune_round(_at(bits), _at(out), kind, rounding, *place)
            if not np.array_equal(bits, spec.round_stochastically(out, random, dtype)):
                return False
    return _takes_steps(loaded, spec.rademacher(seed, tensor_id, start, start + n), place)


def _takes_steps(loaded: Any, u: Any, place: tuple[int, ...]) -> bool:
    """Whether a second step of Adam, with each of its constants in play, comes out as by separate operations."""
    seed, tensor_id, start, n, threads = place
    m, v = np.linspace(-2, 2, n, dtype=np.float32), np.linspace(0, 3, n, dtype=np.float32)
    x, g = m * m, u * np.float32(0.3)
    k = np.array([0.9, 0.1, 0.99, 0.01, 0.19, 0.0199, 1e-8, 0.999, 1e-2], np.float32)
    beta1, rest1, beta2, rest2, bias1, bias2, eps, keep, rate = k
    new_m, new_v = beta1 * m + rest1 * g, beta2 * v + rest2 * (g * g)
    expected = x * keep - rate * ((new_m / bias1) / (np.sqrt(new_v / bias2) + eps))
    u64, double = _u64(seed), _double(0.3)
    terms = (spec.RADEMACHER, 1, ctypes.addressof(u64), ctypes.addressof(double))
    how = (0, 1, 0, 1, _at(k))
    loaded.zotune_step(_at(x), _at(m), _at(v), None, *how, *terms, 0, 0, tensor_id, start, n, threads)
    return all(np.array_equal(a, b) for a, b in ((x, expected), (m, new_m), (v, new_v)))


def _at(array: Any) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _threads(size: int) -> int:
    return max(1, min(torch.get_num_threads(), size // _THREAD_ELEMENTS))


def _span(x: Tensor, tensor_id: int, start: int) -> tuple[int, int, int, int]:
    """Which elements of which tensor x holds, and on how many threads they are made."""
    size = x.numel()
    return tensor_id, start, size, _threads(size)


def _terms(seeds: Sequence[int], scales: Sequence[float]) -> tuple[int, Any, Any]:
    q = len(seeds)
    return q, (_u64 * q)(*seeds), (_double * q)(*scales)


def _rounding(dtype: torch.dtype, rounding_seed: int | None, stream: int) -> tuple[int, int]:
    """The stream that results are rounded by, and its seed; 0 for to nearest, as single and double precision are."""
    return (0, 0) if rounding_seed is None or dtype not in _HALF else (stream, rounding_seed)


def fill(out: Tensor, stream: int, seed: int, tensor_id: int, start: int) -> None:
    """As `noise.fill`."""
    library().zotune_fill(out.data_ptr(), stream, seed, *_span(out, tensor_id, start))


def add(
    out: Tensor,
    x: Tensor,
    stream: int,
    seeds: Sequence[int],
    scales: Sequence[float],
    tensor_id: int,
    start: int,
    rounding_seed: int | None,
    rounding: int = spec.ROUNDING,
) -> None:
    """As `noise.add`."""
    rest = (*_terms(seeds, scales), *_rounding(x.dtype, rounding_seed, rounding), *_span(x, tensor_id, start))
    library().zotune_add(out.data_ptr(), x.data_ptr(), _KINDS[x.dtype], stream, *rest)


def foreach_axpy_(
    xs: Sequence[Tensor],
    tensor_ids: Sequence[int],
    stream: int,
    seeds: Sequence[int],
    scales: Sequence[float],
    rounding_seed: int | None,
    rounding: int = spec.ROUNDING,
) -> None:
    """As `noise.foreach_axpy_`: one call."""
    n, dtype = len(xs), xs[0].dtype
    addresses, sizes = (_p * n)(*(x.data_ptr() for x in xs)), (_i64 * n)(*(x.numel() for x in xs))
    rest = (_KINDS[dtype], stream, *_terms(seeds, scales), *_rounding(dtype, rounding_seed, rounding))
    threads = (_int * n)(*map(_threads, sizes))
    library().zotune_foreach_axpy(n, addresses, (_u64 * n)(*tensor_ids), sizes, threads, *rest)


def add_products(
    out: Tensor,
    x: Tensor,
    factors: Sequence[tuple[Tensor, Tensor]],
    scales: Sequence[float],
    tensor_id: int,
    start: int,
    rounding_seed: int | None,
    rounding: int = spec.ROUNDING,
) -> None:
    """As `noise.add_products`."""
    _add_products(library(), out, x, factors, scales, tensor_id, start, rounding_seed, rounding)


def _add_products(
    loaded: Any,
    out: Tensor,
    x: Tensor,
    factors: Sequence[Sequence[Tensor]],
    scales: Sequence[float],
    tensor_id: int,
    start: int,
    rounding_seed: int | None,
    rounding: int,
) -> None:
    q, (columns, rank) = len(scales), factors[0][1].shape
    # Bᵀ, so that a row of U is made of rows.
    lefts, rights = zip(*((left, right.t().contiguous()) for left, right in factors), strict=True)
    where = [(_p * q)(*(t.data_ptr() for t in side)) for side in (lefts, rights)]
    rest = (*_rounding(x.dtype, rounding_seed, rounding), *_span(x, tensor_id, start))
    terms = (q, *where, rank, columns, (_double * q)(*scales))
    loaded.zotune_add_products(out.data_ptr(), x.data_ptr(), _KINDS[x.dtype], *terms, *rest)


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
    """As `noise.step`."""
    stream, seeds, scales = terms
    addresses = [*(state.data_ptr() for state in states), None, None][:3]
    how = (_KINDS[x.dtype], rule, first, writes, _at(constants), stream, *_terms(seeds, scales))
    rest = (*_rounding(x.dtype, rounding_seed, spec.ROUNDING), *_span(x, tensor_id, start))
    library().zotune_step(x.data_ptr(), *addresses, *how, *rest)


def low_rank_matmul_add_(
    out: Tensor,
    x: Tensor,
    factors: Sequence[tuple[Tensor, Tensor]],
    scales: Sequence[float],
    biases: Tensor | None,
    rounding_seeds: Sequence[int] | None,
    tensor_id: int,
) -> None:
    """As `noise.low_rank_matmul_add_`."""
    q, rank, shape = len(scales), factors[0][0].shape[1], (out.shape[0], out.shape[1], x.shape[1])
    if rank > 1:  # else the one column lies in memory as a row does
        factors = [(left.t().contiguous(), right.t().contiguous()) for left, right in factors]
    lefts, rights = ((_p * q)(*(pair[side].data_ptr() for pair in factors)) for side in (0, 1))
    own = None if biases is None else biases.float().contiguous()
    where = (lefts, rights, (_double * q)(*scales), None if own is None else own.data_ptr())
    seeds = None if rounding_seeds is None else (_u64 * q)(*rounding_seeds)
    rest = (q, rank, *where, seeds, tensor_id, _threads(shape[0] * (shape[1] + shape[2])))
    library().zotune_low_rank_matmul_add(out.data_ptr(), x.data_ptr(), _KINDS[x.dtype], *shape, *rest)


def axpy_pair(
    plus: Tensor, minus: Tensor, x: Tensor, stream: int, seed: int, scale: float, tensor_id: int, start: int
) -> None:
    """As `noise.axpy_pair`."""
    if x.dtype == torch.float64:
        for out, a in ((plus, scale), (minus, -scale)):
            add(out, x, stream, [seed], [a], tensor_id, start, None)
        return
    rest = (_KINDS[x.dtype], stream, seed, scale, *_span(x, tensor_id, start))
    library().zotune_axpy_pair(plus.data_ptr(), minus.data_ptr(), x.data_ptr(), *rest)


def add_rows(rows: Tensor, indices: Tensor, stream: int, seed: int, scale: float, tensor_id: int) -> None:
    """As `noise.add_rows`."""
    indices = indices.contiguous()
    size = (rows.data_ptr(), indices.data_ptr(), *rows.shape, rows.stride(0) * rows.element_size())
    library().zotune_add_rows(*size, _KINDS[rows.dtype], stream, seed, scale, tensor_id)


def round_half(
    out: Tensor, y: Tensor, rounding_seed: int, tensor_id: int, start: int, rounding: int = spec.ROUNDING
) -> None:
    """As `noise.round_to`, at random."""
    rest = (_KINDS[out.dtype], rounding, rounding_seed, *_span(y, tensor_id, start))
    library().zotune_round(out.data_ptr(), y.data_ptr(), *rest)


def mask(out: Tensor, threshold: int, seed: int, tensor_id: int, start: int) -> None:
    """As `noise.mask`; the threshold is that of the mask stream's words."""
    library().zotune_mask(out.data_ptr(), threshold, seed, *_span(out, tensor_id, start))
