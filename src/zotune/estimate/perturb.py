"""The model at x + a·u, without ever moving x.

Moving weights by +μu, -2μu, +μu does not bring half-precision weights back, and an exception leaves
them moved. Here they are only read: while `perturbed` is active, every torch function that is given a
tuned tensor gets x + a·u instead (see `zotune.model.intercept`).

Two reads need no whole perturbed tensor: a linear layer takes its rows in pieces that stay in the
cache, an embedding only the rows that are looked up. A direction of low rank needs no perturbed piece
either: x + a·u is then x Wᵀ and two thin products. And where all that is moved is small, as an
adapter is, a tensor that is read again is made whole and kept until the context is left: an objective that
generates text, or one in micro-batches, reads it many times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zotune import noise
from zotune.directions.direction import Direction, add_terms
from zotune.directions.low_rank import linear, product
from zotune.directions.samplers import Factors
from zotune.model.intercept import ParameterInterceptor
from zotune.model.parameters import ParameterSet, TunedTensor
from zotune.model.shards import is_distributed
from zotune.system import limits

_META_STANDS_FOR: ContextVar[str] = ContextVar("meta_stands_for", default="cuda")


class WeightOffset(Protocol):
    """An offset of the tuned tensors, computed for any slice of any tensor whenever it is read."""

    @property
    def tensors(self) -> frozenset[int] | None:
        """Ids of the tensors that have an offset; None for all."""

    def move(self, out: Tensor, x: Tensor, tensor: TunedTensor, start: int) -> None:
        """Write x plus its offset into `out`: flat, contiguous slices that begin at element `start` of the tensor."""

    def move_rows(self, rows: Tensor, indices: Tensor, tensor: TunedTensor) -> None:
        """Add the offset of row indices[i] of a matrix to rows[i], in place."""

    def factors(self, tensor: TunedTensor, device: torch.device) -> Factors | None:
        """The thin factors of a matrix's offset, which are all that products need; None where it is not of low rank."""


@dataclass(frozen=True)
class OffsetAlong:
    """The offset a·u along one direction.

    Half-precision sums are rounded at random so that their mean is x + a·u: to nearest, every offset below half a unit
    in the last place of x would be lost. The random numbers are those of the direction, so both ends of a probe have
    the same (the probe stream of `zotune.noise.spec`).
    """

    direction: Direction
    a: float

    @property
    def tensors(self) -> frozenset[int] | None:
        """As `WeightOffset.tensors`."""
        return self.direction.tensors

    def move(self, out: Tensor, x: Tensor, tensor: TunedTensor, start: int) -> None:
        """As `WeightOffset.move`."""
        u, terms = self.direction, ((self.a, self.direction),)
        for span in tensor.spans(start, x.numel(), max(1, x.numel())):
            own, target = span.widened(x[span.local]), out[span.local]
            moved = target if span.runs is None else torch.empty_like(own)
            add_terms(moved, own, terms, tensor.id, span.start, u.seed, noise.PROBE)
            if moved is not target:
                target.copy_(span.narrowed(moved))

    def move_rows(self, rows: Tensor, indices: Tensor, tensor: TunedTensor) -> None:
        """As `WeightOffset.move_rows`."""
        if (kernel := self.direction.kernel(tensor.id)) is not None:
            noise.add_rows(rows, indices, kernel, self.direction.seed, self.a, tensor.id)
        elif (factors := self.factors(tensor, rows.device)) is not None:
            dtype = noise.compute_dtype(rows.dtype)
            y = rows.to(dtype) + product(factors.left[indices], factors.right).to(dtype) * self.a
            noise.round_rows(rows, y, indices, self.direction.seed, tensor.id)
        else:
            move_rows_one_by_one(self, rows, indices, tensor)

    def factors(self, tensor: TunedTensor, device: torch.device) -> Factors | None:
        """As `WeightOffset.factors`."""
        found = self.direction.factors(tensor.id, device)
        if found is None:
            return None
        own = (found.left, found.right) if tensor.shard is None else tensor.shard.sides(found.left, found.right)
        return None if own is None else Factors(*own, self.a, (self.direction.seed, tensor.id))


def antithetic_pair(offsets: Sequence[WeightOffset]) -> tuple[Direction, float] | None:
    """The (u, a) of an antithetic pair x + a·u and x - a·u, the two ends of a probe; None for any other offsets."""
    if len(offsets) != 2:
        return None
    one, other = offsets
    if not isinstance(one, OffsetAlong) or not isinstance(other, OffsetAlong) or one.direction != other.direction:
        return None
    return (one.direction, one.a) if one.a == -other.a else None


def move_rows_one_by_one(offset: WeightOffset, rows: Tensor, indices: Tensor, tensor: TunedTensor) -> None:
    """`WeightOffset.move_rows` by `WeightOffset.move`."""
    for row, index in zip(rows, indices.tolist(), strict=True):
        offset.move(row, row, tensor, start=index * row.numel())


class perturbed_by(ParameterInterceptor):  # noqa: N801 - a context manager reads like a verb
    """Within this context the model computes with its tuned tensors plus an offset; the tensors are never written.

    Extra memory: the largest single tuned tensor, or 12 MiB where linear layers and embeddings are all (on a GPU the
    largest of up to 2²⁶ numbers, and the rows looked up); 16 MiB where all moved tensors together are that small.
    """

    def __init__(self, tuned: ParameterSet, offset: WeightOffset) -> None:
        super().__init__(tuned, offset.tensors)
        self._offset = offset
        self._scratch: Tensor | None = None
        self._kept: dict[int, Tensor] = {}
        self._keeps = nbytes(self.tuned, self.chosen) <= limits.CACHED_BYTES
        self._reads: Counter[int] = Counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._scratch = None
        self._kept.clear()
        self._reads.clear()
        super().__exit__(kind, error, trace)

    def read(self, tensor: TunedTensor, value: Tensor) -> Tensor:
        """The whole tensor plus its offset."""
        if tensor.id in self._kept:
            return self._kept[tensor.id]
        source = value.detach().contiguous()
        out = torch.empty_like(source)
        self._offset.move(out.view(-1), source.view(-1), tensor, 0)
        if self._keeps and self._reads[tensor.id] > 1 and tensor.shard is None:
            self._kept[tensor.id] = out
        return out

    def note(self, tensor: TunedTensor) -> TunedTensor:
        """As `ParameterInterceptor.note`; counts the reads of each tensor."""
        self._reads[tensor.id] += 1
        return super().note(tensor)

    def _is_read_again(self, tensor: TunedTensor) -> bool:
        """Whether the tensor is read again in this context, so that caching it whole saves time."""
        return self._keeps and self._reads[tensor.id] > 0

    def _piece(self, tensor: TunedTensor, value: Tensor, lo: int, hi: int) -> Tensor:
        """Rows lo … hi - 1 of a perturbed matrix, in the shared scratch."""
        rows = value[lo:hi]
        scratch = self._scratch
        fits = scratch is not None and scratch.dtype == value.dtype and scratch.device == value.device
        if scratch is None or not fits or scratch.numel() < rows.numel():
            most = piece_elements(value.device.type)
            self._scratch = scratch = value.new_empty(max(rows.numel(), largest_piece(self.tuned, self.chosen, most)))
        piece = scratch[: rows.numel()]
        self._offset.move(piece, rows.reshape(-1), tensor, lo * value.shape[1])
        return piece.view_as(rows)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        tensor = None if is_distributed(weight) else self.find(weight)
        # Under autograd a scratch that is used again would corrupt the graph.
        if tensor is None or torch.is_grad_enabled() or weight.dim() != 2:
            return None
        if (factors := self._offset.factors(tensor, weight.device)) is not None:
            self.note(tensor)
            return linear(self.replace(input), weight.detach(), self.replace(bias), [factors])
        largest = piece_elements(weight.device.type)
        if self._is_read_again(tensor) or not 0 < weight.shape[1] <= largest or not len(weight):
            return None
        self.note(tensor)
        input, moved_bias, value = self.replace(input), self.replace(bias), weight.detach()
        # A matrix: of more dimensions with gaps between them, torch would copy the weights for every example.
        x = input.reshape(-1, input.shape[-1])
        parts = []
        for lo, hi in pieces(value.shape, largest):
            piece = self._piece(tensor, value, lo, hi)
            parts.append(F.linear(x, piece, None if bias is None else moved_bias[lo:hi]))
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return out.view(*input.shape[:-1], value.shape[0])

    def _embedding(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor | None:
        read = self.find(weight)
        found = None if read is None or self._is_read_again(read) else self.lookup(input, weight, max_norm)
        if found is None:
            return None
        tensor, indices, places = found
        rows = F.embedding(indices, weight.detach())
        self._offset.move_rows(rows, indices, tensor)
        return F.embedding(places, rows)

    def _slice(self, value: Tensor, index: Any) -> Tensor | None:
        """Rows lo … hi - 1 alone: a head that is read in slices would else be perturbed whole for each."""
        tensor = None if is_distributed(value) else self.find(value)
        if tensor is None or not isinstance(index, slice) or not value.dim() or self._is_read_again(tensor):
            return None
        lo, hi, step = index.indices(len(value))
        if step != 1 or hi <= lo or not value.is_contiguous():
            return None
        self.note(tensor)
        rows = value.detach()[lo:hi]
        out = torch.empty_like(rows)
        self._offset.move(out.view(-1), rows.view(-1), tensor, lo * value.stride(0))
        return out


perturbed_by.special = {
    F.linear: perturbed_by._linear,
    F.embedding: perturbed_by._embedding,
    torch.Tensor.__getitem__: perturbed_by._slice,
}


def piece_elements(device_type: str) -> int:
    """The most elements of a matrix that are perturbed at a time."""
    where = _META_STANDS_FOR.get() if device_type == "meta" else device_type
    return limits.PERTURBED_ELEMENTS if where == "cpu" else limits.DEVICE_PERTURBED_ELEMENTS


def pieces(shape: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Ranges of a matrix's rows with at most `most` elements each, as even as possible: small rests are slow."""
    rows, columns = shape
    at_once = max(1, most // columns)
    size = -(-rows // -(-rows // at_once)) if rows else 1
    return [(lo, min(lo + size, rows)) for lo in range(0, rows, size)]


@contextmanager
def meta_as(device_type: str) -> Iterator[None]:
    """Within this context tensors on `meta` are perturbed in the pieces of another device, so that their bytes can be
    counted.
    """
    token = _META_STANDS_FOR.set(device_type)
    try:
        yield
    finally:
        _META_STANDS_FOR.reset(token)


def nbytes(tuned: ParameterSet, ids: frozenset[int] | None) -> int:
    """Bytes of the tuned tensors with these ids, or of all."""
    chosen = (t.parameter for t in tuned if ids is None or t.id in ids)
    return sum(p.numel() * p.element_size() for p in chosen)


def largest_piece(tuned: ParameterSet, ids: frozenset[int], most: int) -> int:
    """Elements of the largest piece when matrices of these tensors are cut into pieces of at most `most` elements."""
    shapes = [t.parameter.shape for t in tuned if t.id in ids and t.parameter.dim() == 2]
    fitting = [shape for shape in shapes if 0 < shape[1] <= most]
    return max((pieces(shape, most)[0][1] * shape[1] for shape in fitting if shape[0]), default=0)


class perturbed(perturbed_by):  # noqa: N801
    """Within this context the model computes with x + a·u; x itself is never written.

    Args:
        model: the model, or its tuned tensors (those that require a gradient), if already collected.
        direction: u.
        a: how far to go along u, in units of the parameters; ±μ for a probe.

    Raises:
        UnreadTensorError: on leaving, if a tuned tensor was not read: its part of u had no effect.

    Extra memory: the largest single tuned tensor, or 12 MiB where linear layers and embeddings are all.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> u = Direction(seed=7)
    >>> x = torch.ones(1, 2)
    >>> with torch.no_grad(), perturbed(model, u, 0.5):
    ...     moved = model(x)
    >>> bool(torch.allclose(moved, model(x) + 0.5 * u.of(model, "weight").sum()))
    True
    """

    def __init__(self, model: nn.Module | ParameterSet, direction: Direction, a: float) -> None:
        super().__init__(ParameterSet.of(model), OffsetAlong(direction, a))
