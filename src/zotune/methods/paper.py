r"""The paper's methods by name: each one expression over direction, estimate, transform and apply.

Symbols, in all of them: x the tuned numbers, d of them; f the objective; u ∈ Rᵈ a random direction; q the
number of directions a step; μ > 0 the distance moved along one, in units of the parameters; c a
directional derivative; ĝ = (1/q) Σ cᵢ uᵢ; η ≥ 0 the learning rate. Memory is that of inference plus what is
said; the coefficients and seeds of q directions take a few bytes, whatever q and d.

Every method takes the options of `ZerothOrder` besides its own: sampler, num_queries, blocks, block_order,
window, weight_decay, max_coefficient, rounding, seed, params, max_skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Unpack

from torch import nn

from zotune.apply.line_search import conservative
from zotune.apply.transforms import ADAMS, elementwise_sign, momentum
from zotune.apply.transforms import sign as sign_of
from zotune.estimate.finite_difference import central_difference
from zotune.estimate.forward_mode.gradient_check import CheckedForwardGradient
from zotune.methods.options import Difference, Options, check_decay, differences
from zotune.optim.zeroth_order import ZerothOrder


def zo_sgd(
    model: nn.Module,
    lr: float,
    *,
    mu: float = 1e-3,
    difference: Difference = central_difference,
    **options: Unpack[Options],
) -> ZerothOrder:
    r"""ZO-SGD, also known as MeZO: gradient descent along a few random directions.

        cᵢ = (f(x + μuᵢ) - f(x - μuᵢ)) / 2μ        for uᵢ drawn anew each step, i = 1 … q
        x  ← x - η (1/q) Σ cᵢ uᵢ

    Args:
        model: its parameters that require a gradient are tuned.
        lr: η ≥ 0. Full tuning of a language model wants some 1e-6, adapters 1e-4 to 1e-2.
        mu: μ > 0. Too small: rounding of the loss (bfloat16 weights want at least 1e-3); too large: a bias of O(μ²).
        difference: `central_difference` (2q forward passes) or `forward_difference` (q + 1).
        options: those of `ZerothOrder`. `num_queries`: the variance falls as 1/q; `sampler`: `rademacher` (cheapest,
            smallest variance), `gaussian` (the paper's), a sparse one or one of low rank.

    Forward passes a step: 2q, or q + 1. Memory: at most the largest tuned tensor. No state.

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
    return ZerothOrder(model, lr, estimator=differences(difference, mu), **options)


def zo_sgd_sign(
    model: nn.Module,
    lr: float,
    *,
    mu: float = 1e-3,
    sign: str = "scalar",
    difference: Difference = central_difference,
    **options: Unpack[Options],
) -> ZerothOrder:
    r"""ZO-SGD-Sign: steps of a size that does not depend on the slope's.

        scalar:       x ← x - η (1/q) Σ sign(cᵢ) uᵢ        the paper, appendix A
        elementwise:  x ← x - η sign((1/q) Σ cᵢ uᵢ)        the paper, section 3

    sign(0) = 0. The two are the same for Rademacher directions and q = 1.

    Args:
        model: its parameters that require a gradient are tuned.
        lr: η ≥ 0, which is how far a parameter goes a step.
        mu: μ > 0.
        sign: "scalar" or "elementwise".
        difference: `central_difference` or `forward_difference`.
        options: those of `ZerothOrder`.

    Forward passes a step: 2q, or q + 1. Memory: at most the largest tuned tensor. No state.

    Source: the paper, section 3 and appendix A; Liu et al., 2019 (signSGD via zeroth-order oracle).

    >>> import torch
    >>> model = nn.Linear(3, 1, bias=False)
    >>> before = model.weight.detach().clone()
    >>> opt = zo_sgd_sign(model, lr=0.25)
    >>> _ = opt.step(lambda: model.weight.square().sum())
    >>> (model.weight - before).abs().round(decimals=4).tolist()
    [[0.25, 0.25, 0.25]]
    """
    estimator = differences(difference, mu)
    if sign == "scalar":
        return ZerothOrder(model, lr, estimator=estimator, coefficient=sign_of, **options)
    if sign == "elementwise":
        return ZerothOrder(model, lr, estimator=estimator, transform=elementwise_sign, **options)
    raise ValueError(f'sign is "scalar" (of each coefficient) or "elementwise" (of ĝ), got {sign!r}')


def zo_sgd_mmt(
    model: nn.Module,
    lr: float,
    *,
    mu: float = 1e-3,
    beta: float = 0.9,
    difference: Difference = central_difference,
    **options: Unpack[Options],
) -> ZerothOrder:
    r"""ZO-SGD-MMT: ZO-SGD with momentum.

        m ← β m + ĝ,   x ← x - η m,   beginning with m = 0

    Args:
        model: its parameters that require a gradient are tuned.
        lr: η ≥ 0; the step settles at 1/(1 - β) times that of ZO-SGD.
        mu: μ > 0.
        beta: 0 ≤ β < 1; 0.9 as in the paper's runs. 0 is ZO-SGD.
        difference: `central_difference` or `forward_difference`.
        options: those of `ZerothOrder`; `window=h` needs no memory for m.

    Forward passes a step: 2q, or q + 1. Memory: m, 4 bytes a tuned number whatever the weights' precision (8 for
    float64); none with a window.

    Source: the paper, appendix A; Huang et al., 2022. As `torch.optim.SGD(momentum=β)`: ĝ is not scaled by 1 - β.

    >>> import torch
    >>> model = nn.Linear(3, 1)
    >>> x, y = torch.randn(8, 3), torch.zeros(8, 1)
    >>> opt = zo_sgd_mmt(model, lr=0.005)
    >>> losses = [opt.step(lambda: nn.functional.mse_loss(model(x), y)) for _ in range(100)]
    >>> losses[-1] < losses[0]
    True
    """
    check_decay("beta", beta)
    transform = partial(momentum, beta=beta)
    return ZerothOrder(model, lr, estimator=differences(difference, mu), transform=transform, **options)


def zo_sgd_cons(
    model: nn.Module,
    lr: float,
    *,
    mu: float = 1e-3,
    difference: Difference = central_difference,
    **options: Unpack[Options],
) -> ZerothOrder:
    r"""ZO-SGD-Cons: the best of staying, stepping and stepping back, on the same mini-batch.

        x ← argmin f over { x, x - ηĝ, x + ηĝ }

    The batch's loss never rises. Staying is exact to the bit: x is not moved to look at the other points. Ties keep x;
    a point whose loss is NaN or infinite is never chosen.

    Args:
        model: its parameters that require a gradient are tuned.
        lr: η ≥ 0.
        mu: μ > 0.
        difference: `central_difference` or `forward_difference`.
        options: those of `ZerothOrder`.

    Forward passes a step: 2q + 3; q + 3 one-sided, where f(x) is known. Memory: as ZO-SGD. No state.

    Source: the paper, appendix A; Kim et al., 2021.

    >>> import torch
    >>> model = nn.Linear(3, 1, bias=False)
    >>> opt = zo_sgd_cons(model, lr=0.3)
    >>> losses = []
    >>> for _ in range(20):
    ...     _ = opt.step(lambda: model.weight.square().sum())
    ...     losses.append(model.weight.square().sum().item())
    >>> losses == sorted(losses, reverse=True), opt.num_forwards
    (True, 100)
    """
    return ZerothOrder(model, lr, estimator=differences(difference, mu), step=conservative, **options)


def zo_adam(
    model: nn.Module,
    lr: float,
    *,
    mu: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    adam: str = "torch",
    difference: Difference = central_difference,
    **options: Unpack[Options],
) -> ZerothOrder:
    r"""ZO-Adam: steps scaled, element by element, by how large ĝ has been.

        m ← β₁ m + (1 - β₁) ĝ,   v ← β₂ v + (1 - β₂) ĝ²,   beginning with m = v = 0
        torch:    x ← x - η m̂ / (√v̂ + ε),   m̂ = m / (1 - β₁ᵗ),  v̂ = v / (1 - β₂ᵗ)      as torch.optim.Adam
        adamm:    x ← x - η m / (√max(vₜ, vₜ₋₁) + ε)                                       the paper's appendix A
        amsgrad:  x ← x - η m / (√max(v₁ … vₜ) + ε)                                        ZO-AdaMM, which it cites

    Args:
        model: its parameters that require a gradient are tuned.
        lr: η ≥ 0, about how far a parameter goes a step.
        mu: μ > 0.
        betas: (β₁, β₂), each at least 0 and below 1.
        eps: ε > 0. The appendix has none, and divides by zero where ĝ has been zero.
        adam: which of the three readings.
        difference: `central_difference` or `forward_difference`.
        options: those of `ZerothOrder`; `window=h` needs no memory for m and v.

    Forward passes a step: 2q, or q + 1. Memory: m and v, 8 bytes a tuned number whatever the weights' precision (16
    for float64), 12 for amsgrad; none with a window.

    Source: the paper, appendix A; Chen et al., 2019 (ZO-AdaMM); Kingma and Ba, 2015.

    >>> import torch
    >>> model = nn.Linear(3, 1)
    >>> x, y = torch.randn(8, 3), torch.zeros(8, 1)
    >>> opt = zo_adam(model, lr=0.01)
    >>> losses = [opt.step(lambda: nn.functional.mse_loss(model(x), y)) for _ in range(150)]
    >>> losses[-1] < losses[0]
    True
    """
    if adam not in ADAMS:
        raise ValueError(f"adam is one of {', '.join(ADAMS)}, got {adam!r}")
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps=}")
    beta1, beta2 = betas
    check_decay("betas[0]", beta1)
    check_decay("betas[1]", beta2)
    transform = partial(ADAMS[adam], beta1=beta1, beta2=beta2, eps=eps)
    return ZerothOrder(model, lr, estimator=differences(difference, mu), transform=transform, **options)


def forward_grad(model: nn.Module, lr: float, **options: Unpack[Options]) -> ZerothOrder:
    r"""Forward-Grad: descent along a few random directions, with the exact slope along each.

        cᵢ = ∇f(x)ᵀuᵢ        by forward-mode differentiation, in the forward pass itself
        x  ← x - η (1/q) Σ cᵢ uᵢ

    There is no μ, so neither rounding of loss differences nor a bias. The first coefficient is compared with central
    differences, for an operation without a derivative may drop tangents without a word.

    Args:
        model: its parameters that require a gradient are tuned.
        lr: η ≥ 0, as for `zo_sgd`.
        options: those of `ZerothOrder`.

    Forward passes a step: q, each with tangents, which takes about as long as two. Memory: activations with their
    tangents of the operation in progress; no graph, no u, no state.

    Source: the paper, section 3 and appendix A; Baydin et al., 2022; Ren et al., 2022. That it can be had at the
    memory of inference the paper leaves open (appendix C.1): see `zotune.forward_gradient`.

    Raises, at the first step:
        UsageError: the objective has an operation without a forward-mode derivative.

    >>> import torch
    >>> model = nn.Linear(3, 1)
    >>> x, y = torch.randn(8, 3), torch.zeros(8, 1)
    >>> opt = forward_grad(model, lr=0.05)
    >>> losses = [opt.step(lambda: nn.functional.mse_loss(model(x), y)) for _ in range(100)]
    >>> losses[-1] < losses[0]
    True
    """
    return ZerothOrder(model, lr, estimator=CheckedForwardGradient(), **options)


METHODS: dict[str, Callable[..., ZerothOrder]] = {
    "zo_sgd": zo_sgd,
    "zo_sgd_sign": zo_sgd_sign,
    "zo_sgd_mmt": zo_sgd_mmt,
    "zo_sgd_cons": zo_sgd_cons,
    "zo_adam": zo_adam,
    "forward_grad": forward_grad,
}
"""The zeroth-order methods of the paper by name."""
