"""How many directions pay: while the examples' gradients agree each further one does, once they differ none does.

With k groups of equally many of B examples, E‖ĝ‖² is about d (‖∇f‖²/k + σ²/B), where σ² = mean ‖∇fᵢ‖² - ‖∇f‖². So
against one direction the variance falls by the factor

    gain(k) = (‖∇f‖² + σ²/B) / (‖∇f‖²/k + σ²/B) = (ρ + 1) / (ρ/k + 1),    ρ = B ‖∇f‖²/σ²,

which is k while examples agree (ρ ≫ k) and never more than ρ + 1. Both norms follow from the slopes dᵢ of examples
along the directions of their groups: E[dᵢ²] = ‖∇fᵢ‖², and E[dᵢ dⱼ] = ∇fᵢ·∇fⱼ for two examples of one group.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Weight of the past in the running means, and the steps before they are believed.
_DECAY, _FIRST = 0.95, 5
# The number of directions that is chosen is at least so many times ρ: of the possible gain all but a fifth.
_TIMES = 4.0

# Running means of products of two examples' slopes and of their squares, and the steps that they are of.
Seen = Sequence[float]


def products_and_squares(slopes: NDArray[np.float64], groups: NDArray[np.int64]) -> tuple[float, float]:
    """Return the mean product of two slopes of one group, and the mean square; 0 where no group has two examples.

    >>> products_and_squares(np.array([1.0, 3.0, 2.0]), np.array([0, 0, 1]))
    (3.0, 4.666666666666667)
    """
    sizes, sums = np.bincount(groups).astype(float), np.bincount(groups, slopes)
    squares = float(np.square(slopes).sum())
    pairs = float((sizes * (sizes - 1)).sum())
    return (float(np.square(sums).sum()) - squares) / pairs if pairs else 0.0, squares / len(slopes)


def after(seen: Seen | None, product: float, square: float) -> list[float]:
    """The running means after one more step."""
    before = (0.0, 0.0, 0.0) if seen is None else seen
    means = (_DECAY * old + (1 - _DECAY) * new for old, new in zip(before[:2], (product, square), strict=True))
    return [*means, before[2] + 1]


def agreement(seen: Seen) -> float:
    """‖∇f‖² / mean ‖∇fᵢ‖², between 0 and 1."""
    return min(1.0, max(0.0, seen[0] / seen[1])) if seen[1] > 0 else 1.0


def gain(seen: Seen | None, k: int, num_examples: int) -> float:
    """The factor by which k directions lower the variance of ĝ against one; 1 while too little was seen.

    >>> gain([1.0, 1.0, 9], k=8, num_examples=16), gain([0.0, 1.0, 9], k=8, num_examples=16)
    (8.0, 1.0)
    """
    if seen is None or seen[2] < _FIRST:
        return 1.0
    together = agreement(seen)
    noise = (1 - together) / num_examples
    return (together + noise) / (together / k + noise)


def directions_that_pay(seen: Seen | None, num_examples: int) -> int:
    """A power of two, at most half the examples, so that groups have two: beyond it the gain hardly grows.

    >>> directions_that_pay(None, 64), directions_that_pay([0.02, 1.0, 9], 64), directions_that_pay([0.0, 1.0, 9], 64)
    (32, 8, 1)
    """
    most = max(1, num_examples // 2)
    if seen is None or seen[2] < _FIRST:
        wanted = float(most)
    else:
        together = agreement(seen)
        wanted = most if together == 1 else _TIMES * num_examples * together / (1 - together)
    k = 1
    while k < wanted and 2 * k <= most:
        k *= 2
    return k
