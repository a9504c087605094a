"""Functions of all coefficients of an estimate at once: by their spread, by their order.

ĝ is the mean over directions, so its terms hold cᵢ/q. What is computed here is computed of the cᵢ, block by block, and
put back with the same share: the estimate stays a mean.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

from zotune.estimate.estimate import GradientEstimate


def by_block(estimate: GradientEstimate, f: Callable[[Sequence[float]], Sequence[float]]) -> GradientEstimate:
    """The estimate with f(c₁ … c_q) in place of the coefficients of each block's directions.

    >>> from zotune.directions.direction import Direction
    >>> estimate = GradientEstimate(1.0, ((1.0, Direction(1)), (3.0, Direction(2))), 3)
    >>> [c for c, _ in by_block(estimate, sorted).terms]
    [1.0, 3.0]
    """
    places: dict[frozenset[int] | None, list[int]] = {}
    for place, (_, u) in enumerate(estimate.terms):
        places.setdefault(u.tensors, []).append(place)
    terms = list(estimate.terms)
    for own in places.values():
        changed = f([terms[i][0] * len(own) for i in own])
        for i, c in zip(own, changed, strict=True):
            terms[i] = c / len(own), terms[i][1]
    return replace(estimate, terms=tuple(terms))


def standardised(coefficients: Sequence[float], *, ddof: int) -> list[float]:
    """Each coefficient by their standard deviation; all 0 where that is 0, and as they are where one is not finite.

    Args:
        coefficients: at least 1 + ddof.
        ddof: 0 divides the squares by their number, 1 by one less.

    >>> standardised([1.0, 3.0], ddof=0), standardised([0.1, 0.1, 0.1], ddof=0)
    ([1.0, 3.0], [0.0, 0.0, 0.0])
    """
    if not all(map(math.isfinite, coefficients)):
        return list(coefficients)
    # Exact sums: those of equal numbers have a spread of exactly 0.
    spread = statistics.stdev(coefficients) if ddof else statistics.pstdev(coefficients)
    return [c / spread if spread else 0.0 for c in coefficients]


def best(coefficients: Sequence[float], *, keep: int, only_better: bool) -> list[float]:
    """The coefficient of the mean over the `keep` directions with the smallest coefficients: -q/k for these, 0 for
    others.

    Args:
        coefficients: the slopes towards q points; one that is not finite is never chosen, and the first of equals is.
        keep: k, at least 1.
        only_better: leave out points that are no better than x, whose slope is not negative.

    >>> best([0.5, -1.0, -3.0], keep=2, only_better=True), best([0.5, 1.0], keep=1, only_better=True)
    ([0.0, -1.5, -1.5], [0.0, 0.0])
    """
    chosen = [i for i, c in enumerate(coefficients) if math.isfinite(c) and (c < 0 or not only_better)]
    chosen = sorted(chosen, key=lambda i: coefficients[i])[:keep]
    return [-len(coefficients) / len(chosen) if i in chosen else 0.0 for i in range(len(coefficients))]
