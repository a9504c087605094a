"""The Triton kernels on torch tensors: what is launched, and the small tables that a launch reads.

Nothing here waits for the device: what a kernel needs beyond its tensors travels by pinned memory. It is kept
there, so the table of a fixed set of tensors is made once, and the terms of a probe once for all its tensors.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from zotune.noise import spec
from zotune.noise import triton_kernels as kernels

# The benchmark's content keys of results of a CPU leave out this module.
COUNTS_FOR_RESULTS = "on cuda"
# Elements of a tile, of a tile of an embedding's row, and of what one program takes from a table.
_TILE, _ROW_TILE, _CHUNK = 4096, 1024, 1 << 15

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def fill(out: Tensor, stream: int, seed: int, tensor_id: int, start: int) -> None:
    """As `noise.fill`."""
    terms = _terms_on(out.device, (seed,), (1.0,), None)
    _launch(kernels.fill, out, _tiles(out, start), out, start, out.numel(), terms, *_halves(tensor_id), STREAM=stream)


def mask(out: Tensor, threshold: int, seed: int, tensor_id: int, start: int) -> None:
    """As `noise.mask`; the threshold is that of the mask stream's words."""
    terms = _terms_on(out.device, (seed,), (1.0,), None)
    _launch(kernels.mask, out, _tiles(out, start), out, start, out.numel(), threshold, terms, *_halves(tensor_id))


def round_half(
    out: Tensor, y: Tensor, rounding_seed: int, tensor_id: int, start: int, rounding: int = spec.ROUNDING
) -> None:
    """Out = y (float32) rounded at random to out's 16-bit dtype, so that the mean is y."""
    terms = _terms_on(out.device, (rounding_seed,), (1.0,), rounding_seed)
    arguments = _bits(out), y, start, y.numel(), terms, *_halves(tensor_id)
    _launch(kernels.round_half, out, _tiles(out, start), *arguments, **_rounding(out.dtype, rounding_seed, rounding))


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
    terms = _terms_on(x.device, tuple(seeds), tuple(scales), _seed_of_updates(seeds, rounding_seed, rounding))
    arguments = _bits(out), _bits(x), start, x.numel(), terms, len(seeds), *_halves(tensor_id)
    _launch(kernels.add, x, _tiles(x, start), *arguments, STREAM=stream, **_rounding(x.dtype, rounding_seed, rounding))


def axpy_pair(
    plus: Tensor, minus: Tensor, x: Tensor, stream: int, seed: int, scale: float, tensor_id: int, start: int
) -> None:
    """As `noise.axpy_pair`."""
    terms = _terms_on(x.device, (seed,), (scale,), None)
    arguments = _bits(plus), _bits(minus), _bits(x), start, x.numel(), terms, *_halves(tensor_id)
    options = _rounding(x.dtype, seed, spec.PROBE)
    _launch(kernels.axpy_pair, x, _tiles(x, start), *arguments, STREAM=stream, **options)


def foreach_axpy_(
    xs: Sequence[Tensor],
    tensor_ids: Sequence[int],
    stream: int,
    seeds: Sequence[int],
    scales: Sequence[float],
    rounding_seed: int | None,
    rounding: int = spec.ROUNDING,
) -> None:
    """As `noise.foreach_axpy_`: one launch."""
    device, dtype = xs[0].device, xs[0].dtype
    spans = tuple((x.data_ptr(), x.numel(), _signed(tensor_id)) for x, tensor_id in zip(xs, tensor_ids, strict=True))
    table = _chunks_on(device, spans, dtype.itemsize)
    own = _seed_of_updates(seeds, rounding_seed, rounding)
    arguments = table, _terms_on(device, tuple(seeds), tuple(scales), own), len(seeds)
    aligned = all(address % 16 == 0 for address, _, _ in spans)
    options = _rounding(dtype, rounding_seed, rounding)
    _launch(kernels.foreach_axpy_, table, (len(table),), *arguments, STREAM=stream, ALIGNED=aligned, **options)


def add_rows(rows: Tensor, indices: Tensor, stream: int, seed: int, scale: float, tensor_id: int) -> None:
    """As `noise.add_rows`."""
    count, width = rows.shape
    terms = _terms_on(rows.device, (seed,), (scale,), None)
    arguments = _bits(rows), indices, width, terms, *_halves(tensor_id)
    # A row may begin within a tile, and so reach into one more.
    grid = (count, -(-width // _ROW_TILE) + 1)
    options = _rounding(rows.dtype, seed, spec.PROBE)
    _launch(kernels.add_rows, rows, grid, *arguments, STREAM=stream, **options, TILE=_ROW_TILE)


def _launch(kernel: Any, on: Tensor, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    if 0 in grid:
        return
    options = {"TILE": _TILE, **constants, "num_warps": 8, "enable_fp_fusion": False}
    with torch.cuda.device_of(on):  # type: ignore[no-untyped-call]
        kernel[grid](*arguments, **options)


def _tiles(x: Tensor, start: int) -> tuple[int]:
    """How many tiles of the whole tensor the slice x, which begins at element `start`, touches."""
    return (-(-(start + x.numel()) // _TILE) - start // _TILE,)


def _rounding(dtype: torch.dtype, rounding_seed: int | None, stream: int) -> dict[str, Any]:
    """The dtype, and the stream that results are rounded by: 0 for results to nearest."""
    return {"KIND": _KINDS[dtype], "ROUNDING": 0 if dtype == torch.float32 or rounding_seed is None else stream}


def _seed_of_updates(seeds: Sequence[int], rounding_seed: int | None, stream: int) -> int | None:
    """The rounding seed of an update. A probe has none: it is rounded by the seed of its direction, in its place."""
    if stream != spec.PROBE:
        return rounding_seed
    if rounding_seed not in (None, seeds[0]):
        raise ValueError("the probe stream has the seed of the first direction")
    return None


def _bits(x: Tensor) -> Tensor:
    """16-bit floats as their bit patterns."""
    return x if x.dtype == torch.float32 else x.view(torch.uint16)


def _signed(word: int, bits: int = 64) -> int:
    """An unsigned word as the signed one of the same bits."""
    return word - (1 << bits) if word >> (bits - 1) else word


def _halves(tensor_id: int) -> tuple[int, int]:
    """The lower and the upper half of an id, signed: an argument's type must not depend on its value."""
    return _signed(tensor_id & 0xFFFFFFFF, 32), _signed(tensor_id >> 32, 32)


def _terms_on(
    device: torch.device, seeds: tuple[int, ...], scales: tuple[float, ...], rounding_seed: int | None
) -> Tensor:
    """The rounding seed, then seed and scale (the bits of a float32) of each term: int64, shape (1 + 2q,)."""
    words = [rounding_seed or 0]
    for seed, scale in zip(seeds, scales, strict=True):
        words += [seed, *struct.unpack("<I", struct.pack("<f", scale))]
    signed = tuple(_signed(word) for word in words)
    active = Rebinding.active
    return _cached_words(device, _stream(device), signed) if active is None else active.table(device, signed)


class Rebinding:
    """Tables of terms for a pass that is captured as a CUDA graph: a replay reads what was written to them since.

    Within this context the kernels read tables of its own. They are sent from pinned memory where a pass first asks for
    them, and a graph that captured the sending sends again at each replay. A pass that made them must have run before
    the one that is captured, for a capture allocates no pinned memory.
    """

    active: ClassVar[Rebinding | None] = None

    def __init__(self) -> None:
        self._tables: dict[tuple[torch.device, tuple[int, ...]], tuple[Tensor, Tensor]] = {}
        self._sent: set[tuple[torch.device, tuple[int, ...]]] = set()

    def __enter__(self) -> Rebinding:
        self._sent.clear()
        Rebinding.active = self
        return self

    def __exit__(self, *error: object) -> None:
        Rebinding.active = None

    def table(self, device: torch.device, words: tuple[int, ...]) -> Tensor:
        """The table that a launch asks for by the words that it was captured with, on the device."""
        key = (device, words)
        if key not in self._tables:
            host = torch.tensor(words, device="cpu")
            self._tables[key] = host.pin_memory() if device.type == "cuda" else host, host.to(device, copy=True)
        host, there = self._tables[key]
        if key not in self._sent:
            self._sent.add(key)
            there.copy_(host, non_blocking=True)
        return there

    def rebind(self, seeds: Mapping[int, int]) -> None:
        """From the next replay on each direction of a captured seed is that of another: captured → new.

        The last replay must have ended, as it has where its values were read.
        """
        new = {_signed(old): _signed(now) for old, now in seeds.items()}
        for (_, words), (host, _) in self._tables.items():
            # Behind the rounding seed, seeds and scales take turns.
            host.copy_(torch.tensor([new.get(w, w) if i % 2 else w for i, w in enumerate(words)], device="cpu"))


@lru_cache(maxsize=16)
def _cached_words(device: torch.device, stream: int, words: tuple[int, ...]) -> Tensor:
    return _sent(torch.tensor(words, device="cpu"), device)


def _chunks_on(device: torch.device, spans: tuple[tuple[int, int, int], ...], itemsize: int) -> Tensor:
    """The chunks of tensors given as (address, size, id): address, size, id and first element: int64, shape (n, 4)."""
    return _cached_chunks(device, _stream(device), spans, itemsize)


@lru_cache(maxsize=64)
def _cached_chunks(device: torch.device, stream: int, spans: tuple[tuple[int, int, int], ...], itemsize: int) -> Tensor:
    parts = []
    for address, numel, tensor_id in spans:
        start = torch.arange(0, numel, _CHUNK, device="cpu")
        size = (numel - start).clamp(max=_CHUNK)
        parts.append(torch.stack((address + start * itemsize, size, torch.full_like(start, tensor_id), start), dim=1))
    return _sent(torch.cat(parts), device)


def _stream(device: torch.device) -> int:
    """What the order of copies and kernels is kept by: tables that one stream was sent are not another's."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _sent(table: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, for which the host does not wait."""
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


@cache
def is_usable(device: torch.device) -> bool:
    """Whether the kernels can be built for a device and reproduce the specification there; it is warned if not."""
    try:
        right = _reproduces_the_specification(device)
    except Exception as error:  # whatever a compiler or a driver may raise: torch operations do the work as well
        warnings.warn(f"Triton's kernels cannot be used on {device}, so the noise is slower: {error!r}", stacklevel=4)
        return False
    if not right:
        warnings.warn(f"Triton's kernels give other bits on {device}; torch operations are used", stacklevel=4)
    return right


def _reproduces_the_specification(device: torch.device) -> bool:
    """Both samplers, the mask and both kinds of rounding, on a sample that begins and ends within blocks."""
    seed, tensor_id, start, n = 2**63 + 5, 2**63 + 2**31 + 7, 130, 1500
    out = torch.empty(n, device=device)
    for stream, specified in ((spec.RADEMACHER, spec.rademacher), (spec.GAUSSIAN, spec.gaussian)):
        fill(out, stream, seed, tensor_id, start)
        if not np.array_equal(out.cpu().numpy(), specified(seed, tensor_id, start, start + n)):
            return False
    y = out.cpu().numpy()
    for rounding, numbers in ((spec.ROUNDING, spec.random16), (spec.PROBE, spec.probe16)):
        random = numbers(seed, tensor_id, start, start + n)
        for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float16, "float16")):
            half = torch.empty(n, dtype=dtype, device=device)
            round_half(half, out, seed, tensor_id, start, rounding)
            expected = spec.round_stochastically(y, random, name)
            if not np.array_equal(half.view(torch.int16).cpu().numpy().view(np.uint16), expected):
                return False
    mask(out, 1 << 30, seed, tensor_id, start)
    masked = spec.masked(seed, tensor_id, start, start + n, 1 << 30)
    return np.array_equal(out.cpu().numpy(), np.where(masked, np.float32(0), y))
