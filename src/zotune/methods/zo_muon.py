"""ZO-Muon: in a small subspace of each matrix, steps whose singular values are all about the same."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from zotune.apply.subspace import Basis, InSubspace
from zotune.apply.transforms import State
from zotune.directions.samplers import gaussian
from zotune.directions.schedule import AnySampler
from zotune.directions.subspace import subspace
from zotune.errors import UsageError
from zotune.estimate.finite_difference import forward_difference
from zotune.methods.options import Difference, OwnGroups, differences, entries_of
from zotune.model.parameters import ParameterSet
from zotune.model.portable_algebra import frobenius, portable_matmul
from zotune.optim.checks import as_groups
from zotune.optim.zeroth_order import ZerothOrder

# Of the quintic X ← aX + (bA + cA²)X, A = XXᵀ.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def zo_muon(
    model: nn.Module,
    lr: float,
    *,
    mu: float = 1e-3,
    rank: int = 64,
    interval: int = 100,
    vector_lr: float = 1e-7,
    difference: Difference = forward_difference,
    sampler: AnySampler = gaussian,
    num_queries: int = 4,
    params: Iterable[Any] | None = None,
    **options: Unpack[OwnGroups],
) -> ZerothOrder:
    r"""ZO-Muon: steps P·NS₅(G) with the orthogonalised estimate of each matrix's gradient in a subspace.

        cᵢ = (f(W + μPΨᵢ) - f(W)) / μ        Ψᵢ (r × n) drawn anew, P (m × r) orthonormal, renewed every T steps
        G  = (1/q) Σ cᵢΨᵢ,    W ← W - η P·NS₅(G)
        NS₅:  X = G/‖G‖_F;  five times  A = XXᵀ,  X ← 3.4445 X + (-4.775 A + 2.0315 A²) X

    NS₅ takes singular values to about 0.7 to 1.2 (those far below the largest to less), so a step does not depend on
    the size of the slope: each of the r directions moves by about η. Where G = 0, W stays. A step is taken with the P
    that its probes had. Tensors of fewer than two dimensions get dense directions and steps of `zo_sgd`.

    Args:
        model: its parameters that require a gradient are tuned; at least one is a matrix.
        lr: η ≥ 0 of matrices; the paper: 1e-2 and 5e-3.
        mu: μ > 0.
        rank: r ≥ 1; that of a matrix with fewer rows is their number.
        interval: T ≥ 1 steps.
        vector_lr: η ≥ 0 of tensors of fewer than two dimensions, as for `zo_sgd`. The released code has 1e-7.
        difference: `forward_difference` as in the paper, or `central_difference`.
        sampler: the distribution of the entries of Ψ: `gaussian`, as in the paper, or `rademacher`.
        num_queries: q ≥ 1.
        params: as of `ZerothOrder`; a group that gives its own lr keeps it, for all its tensors.
        options: those of `ZerothOrder`.

    Forward passes a step: q + 1, or 2q. Memory: P, 4 r bytes for each row of a matrix, and a few times r n numbers for
    one matrix at a time. No state.

    Raises:
        ValueError: vector_lr is negative.
        UsageError: no matrix is tuned, or the sampler makes directions of its own.

    Source: Lang et al., 2026 (ZO-Muon, arXiv 2602.17155); the coefficients are those of Muon (Jordan et al., 2024). At
    each renewal of P the released code steps with another P than its probes had: that is a step along a direction
    nobody measured, and is not here.

    >>> model = nn.Linear(6, 5)
    >>> x, y = torch.randn(8, 6), torch.zeros(8, 5)
    >>> opt = zo_muon(model, lr=0.01, vector_lr=0.01)
    >>> losses = [opt.step(lambda: nn.functional.mse_loss(model(x), y)) for _ in range(60)]
    >>> losses[-1] < losses[0], opt.num_forwards
    (True, 300)
    """
    return ZerothOrder(
        model,
        lr,
        estimator=differences(difference, mu),
        transform=InSubspace(orthogonalised),
        sampler=subspace(entries_of("zo_muon", sampler), rank, interval=interval),
        num_queries=num_queries,
        params=with_vector_rate(model, params, lr, vector_lr),
        **options,
    )


def orthogonalised(gradient: Tensor, state: State, basis: Basis) -> tuple[Tensor, State]:
    """H = NS₅(G)."""
    return newton_schulz(gradient), state


def newton_schulz(g: Tensor) -> Tensor:
    """NS₅(G), five steps of the quintic towards the orthogonal factor of G (m × n); 0 for G = 0. In double precision.

    Each step multiplies X from the left by a polynomial of A = XXᵀ, which commutes with it: A alone is followed, and
    the product of the polynomials meets X once. Of a G with more rows than columns, the transpose is taken.

    >>> torch.linalg.svdvals(newton_schulz(torch.randn(4, 9))).sub(1).abs().max() < 0.4
    tensor(True)
    """
    if g.shape[0] > g.shape[1]:
        return newton_schulz(g.t()).t()
    norm = frobenius(g)
    if not norm:
        return g.double()
    x = g.double() / norm
    one = torch.eye(g.shape[0], dtype=torch.float64, device=g.device)
    gram, product = portable_matmul(x, x.t()), one
    for _ in range(5):
        factor = _A * one + _B * gram + _C * portable_matmul(gram, gram)
        product = portable_matmul(factor, product)
        gram = portable_matmul(factor, portable_matmul(gram, factor))
    return portable_matmul(product, x)


def with_vector_rate(
    model: nn.Module, params: Iterable[Any] | None, lr: float, vector_lr: float
) -> list[dict[str, Any]]:
    """Parameter groups in which tensors of fewer than two dimensions have a learning rate of their own.

    Raises:
        ValueError: the rate is negative.
        UsageError: no matrix is tuned.
    """
    if vector_lr < 0:
        raise ValueError(f"the learning rate must not be negative, got {vector_lr=}")
    given = [{"params": [t.parameter for t in ParameterSet(model)]}] if params is None else as_groups(params)
    if not any(p.dim() > 1 for group in given for p in group["params"]):
        raise UsageError(
            "the method orthogonalises steps of matrices, and none is tuned: all tuned tensors have fewer than two "
            "dimensions. Use zo_sgd or fzoo for norms and biases alone."
        )
    found: list[dict[str, Any]] = []
    for group in given:
        if "lr" in group:
            found.append(group)
            continue
        for is_matrix, rate in ((True, lr), (False, vector_lr)):
            if own := [p for p in group["params"] if (p.dim() > 1) == is_matrix]:
                found.append({**group, "params": own, "lr": rate})
    return found
