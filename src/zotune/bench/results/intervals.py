"""Confidence intervals of weighted sums of cells' means, over evaluation rows and seeds together.

Rows are paired: the models of all cells answer the same rows. Runs are paired too: two cells' runs with the same seed
share their directions, their batches and the initial adapter, so their errors are not independent. The whole sum is
therefore formed row by row and seed by seed, D[s, i] = Σ w·y[s, i], and its variances are those of D. The variance
between seeds is estimated from the seeds' means, minus the variance that random answers to single rows would cause.
The two parts of the variance have very different degrees of freedom (some hundred rows, a few seeds), so each has its
own quantile of Student's t, and the squares are added (Graybill and Wang, 1980; for paired rows in evaluations of
language models: Miller, 2024, arXiv 2411.00640). Where cells have different seeds, the seeds that the same cells share
form a stratum, and strata are independent; degrees of freedom of their sum are Satterthwaite's (1946).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
# A variance and its degrees of freedom.
Part = tuple[float, float]


@dataclass(frozen=True)
class Outcomes:
    """The outcomes of a cell's runs.

    Attributes:
        values: array of shape [runs, rows]; one column if each run has a single number.
        rows: name of the set of rows; cells with the same name and number of rows are paired row by row.
        seeds: the seed of each run; runs with equal seeds are paired. Empty: seeds that no other cell has.
    """

    values: Matrix
    rows: str = ""
    seeds: tuple[int, ...] = ()

    @property
    def mean(self) -> float:
        """The mean over runs and rows."""
        return float(self.values.mean())


@dataclass(frozen=True)
class Estimate:
    """The value of a contrast and its variance.

    Attributes:
        parts: parts of the variance with their degrees of freedom; None if a cell has a single number.
        num_runs: number of runs of the cell with the fewest; with one run, the variance covers rows only.
        num_rows: number of rows of all sets of rows; 0 for cells whose runs have a single number.
    """

    value: float
    parts: tuple[Part, ...] | None
    num_runs: int
    num_rows: int

    @property
    def error(self) -> float | None:
        """The standard error."""
        return None if self.parts is None else math.sqrt(sum(variance for variance, _ in self.parts))

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Both ends of the interval at a level; (−∞, ∞) if the error is unknown.

        >>> low, high = Estimate(1.0, ((0.01, 2.0),), 3, 1).interval()
        >>> round(low, 3), round(high, 3), Estimate(1.0, None, 1, 1).interval()
        (0.57, 1.43, (-inf, inf))
        """
        if self.parts is None:
            return -math.inf, math.inf
        from scipy.special import stdtrit

        squares = [variance * float(stdtrit(freedom, (1 + level) / 2)) ** 2 for variance, freedom in self.parts]
        half = math.sqrt(sum(squares))
        return self.value - half, self.value + half


# A term of a contrast: its weight and a cell's outcomes.
Term = tuple[float, Outcomes]


def contrast(terms: Sequence[Term]) -> Estimate:
    """The weighted sum of the means of one or more cells, Σ w·mean.

    >>> first = Outcomes(np.array([[1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]))
    >>> second = Outcomes(np.array([[0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0]]))
    >>> contrast([(1.0, first), (-1.0, second)]).value
    0.375
    """
    of_rows: dict[Hashable, Matrix] = {}
    for weight, outcomes in terms:
        _add(of_rows, _rows_of(outcomes), weight * outcomes.values.mean(axis=0))
    value = sum(float(mean.mean()) for mean in of_rows.values())
    by_rows = _total([_of_mean(mean) for mean in of_rows.values() if mean.size > 1])
    parts = [part for part in (by_rows, _between_runs(terms)) if part[0]]
    is_known = all(outcomes.values.size > 1 for _, outcomes in terms)
    return Estimate(
        value,
        tuple(parts) if is_known else None,
        num_runs=min(len(outcomes.values) for _, outcomes in terms),
        num_rows=sum(mean.size for mean in of_rows.values() if mean.size > 1),
    )


def _between_runs(terms: Sequence[Term]) -> Part:
    """The variance of the sum between runs, beyond that of random answers; runs with equal seeds are one."""
    total, chance, parts = 0.0, 0.0, []
    for members, seeds in _strata(terms).items():
        if len(seeds) == 1:
            if any(len(terms[i][1].values) > 1 for i in members):
                return _bound(terms)
            continue
        differences = _by_seed(terms, members, seeds)
        parts.append(_of_mean(sum(d.mean(axis=1) for d in differences)))
        chance += sum(map(_chance, differences))
    total, freedom = _total(parts)
    return max(total - chance, 0.0), freedom


def _strata(terms: Sequence[Term]) -> dict[tuple[int, ...], list[Hashable]]:
    """The seeds by the terms that have them."""
    members: dict[Hashable, list[int]] = {}
    for i, (_, outcomes) in enumerate(terms):
        for seed in _seeds_of(i, outcomes):
            members.setdefault(seed, []).append(i)
    strata: dict[tuple[int, ...], list[Hashable]] = {}
    for seed, indices in members.items():
        strata.setdefault(tuple(indices), []).append(seed)
    return strata


def _seeds_of(index: int, outcomes: Outcomes) -> tuple[Hashable, ...]:
    return outcomes.seeds or tuple((index, run) for run in range(len(outcomes.values)))


def _by_seed(terms: Sequence[Term], members: Sequence[int], seeds: Sequence[Hashable]) -> list[Matrix]:
    """The part of the sum that each seed of a stratum has, [seeds, rows] for each set of rows.

    The means over seeds add up, over all strata, to the sum: a cell of which n runs in all and m of this stratum exist
    has the weight w·m/n.
    """
    found: dict[Hashable, Matrix] = {}
    for i in members:
        weight, outcomes = terms[i]
        place = {seed: run for run, seed in enumerate(_seeds_of(i, outcomes))}
        values = outcomes.values[[place[seed] for seed in seeds]]
        _add(found, _rows_of(outcomes), weight * len(seeds) / len(outcomes.values) * values)
    return list(found.values())


def _bound(terms: Sequence[Term]) -> Part:
    """An upper bound of the variance between runs whatever the runs share, where too few share their seeds to tell."""
    each = [(abs(w), _of_mean(o.values.mean(axis=1))) for w, o in terms if len(o.values) > 1]
    return sum(w * math.sqrt(variance) for w, (variance, _) in each) ** 2, min(freedom for _, (_, freedom) in each)


def _rows_of(outcomes: Outcomes) -> Hashable:
    return outcomes.rows, outcomes.values.shape[1]


def _add(sums: dict[Hashable, Matrix], key: Hashable, values: Matrix) -> None:
    sums[key] = sums[key] + values if key in sums else values


def _of_mean(values: Matrix) -> Part:
    return float(values.var(ddof=1)) / values.size, values.size - 1.0


def _chance(values: Matrix) -> float:
    """The part of the variance of the mean that comes from answers explained neither by the row nor by the run."""
    num_runs, num_rows = values.shape
    if num_runs == 1 or num_rows == 1:
        return 0.0
    residual = values - values.mean(axis=0) - values.mean(axis=1, keepdims=True) + values.mean()
    squares = float((residual * residual).sum())
    return squares / float((num_runs - 1) * (num_rows - 1) * values.size)


def _total(parts: Iterable[Part]) -> Part:
    """The sum of independent variances, with Satterthwaite's degrees of freedom.

    >>> _total([(1.0, 2.0), (1.0, 2.0)])
    (2.0, 4.0)
    """
    known = list(parts)
    total = sum(variance for variance, _ in known)
    below = sum(variance * variance / freedom for variance, freedom in known)
    return total, total * total / below if below else math.inf
