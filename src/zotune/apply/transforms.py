"""h of the paper's equation (2): what happens to a gradient estimate before it is applied.

A transform is a pure, element-wise function (part of ĝ for some elements, their state) → (step, new
state). The state begins empty; it is in float32 whatever the weights' dtype (float64 for float64
weights) and lives in the optimizer's `state`. Being element-wise, a transform may be given any slice
of a tensor, so that ĝ is never in memory as a whole.

Before ĝ is put together, its coefficients may be changed one by one: see `sign` and `clipped`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]
Transform = Callable[[Tensor, State], tuple[Tensor, State]]
Coefficient = Callable[[float], float]


def identity(gradient: Tensor, state: State) -> tuple[Tensor, State]:
    """h(ĝ) = ĝ: ZO-SGD. Needs no ĝ in memory: its terms are added to the weights in one pass."""
    return gradient, state


def elementwise_sign(gradient: Tensor, state: State) -> tuple[Tensor, State]:
    """h(ĝ) = sign(ĝ), element by element; sign(0) = 0. The paper, section 3."""
    return gradient.sign(), state


def momentum(gradient: Tensor, state: State, *, beta: float) -> tuple[Tensor, State]:
    """Momentum: m ← β m + ĝ and h = m, starting from m = 0. The paper, appendix A; no average: ĝ is not scaled by 1 -
    β.
    """
    m = beta * state["momentum_buffer"] + gradient if state else gradient
    return m, {"momentum_buffer": m}


def adam(gradient: Tensor, state: State, *, beta1: float, beta2: float, eps: float) -> tuple[Tensor, State]:
    """Adam: h = m̂ / (√v̂ + ε) with m̂ = m / (1 - β₁ᵗ), v̂ = v / (1 - β₂ᵗ): Kingma and Ba, 2015; `torch.optim.Adam`."""
    m, v, t = _moments(gradient, state, beta1, beta2)
    step = (m / (1 - beta1**t)) / (_root(v / (1 - beta2**t)) + eps)
    return step, {"exp_avg": m, "exp_avg_sq": v, "step": t}


def adamm(gradient: Tensor, state: State, *, beta1: float, beta2: float, eps: float) -> tuple[Tensor, State]:
    """H = m / (√max(vₜ, vₜ₋₁) + ε): the paper's appendix A to the letter, but for ε, without which 0 / 0 occurs.

    The maximum is over two successive v only, and nothing corrects the bias of m and v towards 0.
    """
    before = state["exp_avg_sq"] if state else torch.zeros_like(gradient)
    m, v, t = _moments(gradient, state, beta1, beta2)
    return m / (_root(torch.maximum(v, before)) + eps), {"exp_avg": m, "exp_avg_sq": v, "step": t}


def amsgrad(gradient: Tensor, state: State, *, beta1: float, beta2: float, eps: float) -> tuple[Tensor, State]:
    """AMSGrad: h = m / (√v̂ + ε) with v̂ₜ = max(v̂ₜ₋₁, vₜ), the largest v so far: ZO-AdaMM (Chen et al., 2019)."""
    m, v, t = _moments(gradient, state, beta1, beta2)
    largest = torch.maximum(v, state["max_exp_avg_sq"]) if state else v
    return m / (_root(largest) + eps), {"exp_avg": m, "exp_avg_sq": v, "max_exp_avg_sq": largest, "step": t}


def _moments(gradient: Tensor, state: State, beta1: float, beta2: float) -> tuple[Tensor, Tensor, int]:
    """The moments m ← β₁ m + (1 - β₁) ĝ and v ← β₂ v + (1 - β₂) ĝ², both starting from 0, and the step number t ≥ 1."""
    m, v = (1 - beta1) * gradient, (1 - beta2) * gradient.square()
    if state:
        m, v = beta1 * state["exp_avg"] + m, beta2 * state["exp_avg_sq"] + v
    return m, v, state.get("step", 0) + 1


def _root(v: Tensor) -> Tensor:
    """√v rounded to the nearest float on every machine: the mathematical library that torch calls may err in the last
    bit.

    Of a root taken in double precision no error is left by rounding it.
    """
    return v.double().sqrt().to(v.dtype)


ADAMS: dict[str, Callable[..., tuple[Tensor, State]]] = {"torch": adam, "adamm": adamm, "amsgrad": amsgrad}
"""The readings of "Adam" by name."""


def unchanged(c: float) -> float:
    """The coefficient as it is."""
    return c


def sign(c: float) -> float:
    """The sign of a directional derivative, 0 for 0. The paper, appendix A (ZO-Sign-SGD).

    >>> sign(-0.3), sign(0.0)
    (-1.0, 0.0)
    """
    return math.copysign(1.0, c) if c else 0.0


def clipped(c: float, *, limit: float) -> float:
    """Clip the coefficient to [-limit, limit].

    >>> clipped(7.0, limit=2.0)
    2.0
    """
    return min(max(c, -limit), limit)
