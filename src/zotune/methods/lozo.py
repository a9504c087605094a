"""LOZO: directions of low rank whose right factor stays for some steps, with momentum in the left one's space."""

from __future__ import annotations

from functools import partial
from typing import Unpack

from torch import Tensor, nn

from zotune.apply.subspace import Basis, InSubspace
from zotune.apply.transforms import State
from zotune.directions.low_rank import low_rank
from zotune.directions.samplers import gaussian
from zotune.directions.schedule import AnySampler
from zotune.errors import UsageError
from zotune.estimate.finite_difference import central_difference
from zotune.methods.options import Difference, OwnDirections, check_decay, differences, entries_of
from zotune.optim.zeroth_order import ZerothOrder


def lozo(
    model: nn.Module,
    lr: float,
    *,
    mu: float = 1e-3,
    rank: int = 2,
    interval: int = 50,
    beta: float = 0.0,
    scale: str = "mean",
    difference: Difference = central_difference,
    sampler: AnySampler = gaussian,
    num_queries: int = 1,
    **options: Unpack[OwnDirections],
) -> ZerothOrder:
    r"""LOZO: gradient descent along matrices of low rank, with momentum where they vary.

        Uᵢ = Aᵢ Vᵀ/√r        Aᵢ (m × r) drawn anew for each direction, V (n × r) every ν steps
        cᵢ = (f(W + μUᵢ) - f(W - μUᵢ)) / 2μ,    G = (1/q) Σ cᵢAᵢ/√r
        M  ← β M + (1 - β) G,    W ← W - η M Vᵀ;    where V is renewed, first M ← M V_oldᵀV/n

    The steps of an interval together have rank r. With β = 0 it is `zo_sgd` with `zo.low_rank(gaussian, r,
    interval=ν)`; M is a state of m r numbers for a matrix in place of m n. Tensors of fewer than two dimensions get
    dense directions, and with β > 0 the same average m ← β m + (1 - β) ĝ of their own.

    Args:
        model: its parameters that require a gradient are tuned.
        lr: η ≥ 0, as for `zo_sgd`; the paper tunes whole models with 1e-7 and 1e-6.
        mu: μ > 0, for directions with E‖U‖² = mn. The paper moves along A Vᵀ, so its μ (1e-3) is this one by √r.
        rank: r ≥ 1; the paper: 1 or 2, for masked models 4 or 8.
        interval: ν ≥ 2 steps; the paper: 50 or 100. With 1 use `zo_sgd` and `zo.low_rank`.
        beta: 0 ≤ β < 1; the paper's LOZO-M has 0.9.
        scale: "mean": steps as above, which are the paper's, divided by r; "sum": r times as long for matrices, as
            those of the released code.
        difference: `central_difference` or `forward_difference`.
        sampler: the distribution of the factors' entries: `gaussian`, as in the paper, or `rademacher`.
        num_queries: q ≥ 1.
        options: those of `ZerothOrder`.

    Forward passes a step: 2q, or q + 1. Memory: the factors of one matrix. State: none; with β > 0, 4 r bytes for each
    row of a matrix, 4 for each number of other tensors (twice that for float64).

    Raises:
        ValueError: β or the scale is none of those allowed.
        UsageError: the interval is below 2, or the sampler makes directions of its own.

    Source: Chen et al., 2024 (LOZO, arXiv 2410.07698), algorithms 1 and 2. For tensors that are no matrices the paper
    does not give the momentum.

    >>> import torch
    >>> model = nn.Linear(6, 5)
    >>> x, y = torch.randn(8, 6), torch.zeros(8, 5)
    >>> opt = lozo(model, lr=0.02, beta=0.9)
    >>> losses = [opt.step(lambda: nn.functional.mse_loss(model(x), y)) for _ in range(100)]
    >>> losses[-1] < losses[0], opt.state[model.weight]["momentum_buffer"].shape
    (True, torch.Size([5, 2]))
    """
    check_decay("beta", beta)
    if scale not in ("mean", "sum"):
        raise ValueError(f'scale is "mean" (steps by the rank, as the paper) or "sum" (as its code), got {scale!r}')
    if interval < 2:
        raise UsageError(f"lozo keeps a factor for some steps, got {interval=}; with 1 it is zo_sgd with zo.low_rank.")
    factor = float(rank) if scale == "sum" else 1.0
    transform = (
        InSubspace(partial(averaged_coordinates, beta=beta, factor=factor), partial(averaged, beta=beta))
        if beta
        else InSubspace(partial(scaled_coordinates, factor=factor))
    )
    return ZerothOrder(
        model,
        lr,
        estimator=differences(difference, mu),
        transform=transform,
        sampler=low_rank(entries_of("lozo", sampler), rank, interval=interval),
        num_queries=num_queries,
        **options,
    )


def scaled_coordinates(gradient: Tensor, state: State, basis: Basis, *, factor: float) -> tuple[Tensor, State]:
    """H = r G or G."""
    return gradient * factor, state


def averaged_coordinates(
    gradient: Tensor, state: State, basis: Basis, *, beta: float, factor: float
) -> tuple[Tensor, State]:
    """M ← β M + (1 - β) G in the present basis, and H = M (or r M)."""
    m = (1 - beta) * gradient
    if state:
        m = beta * basis.moved(state["momentum_buffer"].double(), state["basis_seed"]) + m
    return m * factor, {"momentum_buffer": m, "basis_seed": basis.present.seed}


def averaged(gradient: Tensor, state: State, *, beta: float) -> tuple[Tensor, State]:
    """The running mean m ← β m + (1 - β) ĝ, and h = m, element by element."""
    m = (1 - beta) * gradient
    if state:
        m = beta * state["momentum_buffer"] + m
    return m, {"momentum_buffer": m}
