"""The objective at several points: in one forward pass where its probes can share one, else one after the other."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from zotune.directions.direction import Direction
from zotune.estimate.batched_probes import NotSeparableError, side_by_side
from zotune.estimate.determinism import note_evaluation
from zotune.estimate.mesh import Cell
from zotune.estimate.objective import Accumulated, Batched, Closure, as_accumulated, as_number, read
from zotune.estimate.perturb import OffsetAlong, nbytes, perturbed
from zotune.model.parameters import ParameterSet
from zotune.system import limits

# How far to go along which direction: x + a·u.
Point = tuple[float, Direction]

ONE_BY_ONE = "probes of {name} run one after the other, which is slower and gives the same ({reason})."

# By set of tuned tensors: names of the objectives that were refused. Probes side by side round otherwise than probes
# alone, so a resumed run has to know them: they belong to the optimizer's state.
_REFUSED: WeakKeyDictionary[ParameterSet, set[str]] = WeakKeyDictionary()


def values_at(closure: Closure, tuned: ParameterSet, points: Sequence[Point | None]) -> list[Tensor | float]:
    """The objective at x + a·u for each (a, u), at x for None: side by side as far as it is `Batched`, else one by one.

    They are as `objective.objective` gives them, to be read together by `objective.read`. Several processes share the
    micro-batches and the groups of points, and exchange the values at once.
    """
    whole = as_accumulated(closure)
    try:
        return _values(whole, tuned, points, [_most(whole, part, tuned) for part in whole.closures])
    except NotSeparableError as error:
        for part in whole.closures:
            if isinstance(part, Batched) and part.name not in refused(tuned):
                warnings.warn(refuse(part, tuned, error), stacklevel=2)
    return _values(whole, tuned, points, [1] * len(whole.closures))


def _most(whole: Accumulated, part: Closure, tuned: ParameterSet) -> int:
    """How many points of a part may share a pass."""
    # Processes that compute with shards exchange activations, which has no meaning for several copies at once.
    knows_batches = all(isinstance(other, Batched) for other in whole.closures) and not tuned.is_tensor_parallel
    return part.most if knows_batches and isinstance(part, Batched) and part.name not in refused(tuned) else 1


def _values(
    whole: Accumulated, tuned: ParameterSet, points: Sequence[Point | None], most: Sequence[int]
) -> list[Tensor | float]:
    """The objective at each point, from the cells of a table: a part at a group of points."""
    groups = [list(_groups(tuned, points, n)) for n in most]
    cells = [Cell(i, j, len(group)) for i, some in enumerate(groups) for j, group in enumerate(some)]

    def compute(own: Sequence[int]) -> list[list[Any]]:
        found: dict[int, list[Any]] = {}
        alone: dict[int, list[int]] = {}
        for k in own:
            part, group, width = cells[k]
            if width > 1:
                some = [p for p in (points[i] for i in groups[part][group]) if p is not None]
                found[k] = values_side_by_side(whole.closures[part], tuned, some)  # type: ignore[arg-type]
            else:
                alone.setdefault(groups[part][group][0], []).append(k)
        for index, ks in alone.items():
            parts = [whole.closures[cells[k].part] for k in ks]
            found |= {k: [value] for k, value in zip(ks, _at(parts, tuned, points[index]), strict=True)}
        values = [found[k] for k in own]
        return values if whole.mesh.is_alone else _read(values)

    table: list[dict[int, Any]] = [{} for _ in groups]
    for (part, group, _), numbers in zip(cells, whole.mesh.evaluate(cells, compute), strict=True):
        table[part] |= dict(zip(groups[part][group], numbers, strict=True))
    return [whole.mean([row[i] for row in table]) for i in range(len(points))]


def _read(values: Sequence[Sequence[Any]]) -> list[list[float]]:
    """The values as numbers; the host waits for a GPU once."""
    numbers = iter(read([value for some in values for value in some]))
    return [[next(numbers) for _ in some] for some in values]


def refused(tuned: ParameterSet) -> set[str]:
    """Names of the objectives over these tensors whose probes do not share a pass; a caller may add to them."""
    return _REFUSED.setdefault(tuned, set())


def refuse(closure: Batched, tuned: ParameterSet, reason: Exception) -> str:
    """Remember that this objective's probes do not share a pass, and return the sentence that says so."""
    refused(tuned).add(closure.name)
    return ONE_BY_ONE.format(name=closure.name, reason=reason)


def _groups(tuned: ParameterSet, points: Sequence[Point | None], most: int) -> Iterator[range]:
    """Indices of the points, in groups to be evaluated at once: neighbours that perturb the same tensors, few where
    these are large and not perturbed by thin factors; x itself is alone.
    """
    lo = 0
    for hi in range(1, len(points) + 1):
        first = points[lo]
        size = 1 if first is None else _size(tuned, first[1], most)
        if hi == len(points) or hi - lo == size or _tensors(points[hi]) != _tensors(first):
            yield range(lo, hi)
            lo = hi


def _size(tuned: ParameterSet, u: Direction, most: int) -> int:
    return most if most <= 2 or nbytes(tuned, made_whole(tuned, u)) * most <= limits.CACHED_BYTES else 2


def _tensors(point: Point | None) -> Any:
    return point if point is None else (point[1].tensors,)


def made_whole(tuned: ParameterSet, direction: Direction) -> frozenset[int]:
    """Ids of the tensors that a direction moves by a full matrix instead of thin factors."""
    return frozenset(t.id for t in tuned if direction.moves(t.id) and not direction.has_factors(t.id))


def values_side_by_side(closure: Batched, tuned: ParameterSet, points: Sequence[Point]) -> list[Tensor | float]:
    """The objective at several points that perturb the same tensors, from one forward pass.

    Raises:
        NotSeparableError: the objective has no meaning for several copies of the weights at once.
    """
    copies = side_by_side(tuned, [OffsetAlong(u, a) for a, u in points])
    values = copies.evaluate(lambda: closure.value(len(points)))
    return [as_number(value) for value in values]


def _at(parts: Sequence[Closure], tuned: ParameterSet, point: Point | None) -> list[Tensor | float]:
    """Each part of the objective at one point."""
    with nullcontext() if point is None else perturbed(tuned, point[1], point[0]):
        values = [as_number(part()) for part in parts]
    note_evaluation()
    return values
