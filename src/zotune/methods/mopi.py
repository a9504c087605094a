"""ZO-MOPI: ZO-Muon with momentum, of which one sweep of power iteration a step finds the leading directions."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from zotune.apply.subspace import Basis, InSubspace
from zotune.apply.transforms import State
from zotune.directions.samplers import gaussian
from zotune.directions.schedule import AnySampler
from zotune.directions.subspace import subspace
from zotune.estimate.finite_difference import central_difference
from zotune.methods.options import Difference, OwnGroups, check_decay, differences, entries_of
from zotune.methods.zo_muon import with_vector_rate
from zotune.model.portable_algebra import (
    is_orthonormal,
    normalised_columns,
    orthonormal,
    orthonormal_from,
    portable_matmul,
)
from zotune.noise import derive_seed
from zotune.optim.zeroth_order import ZerothOrder

# The purpose number of the first V's seed in `derive_seed`.
_FIRST = 7


def mopi(  # noqa: PLR0913 - every hyper-parameter by keyword, each with a default
    model: nn.Module,
    lr: float,
    *,
    mu: float = 1e-3,
    rank: int = 64,
    interval: int = 500,
    top: int = 32,
    beta: float = 0.9,
    vector_lr: float = 1e-7,
    difference: Difference = central_difference,
    sampler: AnySampler = gaussian,
    num_queries: int = 8,
    params: Iterable[Any] | None = None,
    **options: Unpack[OwnGroups],
) -> ZerothOrder:
    r"""ZO-MOPI: steps with the leading singular directions of the momentum, all of the same size.

        G as in `zo_muon`, by central differences
        M ← β M + (1 - β) G;    where P is renewed, first M ← PᵀP_old M
        V ← qr(Mᵀ(M V)),  U = M V with columns of length 1,    W ← W - η P·U Vᵀ

    V (n × k) converges to the k leading right singular vectors of M while M changes slowly, so U Vᵀ to the orthogonal
    factor of its best approximation of rank k: noise in the other directions does not reach W. The first V is that of
    a Gaussian matrix. Tensors of fewer than two dimensions get dense directions and steps of `zo_sgd`.

    Args:
        model: its parameters that require a gradient are tuned; at least one is a matrix.
        lr: η ≥ 0 of matrices; the paper: 1e-2 and 5e-3.
        mu: μ > 0.
        rank: r ≥ 1; that of a matrix with fewer rows is their number.
        interval: steps between two draws of P, at least 1.
        top: k ≥ 1; at most r and n, for a matrix with less than that.
        beta: 0 ≤ β < 1. The released recipe has 0.
        vector_lr: η ≥ 0 of tensors of fewer than two dimensions, as for `zo_sgd`.
        difference: `central_difference` as in the paper; `forward_difference` as in the released recipe.
        sampler: the distribution of the entries of Ψ: `gaussian` or `rademacher`.
        num_queries: q ≥ 1.
        params: as of `ZerothOrder`; a group that gives its own lr keeps it, for all its tensors.
        options: those of `ZerothOrder`.

    Forward passes a step: 2q, or q + 1. Memory: P, 4 r bytes for each row of a matrix. State: M and V, 4 (r + k) bytes
    for each column of a matrix (twice that for float64).

    Raises:
        ValueError: a value is out of range.
        UsageError: no matrix is tuned, or the sampler makes directions of its own.

    Source: ZO-MOPI, 2026 (arXiv 2605.09034).

    >>> model = nn.Linear(6, 5)
    >>> x, y = torch.randn(8, 6), torch.zeros(8, 5)
    >>> opt = mopi(model, lr=0.01, vector_lr=0.01, top=2)
    >>> losses = [opt.step(lambda: nn.functional.mse_loss(model(x), y)) for _ in range(40)]
    >>> losses[-1] < losses[0], opt.state[model.weight]["right"].shape
    (True, torch.Size([6, 2]))
    """
    check_decay("beta", beta)
    if top < 1:
        raise ValueError(f"a step has at least one direction, got {top=}")
    return ZerothOrder(
        model,
        lr,
        estimator=differences(difference, mu),
        transform=InSubspace(partial(power_iteration, beta=beta, top=top)),
        sampler=subspace(entries_of("mopi", sampler), rank, interval=interval),
        num_queries=num_queries,
        params=with_vector_rate(model, params, lr, vector_lr),
        **options,
    )


def power_iteration(gradient: Tensor, state: State, basis: Basis, *, beta: float, top: int) -> tuple[Tensor, State]:
    """M ← β M + (1 - β) G in the present basis, V ← qr(Mᵀ(MV)), and H = U Vᵀ; H = 0 and V as it was for M = 0.

    Where M has fewer than k directions, columns of V before take the place of those that are left, and do not move.
    """
    m = (1 - beta) * gradient
    if state:
        m = beta * basis.moved(state["momentum_buffer"].double(), state["basis_seed"]) + m
    right = state["right"].double() if state else _first_right(m, basis, top)
    step = torch.zeros_like(m)
    if bool(m.any()):
        turned, before = portable_matmul(m.t(), portable_matmul(m, right)), right
        right = orthonormal(turned)
        if not is_orthonormal(right):  # M has fewer directions than k
            right = orthonormal_from(turned, before)
        step = portable_matmul(normalised_columns(portable_matmul(m, right)), right.t())
    return step, {"momentum_buffer": m, "right": right, "basis_seed": basis.present.seed}


def _first_right(m: Tensor, basis: Basis, top: int) -> Tensor:
    columns, rank = m.shape[1], min(top, *m.shape)
    entries = torch.empty(columns * rank, dtype=torch.float32, device=m.device)
    gaussian.fill(entries, derive_seed(basis.present.seed, _FIRST), basis.tensor_id, 0)
    return orthonormal(entries.view(columns, rank))
