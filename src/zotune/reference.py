"""Each method written plainly, in the paper's letters: float64, every direction u stored whole.

Nothing here is shared with the package: tests hold the fast code against it. f maps a position to the
objective's value; u[t] holds the q directions of step t; a path is the positions x₁, x₂, …
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Objective = Callable[[Vector], float]
Gradient = Callable[[Vector], Vector]
Estimate = Callable[[Vector, Sequence[Vector]], Vector]
Directions = Sequence[Sequence[Vector]]
Path = list[Vector]


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


def sign_rge(f: Objective, x: Vector, mu: float, u: Sequence[Vector]) -> Vector:
    """The signs of central differences along u₁ … u_q, averaged: appendix A, ZO-Sign-SGD."""
    g = np.zeros_like(x)
    for u_i in u:
        g += np.sign((f(x + mu * u_i) - f(x - mu * u_i)) / (2 * mu)) * u_i
    return g / len(u)


def forward_gradient(gradient: Gradient, x: Vector, u: Sequence[Vector]) -> Vector:
    """(∇fᵀu) u along u₁ … u_q, averaged; section 3 and appendix A."""
    g = np.zeros_like(x)
    for u_i in u:
        g += (gradient(x) @ u_i) * u_i
    return g / len(u)


def block_rge(f: Objective, x: Vector, mu: float, u: Sequence[Vector], blocks: Sequence[Vector]) -> Vector:
    """Σ_b of (RGE) along u restricted to block b, all at the same x; blocks are vectors of 0 and 1. Section 5."""
    g = np.zeros_like(x)
    for block in blocks:
        g += rge(f, x, mu, [block * u_i for u_i in u])
    return g


def zo_sgd(estimate: Estimate, x: Vector, eta: float, u: Directions, weight_decay: float = 0.0) -> Path:
    """x_{t+1} = x_t - η ĝ_t, and - η λ x_t with decoupled weight decay."""
    path = []
    for u_t in u:
        x = x - eta * estimate(x, u_t) - eta * weight_decay * x
        path.append(x)
    return path


def sequential_zo_sgd(f: Objective, x: Vector, eta: float, mu: float, u: Directions, blocks: Sequence[Vector]) -> Path:
    """Block after block within a step, each estimated where the last one's update has led."""
    path = []
    for u_t in u:
        for block in blocks:
            x = x - eta * rge(f, x, mu, [block * u_i for u_i in u_t])
        path.append(x)
    return path


def zo_sgd_elementwise_sign(estimate: Estimate, x: Vector, eta: float, u: Directions) -> Path:
    """x_{t+1} = x_t - η sign(ĝ_t), element by element; section 3."""
    path = []
    for u_t in u:
        x = x - eta * np.sign(estimate(x, u_t))
        path.append(x)
    return path


def zo_sgd_mmt(estimate: Estimate, x: Vector, eta: float, beta: float, u: Directions) -> Path:
    """m_t = β m_{t-1} + ĝ_t, x_{t+1} = x_t - η m_t; appendix A."""
    m, path = np.zeros_like(x), []
    for u_t in u:
        m = beta * m + estimate(x, u_t)
        x = x - eta * m
        path.append(x)
    return path


def zo_sgd_cons(f: Objective, estimate: Estimate, x: Vector, eta: float, u: Directions) -> Path:
    """x_{t+1} = argmin of f over {x_t, x_t - η ĝ_t, x_t + η ĝ_t}; appendix A."""
    path = []
    for u_t in u:
        g = estimate(x, u_t)
        x = min((x, x - eta * g, x + eta * g), key=f)
        path.append(x)
    return path


def zo_adam(
    estimate: Estimate, x: Vector, eta: float, betas: tuple[float, float], eps: float, adam: str, u: Directions
) -> Path:
    """ZO-Adam in three readings: "torch" (Kingma and Ba), "adamm" (appendix A), "amsgrad" (Chen et al., 2019)."""
    beta1, beta2 = betas
    m, v, largest, path = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x), []
    for t, u_t in enumerate(u, start=1):
        g, v_before = estimate(x, u_t), v
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        largest = np.maximum(largest, v)
        if adam == "torch":
            step = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
        elif adam == "adamm":
            step = m / (np.sqrt(np.maximum(v, v_before)) + eps)
        else:
            step = m / (np.sqrt(largest) + eps)
        x = x - eta * step
        path.append(x)
    return path


def hybrid(
    f: Objective, gradient: Gradient, x: Vector, etas: tuple[float, float], mu: float, u: Directions, shallow: Vector
) -> Path:
    """Shallow entries by (RGE), the others by ∇f, both at the same x; `shallow` is a vector of 0 and 1. Section 5."""
    eta_zo, eta_fo = etas
    path = []
    for u_t in u:
        zeroth, first = rge(f, x, mu, [shallow * u_i for u_i in u_t]), (1 - shallow) * gradient(x)
        x = x - eta_zo * zeroth - eta_fo * first
        path.append(x)
    return path
