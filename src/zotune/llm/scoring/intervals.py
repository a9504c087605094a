"""95 % confidence intervals of a rate, of a mean and of a ratio of sums."""

from __future__ import annotations

import math
from collections.abc import Sequence

NORMAL = 1.959963984540054
"""Half the width of the 95 % interval of a standard normal variable."""


def wilson(hits: float, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a success rate: the p with |hits/n - p| ≤ z √(p(1 - p)/n) (Wilson, 1927).

    >>> [round(end, 3) for end in wilson(80, 100)]
    [0.711, 0.867]
    """
    rate, z = hits / n, NORMAL
    divisor = 2 * (n + z**2)
    middle = (2 * n * rate + z**2) / divisor
    half = z / divisor * math.sqrt(4 * n * rate * (1 - rate) + z**2)
    return 0.0 if hits == 0 else middle - half, 1.0 if hits == n else middle + half


def mean_interval(values: Sequence[float], low: float = 0.0, high: float = 1.0) -> tuple[float, float]:
    """Return the 95 % interval of a mean of values in [low, high] (normal distribution); [low, high] for one value.

    Values that are all equal have no spread of their own, and yet a few of them leave much open: their mean has
    Wilson's interval as a rate, the spread of which no values in the same range exceed.

    >>> [round(end, 3) for end in mean_interval([0.0, 1.0, 1.0, 0.5] * 25)]
    [0.543, 0.707]
    >>> [round(end, 3) for end in mean_interval([1.0] * 10)]
    [0.722, 1.0]
    """
    n = len(values)
    if n < 2:
        return low, high
    if min(values) == max(values) and math.isfinite(high - low):
        ends = wilson(n * (values[0] - low) / (high - low), n)
        return low + ends[0] * (high - low), low + ends[1] * (high - low)
    mean = sum(values) / n
    half = NORMAL * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return max(low, mean - half), min(high, mean + half)


def ratio_interval(totals: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """Return the 95 % interval of r = Σ totals / Σ counts ≥ 0 over independent pairs, by the normal distribution.

    The variance is n/(n - 1) Σ (total - r count)² / (Σ counts)² (Cochran, 1977, section 2.11). For one pair the
    interval
    is [0, ∞).

    >>> [round(end, 3) for end in ratio_interval([1.0, 2.0, 3.0, 2.0], [1, 1, 1, 1])]
    [1.2, 2.8]
    """
    n, ratio = len(totals), sum(totals) / sum(counts)
    if n < 2:
        return 0.0, math.inf
    squares = sum((t - ratio * c) ** 2 for t, c in zip(totals, counts, strict=True))
    half = NORMAL * math.sqrt(n / (n - 1) * squares) / sum(counts)
    return max(0.0, ratio - half), ratio + half
