"""Each method written plainly, in the paper's letters: float64, every direction u stored whole.

Nothing here is shared with the package: tests hold the fast code against it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Objective = Callable[[Vector], float]


def rge(f: Objective, x: Vector, mu: float, u: Sequence[Vector]) -> Vector:
    """The randomized gradient estimate, equation (RGE): central differences along u₁ … u_q, averaged.

    >>> rge(lambda x: float(x @ x), np.array([1.0, 2.0]), 0.1, [np.array([1.0, -1.0])]).round(6).tolist()
    [-2.0, 2.0]
    """
    g = np.zeros_like(x)
    for u_i in u:
        g += (f(x + mu * u_i) - f(x - mu * u_i)) / (2 * mu) * u_i
    return g / len(u)


def one_sided_rge(f: Objective, x: Vector, mu: float, u: Sequence[Vector]) -> Vector:
    """The same with forward differences."""
    g = np.zeros_like(x)
    for u_i in u:
        g += (f(x + mu * u_i) - f(x)) / mu * u_i
    return g / len(u)


def zo_sgd(f: Objective, x: Vector, eta: float, mu: float, u: Sequence[Sequence[Vector]]) -> list[Vector]:
    """x_{t+1} = x_t - η ĝ_t; the positions x₁, x₂, … for the directions u[t] of each step."""
    path = []
    for u_t in u:
        x = x - eta * rge(f, x, mu, u_t)
        path.append(x)
    return path
