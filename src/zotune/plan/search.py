"""The largest batch or length that fits: a search that needs few predictions."""

from __future__ import annotations

from collections.abc import Callable

Bytes = Callable[[int], int]


def largest(bytes_of: Bytes, limit: int, most: int, start: int = 1) -> int:
    """The largest n up to `most` with bytes_of(n) ≤ limit, where n + 1 takes more; 0 where not even 1 fits.

    `bytes_of` grows nearly in proportion, so that a straight line through two points guesses well; below `start` it may
    jump down once (where probes begin to run one by one), and is searched only if `start` itself does not fit.

    >>> largest(lambda n: 100 + 7 * n, limit=150, most=1000)
    7
    """
    known: dict[int, int] = {}

    def takes(n: int) -> int:
        known[n] = known[n] if n in known else bytes_of(n)
        return known[n]

    start = max(1, min(start, most))
    low, high = (start, most + 1) if takes(start) <= limit else (0, start)
    while high - low > 1:
        guess = _guess(known, low, high, limit)
        low, high = (guess, high) if takes(guess) <= limit else (low, guess)
    return low


def _guess(known: dict[int, int], low: int, high: int, limit: int) -> int:
    """Where a line through what is known crosses the limit; strictly between low and high."""
    points = sorted((n, b) for n, b in known.items() if low <= n <= high)
    if len(points) < 2:
        return max(low + 1, min(2 * max(low, 1), high - 1)) if low else high // 2
    (n, b), (m, c) = points[-2:] if points[-1][0] == low else points[:2]
    crossing = n + (limit - b) * (m - n) / (c - b) if c != b else high
    return int(max(low + 1, min(crossing, high - 1)))
