"""The search for the largest batch or length that fits; it needs few predictions."""

from __future__ import annotations

from collections.abc import Callable

Bytes = Callable[[int], int]


def largest(bytes_of: Bytes, limit: int, most: int, start: int = 1) -> int:
    """The largest n up to `most` with bytes_of(n) ≤ limit, where n + 1 needs more; 0 if even 1 does not fit.

    `bytes_of` is nearly linear, so a straight line through two points gives a good guess. It may drop once at `start`
    (where probes begin to run one by one); smaller values are searched only if `start` itself does not fit.

    >>> largest(lambda n: 100 + 7 * n, limit=150, most=1000)
    7
    """
    known: dict[int, int] = {}

    def cached_bytes(n: int) -> int:
        known[n] = known[n] if n in known else bytes_of(n)
        return known[n]

    start = max(1, min(start, most))
    low, high = (start, most + 1) if cached_bytes(start) <= limit else (0, start)
    while high - low > 1:
        guess = _guess(known, low, high, limit)
        low, high = (guess, high) if cached_bytes(guess) <= limit else (low, guess)
    return low


def _guess(known: dict[int, int], low: int, high: int, limit: int) -> int:
    """The n at which a line through known points crosses the limit; strictly between low and high."""
    points = sorted((n, b) for n, b in known.items() if low <= n <= high)
    if len(points) < 2:
        return max(low + 1, min(2 * max(low, 1), high - 1)) if low else high // 2
    (n, b), (m, c) = points[-2:] if points[-1][0] == low else points[:2]
    crossing = n + (limit - b) * (m - n) / (c - b) if c != b else high
    return int(max(low + 1, min(crossing, high - 1)))
