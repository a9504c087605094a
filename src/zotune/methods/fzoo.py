"""FZOO: one-sided differences along many directions, and steps in units of the losses' spread."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Unpack

from torch import nn

from zotune.directions.direction import Direction
from zotune.directions.samplers import rademacher
from zotune.directions.schedule import AnySampler
from zotune.estimate.coefficients import by_block, standardised
from zotune.estimate.estimate import GradientEstimate
from zotune.estimate.estimators import takes
from zotune.estimate.finite_difference import forward_difference
from zotune.estimate.objective import Closure
from zotune.methods.options import OwnQueries, differences
from zotune.model.parameters import ParameterSet
from zotune.optim.zeroth_order import ZerothOrder


def fzoo(
    model: nn.Module,
    lr: float,
    *,
    mu: float = 1e-3,
    num_queries: int = 8,
    ddof: int = 0,
    per_mu: bool = False,
    sampler: AnySampler = rademacher,
    **options: Unpack[OwnQueries],
) -> ZerothOrder:
    r"""FZOO: steps along many directions, divided by the spread of the losses at their ends.

        l₀ = f(x),  lᵢ = f(x + μuᵢ),  s = std(l₁ … l_N)        for uᵢ ∈ {±1}ᵈ drawn anew each step, i = 1 … N
        x  ← x - η/(N s) Σ (lᵢ - l₀) uᵢ

    The step does not change where f is replaced by a f + b, a > 0, and for a linear f not with μ either; its length is
    about η √(d/N), as of a normalised gradient step. Where all lᵢ are equal (s = 0), x stays. Losses that differ by
    rounding alone still make a step of full length.

    Args:
        model: its parameters that require a gradient are tuned.
        lr: η ≥ 0, about √N times the distance that a parameter goes a step, in units of the parameters. The paper
            tunes all of OPT-13B with 5e-5.
        mu: μ > 0; the paper's is 1e-4.
        num_queries: N ≥ 2; 8 as in the paper.
        ddof: how the sources take std: 0, over N (the released code); 1, over N - 1 (the paper's text).
        per_mu: whether ĝ is divided by μ too, as the paper's text defines it; its algorithm and code leave that to η.
        sampler: the paper's directions are signs; any other sampler works too.
        options: those of `ZerothOrder`.

    Forward passes a step: N + 1. Memory: at most the largest tuned tensor. No state.

    Raises:
        ValueError: N < 2, or ddof is neither 0 nor 1.

    Source: Dang et al., 2025 (FZOO, arXiv 2506.09034). Its variant FZOO-R, which takes half of s from the step before,
    is not here.

    >>> import torch
    >>> model = nn.Linear(3, 1)
    >>> x, y = torch.randn(8, 3), torch.zeros(8, 1)
    >>> opt = fzoo(model, lr=0.02)
    >>> losses = [opt.step(lambda: nn.functional.mse_loss(model(x), y)) for _ in range(100)]
    >>> losses[-1] < losses[0], opt.num_forwards
    (True, 900)
    """
    if num_queries < 2:
        raise ValueError(f"fzoo divides by the spread of the losses along its directions: 2 at least, {num_queries=}")
    if ddof not in (0, 1):
        raise ValueError(f"ddof is 0 (squares over N) or 1 (over N - 1), got {ddof=}")
    estimator = differences(standardised_difference, mu, ddof=ddof, per_mu=per_mu)
    return ZerothOrder(model, lr, estimator=estimator, num_queries=num_queries, sampler=sampler, **options)


@takes(each=1, at_x=1)
def standardised_difference(
    closure: Closure, tuned: ParameterSet, directions: Sequence[Direction], *, mu: float, ddof: int, per_mu: bool
) -> GradientEstimate:
    """One-sided differences by the standard deviation of the losses of a block's directions: cᵢ = (lᵢ - l₀)/s.

    A difference of losses is μ times a slope, and so is their spread, which does not depend on l₀: their ratio is that
    of slopes.
    """
    estimate = forward_difference(closure, tuned, directions, mu=mu)
    found = by_block(estimate, partial(standardised, ddof=ddof))
    return found.mapped(lambda c: c / mu) if per_mu else found
