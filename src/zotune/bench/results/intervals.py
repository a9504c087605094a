"""Intervals of weighted sums of cells' means, over evaluation rows and seeds at once.

Rows are paired: the models of all cells answer the same ones, so a contrast D[i] = Σ w·y[i] is taken row by row first.
Runs are independent, and what a run's luck adds to its mean is told from its cell's seeds, less what chance answers to
single rows would give. The two parts of the variance have very different degrees of freedom (some hundred rows, two or
three runs a cell), so each gets its own quantile of Student's t, and the squares are added (Graybill and Wang, 1980; on
paired rows of language models' evaluations: Miller, 2024, arXiv 2411.00640). Degrees of freedom of a sum of cells are
Satterthwaite's (1946).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
# A variance and its degrees of freedom.
Part = tuple[float, float]


@dataclass(frozen=True)
class Outcomes:
    """What a cell found.

    Attributes:
        values: [runs, rows]; one column where a run has but one number.
        rows: the name of the set of rows: cells with the same name and as many rows are paired row by row.
    """

    values: Matrix
    rows: str = ""

    @property
    def mean(self) -> float:
        """Over runs and rows."""
        return float(self.values.mean())


@dataclass(frozen=True)
class Estimate:
    """A contrast's value and how sure it is.

    Attributes:
        parts: of its variance; None where a cell has but one number, of which nothing more is known.
        num_runs: of the cell that has the fewest; with one, the parts know rows alone.
        num_rows: of all sets of rows.
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
        """Both ends; all numbers where the error is unknown.

        >>> low, high = Estimate(1.0, ((0.01, 2.0),), 3, 1).interval()
        >>> round(low, 3), round(high, 3), Estimate(1.0, None, 1, 1).interval()
        (0.57, 1.43, (-inf, inf))
        """
        if self.parts is None:
            return -math.inf, math.inf
        from scipy.stats import t

        squares = [variance * float(t.ppf((1 + level) / 2, freedom)) ** 2 for variance, freedom in self.parts]
        half = math.sqrt(sum(squares))
        return self.value - half, self.value + half


def contrast(terms: Sequence[tuple[float, Outcomes]]) -> Estimate:
    """Σ w·mean of one or more cells.

    >>> first = Outcomes(np.array([[1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]))
    >>> second = Outcomes(np.array([[0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0]]))
    >>> contrast([(1.0, first), (-1.0, second)]).value
    0.375
    """
    groups: dict[tuple[str, int], Matrix] = {}
    for weight, outcomes in terms:
        key = outcomes.rows, outcomes.values.shape[1]
        groups[key] = groups.get(key, np.zeros(key[1])) + weight * outcomes.values.mean(axis=0)
    value = sum(float(of_rows.mean()) for of_rows in groups.values())
    by_rows = [_of_mean(of_rows) for of_rows in groups.values() if of_rows.size > 1]
    by_runs = [(w * w * variance, freedom) for w, outcomes in terms for variance, freedom in _of_runs(outcomes.values)]
    chance = sum(w * w * _chance(outcomes.values) for w, outcomes in terms)
    runs, freedom = _total(by_runs)
    parts = (_total(by_rows), (max(runs - chance, 0.0), freedom))
    num_runs = min(len(outcomes.values) for _, outcomes in terms)
    num_rows = sum(of_rows.size for of_rows in groups.values())
    is_known = all(outcomes.values.size > 1 for _, outcomes in terms)
    return Estimate(value, tuple(part for part in parts if part[0]) if is_known else None, num_runs, num_rows)


def _of_mean(values: Matrix) -> Part:
    return float(values.var(ddof=1)) / values.size, values.size - 1.0


def _of_runs(values: Matrix) -> Iterable[Part]:
    """The variance of the mean as the runs' means show it, chance answers included."""
    return [_of_mean(values.mean(axis=1))] if len(values) > 1 else []


def _chance(values: Matrix) -> float:
    """What answers that are neither the row's nor the run's doing add to the variance of the mean."""
    num_runs, num_rows = values.shape
    if num_runs == 1 or num_rows == 1:
        return 0.0
    left = values - values.mean(axis=0) - values.mean(axis=1, keepdims=True) + values.mean()
    squares = float((left * left).sum())
    return squares / float((num_runs - 1) * (num_rows - 1) * values.size)


def _total(parts: Sequence[Part]) -> Part:
    """The sum of independent variances, with Satterthwaite's degrees of freedom.

    >>> _total([(1.0, 2.0), (1.0, 2.0)])
    (2.0, 4.0)
    """
    total = sum(variance for variance, _ in parts)
    below = sum(variance * variance / freedom for variance, freedom in parts)
    return total, total * total / below if below else math.inf
