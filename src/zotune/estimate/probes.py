"""The objective at several points: in one forward pass where its probes can share one, else one after the other."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from weakref import WeakKeyDictionary

from torch import Tensor

from zotune.directions.direction import Direction
from zotune.estimate.batched_probes import NotSeparableError, side_by_side
from zotune.estimate.objective import Accumulated, Batched, Closure, as_number, objective
from zotune.estimate.perturb import OffsetAlong, nbytes, perturbed
from zotune.model.parameters import ParameterSet
from zotune.system import limits

# How far to go along which direction: x + a·u.
Point = tuple[float, Direction]

ONE_BY_ONE = "probes of {name} run one after the other, which is slower and gives the same ({reason})."

# By set of tuned tensors: names of the objectives that were refused. Probes side by side round otherwise than probes
# alone, so a resumed run has to know them: they belong to the optimizer's state.
_REFUSED: WeakKeyDictionary[ParameterSet, set[str]] = WeakKeyDictionary()


def values_at(closure: Closure, tuned: ParameterSet, points: Sequence[Point]) -> list[Tensor | float]:
    """The objective at x + a·u for each (a, u): side by side as far as it is `Batched`, else one after the other.

    They are as `closures.objective` gives them, to be read together by `closures.read`.
    """
    if isinstance(closure, Accumulated) and all(isinstance(part, Batched) for part in closure.closures):
        parts = [values_at(part, tuned, points) for part in closure.closures]
        return [closure.mean(values) for values in zip(*parts, strict=True)]
    shares = isinstance(closure, Batched) and closure.most > 1 and not tuned.is_tensor_parallel
    if isinstance(closure, Batched) and shares and closure.name not in refused(tuned):
        try:
            groups = _groups(tuned, points, closure.most)
            return [value for group in groups for value in _values_of(closure, tuned, group)]
        except NotSeparableError as error:
            warnings.warn(refuse(closure, tuned, error), stacklevel=2)
    return [_at(closure, tuned, a, u) for a, u in points]


def refused(tuned: ParameterSet) -> set[str]:
    """Names of the objectives over these tensors whose probes do not share a pass; a caller may add to them."""
    return _REFUSED.setdefault(tuned, set())


def refuse(closure: Batched, tuned: ParameterSet, reason: Exception) -> str:
    """Remember that this objective's probes do not share a pass, and return the sentence that says so."""
    refused(tuned).add(closure.name)
    return ONE_BY_ONE.format(name=closure.name, reason=reason)


def _groups(tuned: ParameterSet, points: Sequence[Point], most: int) -> Iterator[Sequence[Point]]:
    """The points, in groups to be evaluated at once: neighbours that perturb the same tensors, few where these are
    large and not perturbed by thin factors.
    """
    lo = 0
    for hi in range(1, len(points) + 1):
        u, tensors = points[lo][1], points[lo][1].tensors
        size = most if most <= 2 or nbytes(tuned, made_whole(tuned, u)) * most <= limits.CACHED_BYTES else 2
        if hi == len(points) or hi - lo == size or points[hi][1].tensors != tensors:
            yield points[lo:hi]
            lo = hi


def made_whole(tuned: ParameterSet, direction: Direction) -> frozenset[int]:
    """Ids of the tensors that a direction moves by a full matrix instead of thin factors."""
    return frozenset(t.id for t in tuned if direction.moves(t.id) and not direction.has_factors(t.id))


def _values_of(closure: Batched, tuned: ParameterSet, points: Sequence[Point]) -> list[Tensor | float]:
    if len(points) == 1:
        return [_at(closure, tuned, *points[0])]
    return values_side_by_side(closure, tuned, points)


def values_side_by_side(closure: Batched, tuned: ParameterSet, points: Sequence[Point]) -> list[Tensor | float]:
    """The objective at several points that perturb the same tensors, from one forward pass.

    Raises:
        NotSeparableError: the objective has no meaning for several copies of the weights at once.
    """
    copies = side_by_side(tuned, [OffsetAlong(u, a) for a, u in points])
    values = copies.evaluate(lambda: closure.value(len(points)))
    return [as_number(value) for value in values]


def _at(closure: Closure, tuned: ParameterSet, a: float, direction: Direction) -> Tensor | float:
    with perturbed(tuned, direction, a):
        return objective(closure)
