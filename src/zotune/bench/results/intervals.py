"""Confidence intervals of weighted sums of cells' means, over evaluation rows and seeds together.

Rows are paired: the models of all cells answer the same rows, so a contrast D[i] = Σ w·y[i] is computed row by row.
Runs are independent. The variance between runs is estimated from the means of a cell's seeds, minus the variance that
random answers to single rows would cause. The two parts of the variance have very different degrees of freedom (some
hundred rows, two or three runs per cell), so each has its own quantile of Student's t, and the squares are added
(Graybill and Wang, 1980; for paired rows in evaluations of language models: Miller, 2024, arXiv 2411.00640). The
degrees of freedom of a sum of cells are Satterthwaite's (1946).
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
    """The outcomes of a cell's runs.

    Attributes:
        values: array of shape [runs, rows]; one column if each run has a single number.
        rows: name of the set of rows; cells with the same name and number of rows are paired row by row.
    """

    values: Matrix
    rows: str = ""

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
        num_rows: number of rows of all sets of rows.
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
        from scipy.stats import t

        squares = [variance * float(t.ppf((1 + level) / 2, freedom)) ** 2 for variance, freedom in self.parts]
        half = math.sqrt(sum(squares))
        return self.value - half, self.value + half


def contrast(terms: Sequence[tuple[float, Outcomes]]) -> Estimate:
    """The weighted sum of the means of one or more cells, Σ w·mean.

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
    """The variance of the mean estimated from the runs' means, which includes the variance of random answers."""
    return [_of_mean(values.mean(axis=1))] if len(values) > 1 else []


def _chance(values: Matrix) -> float:
    """The part of the variance of the mean that comes from answers explained neither by the row nor by the run."""
    num_runs, num_rows = values.shape
    if num_runs == 1 or num_rows == 1:
        return 0.0
    residual = values - values.mean(axis=0) - values.mean(axis=1, keepdims=True) + values.mean()
    squares = float((residual * residual).sum())
    return squares / float((num_runs - 1) * (num_rows - 1) * values.size)


def _total(parts: Sequence[Part]) -> Part:
    """The sum of independent variances, with Satterthwaite's degrees of freedom.

    >>> _total([(1.0, 2.0), (1.0, 2.0)])
    (2.0, 4.0)
    """
    total = sum(variance for variance, _ in parts)
    below = sum(variance * variance / freedom for variance, freedom in parts)
    return total, total * total / below if below else math.inf
