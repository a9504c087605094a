"""The paper's methods by name: each one expression over direction, estimate, transform and apply."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import nn

from zotune.directions import Sampler, rademacher
from zotune.estimators import central_difference
from zotune.optimizer import Rounding, ZerothOrder


def zo_sgd(
    model: nn.Module,
    lr: float,
    *,
    mu: float = 1e-3,
    num_queries: int = 1,
    sampler: Sampler = rademacher,
    difference: Callable[..., Any] = central_difference,
    rounding: Rounding | str = Rounding.STOCHASTIC,
    seed: int = 0,
    params: Iterable[Any] | None = None,
) -> ZerothOrder:
    r"""ZO-SGD, also known as MeZO: gradient descent along a few random directions.

        cᵢ = (f(x + μuᵢ) - f(x - μuᵢ)) / 2μ        for uᵢ drawn anew each step, i = 1 … q
        x  ← x - η (1/q) Σ cᵢ uᵢ

    Args:
        model: its parameters that require a gradient are tuned.
        lr: η ≥ 0. Full tuning of a language model wants some 1e-6, adapters 1e-4 to 1e-2.
        mu: μ > 0, the distance moved along u, in units of the parameters. Too small: rounding of the loss
            (bfloat16 weights want at least 1e-3); too large: a bias of O(μ²).
        num_queries: q ≥ 1; the variance falls as 1/q.
        sampler: `rademacher` (cheapest, smallest variance) or `gaussian` (the paper's).
        difference: `central_difference` (2q forward passes) or `forward_difference` (q + 1).
        rounding: how half-precision weights are written; see `Rounding`.
        seed: names the run.
        params: tune these parameters (or torch's groups of them) instead.

    Memory: that of inference, and at most the largest tuned tensor. No state.

    Source: the paper, section 3, equations (RGE) and (2) with h(ĝ) = ĝ; Ghadimi and Lan, 2013; Malladi et
    al., 2023 (arXiv 2305.17333).

    >>> import torch
    >>> model = nn.Linear(3, 1)
    >>> x, y = torch.randn(8, 3), torch.zeros(8, 1)
    >>> opt = zo_sgd(model, lr=0.05)
    >>> losses = [opt.step(lambda: nn.functional.mse_loss(model(x), y)) for _ in range(100)]
    >>> losses[-1] < losses[0]
    True
    """
    if not mu > 0:
        raise ValueError(f"mu is the distance moved along a direction and must be positive, got {mu=}")
    return ZerothOrder(
        model,
        lr,
        estimator=partial(difference, mu=mu),
        sampler=sampler,
        num_queries=num_queries,
        rounding=rounding,
        seed=seed,
        params=params,
    )


METHODS: dict[str, Callable[..., ZerothOrder]] = {"zo_sgd": zo_sgd}
"""Every zeroth-order method by name: feeds the command line, the docs and the tests."""
