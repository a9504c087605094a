"""The objective at several points: in one forward pass where the batch can be repeated, otherwise one after the other.

Whether copies can be told apart is found out by trying: two of them run side by side, one at x, the other far away
at x + a·u. Where a model mixes its examples, or carries them elsewhere than along the first dimension, at least one
of the two values is not what it is alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from zotune.directions.direction import Direction
from zotune.estimate.batched_probes import NotSeparableError, side_by_side
from zotune.estimate.objective import Accumulated, Batched, Closure, as_number, evaluate, objective, probing, read
from zotune.estimate.perturb import OffsetAlong, nbytes, perturbed
from zotune.model.parameters import ParameterSet
from zotune.system import limits

# How far to go along which direction: x + a·u.
Point = tuple[float, Direction]

NOT_SEPARABLE = (
    "the objective's examples could not be told apart along the first dimension (the model mixes them, or the value "
    "hardly depends on what is tuned): probes run one after the other, which is slower and gives the same."
)

# Of the difference between the two values, what rounding may account for: shares that are mixed up change all of it.
TOLERANCE = 0.2
# How far to go, in root mean squares of the tuned numbers: far enough that it shows, not so far that all overflows.
DISTANCES = (0.1, 1.0, 10.0)


def values_at(closure: Closure, tuned: ParameterSet, points: Sequence[Point]) -> list[Tensor | float]:
    """The objective at x + a·u for each (a, u): side by side as far as it is `Batched`, else one after the other.

    They are as `closures.objective` gives them, to be read together by `closures.read`.
    """
    if isinstance(closure, Accumulated) and all(isinstance(part, Batched) for part in closure.closures):
        parts = [values_at(part, tuned, points) for part in closure.closures]
        return [closure.mean(values) for values in zip(*parts, strict=True)]
    if isinstance(closure, Batched) and _may_be_side_by_side(closure, tuned):
        groups = _groups(tuned, points, closure.most)
        return [value for group in groups for value in _values_of(closure, tuned, group)]
    return [_at(closure, tuned, a, u) for a, u in points]


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
    if len(points) > 1:
        with suppress(NotSeparableError):
            return values_side_by_side(closure, tuned, points)
    return [_at(closure, tuned, a, u) for a, u in points]


# By set of tuned tensors: the verdict of its trial, or that of a caller who knows it.
_IS_SEPARABLE: WeakKeyDictionary[ParameterSet, bool] = WeakKeyDictionary()


def _may_be_side_by_side(closure: Batched, tuned: ParameterSet) -> bool:
    """The verdict of the first objective over these tensors, tried once and remembered."""
    if closure.most < 2:
        return False
    if tuned not in _IS_SEPARABLE and not set_separable(tuned, is_separable(closure, tuned)):
        warnings.warn(NOT_SEPARABLE, stacklevel=2)
    return _IS_SEPARABLE[tuned]


def set_separable(tuned: ParameterSet, verdict: bool) -> bool:
    """Remember whether probes over these tensors can share a forward pass, for all objectives; returns the verdict."""
    _IS_SEPARABLE[tuned] = verdict
    return verdict


def _at(closure: Closure, tuned: ParameterSet, a: float, direction: Direction) -> Tensor | float:
    with perturbed(tuned, direction, a):
        return objective(closure)


def is_separable(closure: Batched, tuned: ParameterSet) -> bool:
    """Whether x and x + a·u have the same values side by side as alone."""
    # A piece at a time: the squares of a large embedding are as large as it is.
    pieces = (x for t in tuned for x in torch.split(t.storage().detach().flatten(), limits.STATISTIC_ELEMENTS))
    squares = sum(float(x.float().square().sum()) for x in pieces)
    u, scale = Direction(seed=0), math.sqrt(squares / tuned.numel) or 1.0
    with probing(tuned.model):
        here = evaluate(closure)
        for distance in DISTANCES:
            with perturbed(tuned, u, distance * scale):
                there = evaluate(closure)
            try:
                found = read(values_side_by_side(closure, tuned, [(0.0, u), (distance * scale, u)]))
            except NotSeparableError:
                return False
            differences = [abs(one - other) for one, other in zip(found, (here, there), strict=True)]
            if max(differences) <= TOLERANCE * abs(there - here) > 0:
                return True
    return False


def values_side_by_side(closure: Batched, tuned: ParameterSet, points: Sequence[Point]) -> list[Tensor | float]:
    """The objective at several points that perturb the same tensors, from one forward pass.

    Raises:
        NotSeparableError: some computation would mix the copies of the batch.
    """
    with side_by_side(tuned, [OffsetAlong(u, a) for a, u in points]):
        return [as_number(value) for value in closure.values(len(points))]
