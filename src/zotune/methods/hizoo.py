"""HiZOO: directions and steps scaled by a running estimate of the Hessian's diagonal."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Unpack

from torch import Tensor, nn

from zotune.apply.curvature import OfNoise
from zotune.apply.transforms import State
from zotune.directions.direction import Direction
from zotune.directions.samplers import gaussian
from zotune.directions.scaled import Link, ScaledSampler
from zotune.directions.schedule import AnySampler
from zotune.estimate.estimate import GradientEstimate, averaged
from zotune.estimate.estimators import takes
from zotune.estimate.objective import Closure, probing, read
from zotune.estimate.probes import values_at
from zotune.methods.options import OwnDirections, differences, entries_of
from zotune.model.parameters import ParameterSet
from zotune.optim.zeroth_order import ZerothOrder


def hizoo(
    model: nn.Module,
    lr: float,
    *,
    mu: float = 1e-3,
    alpha: float = 1e-8,
    sampler: AnySampler = gaussian,
    num_queries: int = 1,
    **options: Unpack[OwnDirections],
) -> ZerothOrder:
    r"""HiZOO: gradient descent along directions that are shorter where the loss has been curved.

        l± = f(x ± μH^-½z),  l₀ = f(x),  c = (l₊ - l₋)/2μ,  κ = |l₊ + l₋ - 2l₀|/2μ²        z drawn anew
        H ← (1 - α) H + α κ H ⊙ z²,    beginning with H = 1
        x ← x - η c H^-½z        with the new H

    For q > 1 the means of c z and of κ z² over the directions. With α = 0 it is `zo_sgd`. A replay has κ from the
    record.

    At the published α = 1e-8 H hardly moves. A step multiplies it by 1 + α (κz² - 1), which in float32 rounds to 1
    unless κz² > 7, and never rounds to less than 1. What grows is mostly one common factor, a smaller η: E[κ z_j²] is
    half the Hessian's trace, for every element alike, and the curvature of element j itself on top of it. On a
    quadratic of 200 numbers with curvatures from 0.1 to 100 (κ is 1,450 on average), 1,000 steps in float64 bring H to
    1.015 with a standard deviation of 0.0007 between elements, and the correlation of log H with the log curvatures is
    0.28 (tests/methods/test_hizoo.py): after 20,000 steps H^-½ would differ by some 0.2 % between elements. Losses that
    are rounded to 1e-3, as half precision may, add κ = 500 at μ = 1e-3 which is no curvature at all.

    Args:
        model: its parameters that require a gradient are tuned.
        lr: η ≥ 0, as for `zo_sgd`; the paper: 1e-6 for whole models.
        mu: μ > 0. Second differences lose twice as many digits as first ones: take a larger μ than for `zo_sgd`.
        alpha: 0 ≤ α < 1.
        sampler: the distribution of z: `gaussian`, as in the paper. With `rademacher` z² = 1, and H is one number.
        num_queries: q ≥ 1.
        options: those of `ZerothOrder`.

    Forward passes a step: 2q + 1 as in the paper; its code takes one more. Memory: at most the largest tuned tensor.
    State: H, 4 bytes a tuned number (8 for float64).

    Raises:
        ValueError: α is out of range.
        UsageError: the sampler makes directions of a shape of their own.

    Source: Zhao et al., 2024 (HiZOO, arXiv 2402.15173). HiZOO-L, with factors of rows and columns for H, is not here.

    >>> import torch
    >>> model = nn.Linear(3, 1)
    >>> x, y = torch.randn(8, 3), torch.zeros(8, 1)
    >>> opt = hizoo(model, lr=0.05, alpha=1e-2, mu=0.1)
    >>> losses = [opt.step(lambda: nn.functional.mse_loss(model(x), y)) for _ in range(100)]
    >>> losses[-1] < losses[0], opt.num_forwards
    (True, 300)
    """
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha is the share of a new curvature in H, at least 0 and below 1; got {alpha=}")
    link = Link()
    optimizer = ZerothOrder(
        model,
        lr,
        estimator=differences(curvature_difference, mu),
        transform=OfNoise(partial(curvature_step, alpha=alpha)),
        sampler=ScaledSampler(entries_of("hizoo", sampler), link),
        num_queries=num_queries,
        **options,
    )
    link.curvatures = _StateOf(optimizer)
    return optimizer


class _StateOf:
    """H of an optimizer's tensors by their ids. It holds the optimizer, whose state may be replaced."""

    def __init__(self, optimizer: ZerothOrder) -> None:
        self._optimizer = optimizer

    def __call__(self, tensor_id: int) -> Tensor | None:
        tensor = next(t for t in self._optimizer.tuned if t.id == tensor_id)
        found: Tensor | None = self._optimizer.state[tensor.parameter].get("hessian")
        return found


@takes(each=2, at_x=1)
def curvature_difference(
    closure: Closure, tuned: ParameterSet, directions: Sequence[Direction], *, mu: float
) -> GradientEstimate:
    """Two-sided differences, and second differences along the same directions: κᵢ = |l₊ + l₋ - 2l₀|/2μ² as scalars."""
    with probing(tuned.model):
        base, *values = read(values_at(closure, tuned, [None, *((a, u) for u in directions for a in (mu, -mu))]))
    pairs = list(zip(values[::2], values[1::2], strict=True))
    terms = averaged([(plus - minus) / (2 * mu) for plus, minus in pairs], directions)
    curvatures = tuple(abs(plus + minus - 2 * base) / (2 * mu**2) for plus, minus in pairs)
    return GradientEstimate(base, terms, num_forwards=2 * len(directions) + 1, base=base, scalars=curvatures)


vars(curvature_difference)["has_scalars"] = True


def curvature_step(linear: Tensor, squared: Tensor, state: State, *, alpha: float) -> tuple[Tensor, State]:
    """H ← H (1 - α + α Σ κ z²), and H^-½ Σ c z with the new H. The root is taken in double precision."""
    growth = (1 - alpha) + alpha * squared
    hessian = state["hessian"] * growth if state else growth
    return linear / hessian.double().sqrt().to(linear.dtype), {"hessian": hessian}
