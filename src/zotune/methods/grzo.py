"""GRZO: one sign-flipped direction an example, and each example's difference in units of the batch's spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

import numpy as np
from torch import nn

from zotune.directions.direction import Direction
from zotune.directions.flipped import flipped
from zotune.directions.samplers import rademacher
from zotune.directions.schedule import AnySampler
from zotune.errors import UsageError
from zotune.estimate.estimate import GradientEstimate
from zotune.estimate.objective import Closure
from zotune.estimate.per_example.difference import PerExampleDifference
from zotune.estimate.per_example.estimator import Examples
from zotune.methods.options import OwnDirections, entries_of
from zotune.model.parameters import ParameterSet
from zotune.optim.zeroth_order import ZerothOrder

# More examples than any batch has: a direction for each.
_ONE_EACH = 1 << 31


def grzo(
    model: nn.Module,
    lr: float,
    *,
    mu: float = 1e-3,
    eps: float = 1e-8,
    sampler: AnySampler = rademacher,
    num_queries: int = 1,
    **options: Unpack[OwnDirections],
) -> ZerothOrder:
    r"""GRZO: descent along one direction an example, in the two passes that one direction costs.

        zᵢ = U ⊙ (rᵢsᵢᵀ) for example i: one U a step, signs rᵢ, sᵢ of its own
        δᵢ = ℓᵢ(x + μzᵢ) - ℓᵢ(x - μzᵢ),  aᵢ = δᵢ/(std(δ) + ε)
        x  ← x - η/(2μB) Σ aᵢzᵢ = x - η/(2μB) U ⊙ (R diag(a) Sᵀ)        over the B examples of the batch

    The δᵢ are not centred. std divides by B. The objective has to know each example's loss: `zo.per_example`. With
    weighted examples 1/B is their share. Steps do not depend on the losses' scale; η/μ is what matters, so a search of
    η belongs to one μ.

    Args:
        model: its parameters that require a gradient are tuned.
        lr: η ≥ 0.
        mu: μ > 0, the paper's σ.
        eps: ε > 0, the paper's ε′, in units of the loss.
        sampler: the distribution of the entries of U: `rademacher` or `gaussian`.
        num_queries: q ≥ 1 directions an example, each at the passes of one; their mean is taken.
        options: those of `ZerothOrder`.

    Forward passes a step: 2q. Memory: as `zo.flipped`. No state.

    Raises:
        ValueError: μ or ε is not positive.
        UsageError: the sampler makes directions of its own; at a step, the batch has one example, or the objective
            does not know its examples' losses.

    Source: GRZO, 2026 (arXiv 2606.02857), from excerpts; Wen et al., 2018 (Flipout, arXiv 1803.04386).

    >>> import torch, zotune as zo
    >>> model = nn.Linear(3, 1)
    >>> x, y = torch.randn(8, 3), torch.zeros(8, 1)
    >>> f = zo.per_example(lambda x, y: (model(x) - y).square().mean(dim=1), x, y)
    >>> opt = grzo(model, lr=1e-4)
    >>> losses = [opt.step(f) for _ in range(100)]
    >>> losses[-1] < losses[0], opt.num_forwards
    (True, 200)
    """
    if not mu > 0 or not eps > 0:
        raise ValueError(f"mu and eps must be positive, got {mu=}, {eps=}")
    estimator = StandardisedPerExample(mu=mu, directions=_ONE_EACH, queries=num_queries, eps=eps)
    own = flipped(entries_of("grzo", sampler))
    return ZerothOrder(model, lr, estimator=estimator, sampler=own, num_queries=num_queries, **options)


@dataclass(frozen=True)
class StandardisedPerExample(PerExampleDifference):
    """Differences of each example's loss, by their standard deviation over the batch plus `eps`."""

    eps: float = 1e-8

    @property
    def constants(self) -> dict[str, Any]:
        """As `PerExampleDifference.constants`."""
        return {**super().constants, "eps": self.eps}

    def __call__(self, closure: Closure, tuned: ParameterSet, directions: Sequence[Direction]) -> GradientEstimate:
        """As `PerExampleDifference`, each run of directions by the spread of its examples' differences.

        Raises:
            UsageError: the batch has one example.
        """
        weights = Examples.of(closure).weights
        if len(weights) < 2:
            raise UsageError("grzo divides by the spread of the examples' losses: give it batches of 2 or more.")
        estimate = super().__call__(closure, tuned, directions)
        coefficients = np.array([c for c, _ in estimate.terms]).reshape(-1, len(weights))
        spreads = (coefficients * self.queries * 2 * self.mu / weights).std(axis=1, keepdims=True) + self.eps
        found = (coefficients / spreads).flatten().tolist()
        terms = tuple((c, u) for c, (_, u) in zip(found, estimate.terms, strict=True))
        return replace(estimate, terms=terms)
