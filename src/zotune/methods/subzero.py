"""SubZero: directions within a small subspace of rows and columns, which stays for many steps."""

from __future__ import annotations

from typing import Unpack

from torch import nn

from zotune.apply.subspace import InSubspace, coordinates_only
from zotune.directions.samplers import gaussian
from zotune.directions.schedule import AnySampler
from zotune.directions.subspace import subspace
from zotune.estimate.finite_difference import central_difference
from zotune.methods.options import Difference, OwnDirections, differences, entries_of
from zotune.optim.zeroth_order import ZerothOrder


def subzero(
    model: nn.Module,
    lr: float,
    *,
    mu: float = 1e-3,
    rank: int = 24,
    interval: int = 1000,
    square: bool = False,
    difference: Difference = central_difference,
    sampler: AnySampler = gaussian,
    num_queries: int = 1,
    **options: Unpack[OwnDirections],
) -> ZerothOrder:
    r"""SubZero: gradient descent along directions in a subspace of r² numbers for each matrix.

        Uᵢ = √(mn)/r L Zᵢ Rᵀ        Zᵢ (r × r) drawn anew, L (m × r), R (n × r) orthonormal and renewed every T steps
        cᵢ = (f(W + μUᵢ) - f(W - μUᵢ)) / 2μ,    W ← W - η (1/q) Σ cᵢUᵢ

    The factor makes a direction as long as a dense one, E‖U‖² = mn, so η and μ are those of `zo_sgd`. Tensors of fewer
    than two dimensions get dense directions; a matrix with a side smaller than r has one of that rank.

    Args:
        model: its parameters that require a gradient are tuned.
        lr: η ≥ 0, as for `zo_sgd`; the paper tunes all of a language model with 1e-7.
        mu: μ > 0.
        rank: r ≥ 1; the paper: 24 to 48 for whole models, 4 to 8 for adapters.
        interval: T ≥ 1 steps; the paper: 500 to 2000.
        square: reshape each m × n to the a × b = mn that is nearest to a square before the subspace is drawn, as the
            paper does with the thin matrices of adapters, whose rank would else be at most their short side.
        difference: `central_difference` or `forward_difference`.
        sampler: the distribution of the entries of Z: `gaussian`, as in the paper, or `rademacher`.
        num_queries: q ≥ 1.
        options: those of `ZerothOrder`.

    Forward passes a step: 2q, or q + 1. Memory: L and R, 4 r bytes for each row and column. No state.

    Raises:
        UsageError: the sampler makes directions of its own.

    Source: Yu et al., 2024 (SubZero, arXiv 2410.08989). Its released code reshapes row by row, with the smallest b - a
    of all factors a ≤ b, and does so for every matrix of an adapter; that is `square`.

    >>> import torch
    >>> model = nn.Linear(6, 5)
    >>> x, y = torch.randn(8, 6), torch.zeros(8, 5)
    >>> opt = subzero(model, lr=0.02, rank=2, interval=20)
    >>> losses = [opt.step(lambda: nn.functional.mse_loss(model(x), y)) for _ in range(100)]
    >>> losses[-1] < losses[0]
    True
    """
    directions = subspace(entries_of("subzero", sampler), rank, interval=interval, sides="both", square=square)
    return ZerothOrder(
        model,
        lr,
        estimator=differences(difference, mu),
        transform=InSubspace(coordinates_only),
        sampler=directions,
        num_queries=num_queries,
        **options,
    )
