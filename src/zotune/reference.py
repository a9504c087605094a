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


# ---- beyond the paper: c[t] are the coefficients that `measure` finds at x along u[t] ----

Measure = Callable[[Vector, Sequence[Vector]], Sequence[float]]
# Indices into x, as a matrix: x[where] is one weight matrix W.
Where = NDArray[np.intp]
# By step: for each matrix its basis, and the coordinates of the step's directions in it.
Bases = Sequence[Sequence[Vector]]
Coordinates = Sequence[Sequence[Sequence[Vector]]]


def central(f: Objective, x: Vector, mu: float, u: Sequence[Vector]) -> list[float]:
    """The coefficients of `rge`."""
    return [(f(x + mu * u_i) - f(x - mu * u_i)) / (2 * mu) for u_i in u]


def one_sided(f: Objective, x: Vector, mu: float, u: Sequence[Vector]) -> list[float]:
    """The coefficients of `one_sided_rge`."""
    return [(f(x + mu * u_i) - f(x)) / mu for u_i in u]


def fzoo(f: Objective, x: Vector, mu: float, u: Sequence[Vector], ddof: int = 0) -> list[float]:
    """The differences l_i - l_0 by the standard deviation of the l_i: FZOO."""
    losses = np.array([f(x + mu * u_i) for u_i in u])
    spread = losses.std(ddof=ddof)
    return [0.0] * len(u) if spread == 0 else list((losses - f(x)) / spread)


def randopt(f: Objective, x: Vector, mu: float, u: Sequence[Vector], keep: int, only_better: bool) -> list[float]:
    """-q/k for the k best of the points x + μ u_i, which `descend` makes their mean; 0 for the others."""
    losses = [f(x + mu * u_i) for u_i in u]
    chosen = [i for i in np.argsort(losses)[:keep] if losses[i] < f(x) or not only_better]
    return [-len(u) / len(chosen) if i in chosen else 0.0 for i in range(len(u))]


def descend(measure: Measure, x: Vector, eta: float, u: Directions) -> Path:
    """x_{t+1} = x_t - η (1/q) Σ c_i u_i."""
    path = []
    for u_t in u:
        c = measure(x, u_t)
        x = x - eta * _mean(c, u_t)
        path.append(x)
    return path


def newton_schulz(g: Vector) -> Vector:
    """NS₅: X = G/‖G‖_F; five times A = XXᵀ, X ← aX + (bA + cA²)X."""
    x = g / np.linalg.norm(g)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def zo_muon(
    measure: Measure,
    x: Vector,
    etas: tuple[float, float],
    u: Directions,
    matrices: Sequence[Where],
    p: Bases,
    psi: Coordinates,
) -> Path:
    """W ← W - η P NS₅(G), G = (1/q) Σ c_i Ψ_i; other numbers by `descend` with the second η."""
    path = []
    for t, u_t in enumerate(u):
        c = measure(x, u_t)
        x = _others(x, etas[1], c, u_t, matrices)
        for where, p_w, psi_w in zip(matrices, p[t], psi[t], strict=True):
            g = _mean(c, psi_w)
            x[where] -= etas[0] * p_w @ newton_schulz(g)
        path.append(x)
    return path


def mopi(
    measure: Measure,
    x: Vector,
    etas: tuple[float, float],
    beta: float,
    u: Directions,
    matrices: Sequence[Where],
    p: Bases,
    psi: Coordinates,
    v: Sequence[Vector],
) -> Path:
    """M ← β M + (1 - β) G, at a renewal first M ← PᵀP_old M; V ← qr(Mᵀ(MV)), W ← W - η P U Vᵀ, U = MV normalised."""
    path, m, v = [], [0.0 * psi_w[0] for psi_w in psi[0]], list(v)
    for t, u_t in enumerate(u):
        c = measure(x, u_t)
        x = _others(x, etas[1], c, u_t, matrices)
        for k, where in enumerate(matrices):
            g = _mean(c, psi[t][k])
            carried = m[k] if t == 0 or p[t][k] is p[t - 1][k] else p[t][k].T @ p[t - 1][k] @ m[k]
            m[k] = beta * carried + (1 - beta) * g
            v[k], triangle = np.linalg.qr(m[k].T @ (m[k] @ v[k]))
            v[k] = v[k] * np.sign(np.diag(triangle))
            found = m[k] @ v[k]
            x[where] -= etas[0] * p[t][k] @ (found / np.linalg.norm(found, axis=0)) @ v[k].T
        path.append(x)
    return path


def lozo(
    measure: Measure,
    x: Vector,
    eta: float,
    beta: float,
    u: Directions,
    matrices: Sequence[Where],
    v: Bases,
    a: Coordinates,
) -> Path:
    """M ← β M + (1 - β) G, G = (1/q) Σ c_i A_i, at a renewal first M ← M V_oldᵀV/n; W ← W - η M Vᵀ; others alike."""
    path, m, rest = [], [0.0 * a_w[0] for a_w in a[0]], 0.0 * x
    for t, u_t in enumerate(u):
        c = measure(x, u_t)
        mean = _mean(c, u_t)
        rest = beta * rest + (1 - beta) * mean
        before, x = x, x - eta * rest
        for k, where in enumerate(matrices):
            g = _mean(c, a[t][k])
            new = t > 0 and v[t][k] is not v[t - 1][k]
            carried = m[k] @ v[t - 1][k].T @ v[t][k] / len(v[t][k]) if new else m[k]
            m[k] = beta * carried + (1 - beta) * g
            x[where] = before[where] - eta * m[k] @ v[t][k].T
        path.append(x)
    return path


def _mean(c: Sequence[float], u: Sequence[Vector]) -> Vector:
    """(1/q) Σ c_i u_i."""
    return np.asarray(np.mean([c_i * u_i for c_i, u_i in zip(c, u, strict=True)], axis=0))


def _others(x: Vector, eta: float, c: Sequence[float], u: Sequence[Vector], matrices: Sequence[Where]) -> Vector:
    """A step of `descend` of the numbers that are in no matrix."""
    moved = x - eta * _mean(c, u)
    for where in matrices:
        moved[where] = x[where]
    return moved
