"""A gradient estimate ĝ = Σ cᵢ uᵢ, kept as a few numbers and seeds: kilobytes, whatever the model's size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from zotune.directions.direction import Direction, combine
from zotune.model.parameters import ParameterSet

_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class GradientEstimate:
    """ĝ = Σ cᵢ uᵢ over the tuned tensors of a model.

    Attributes:
        loss: the objective at x, or the mean of the probes' values where x itself was not evaluated.
        terms: the pairs (cᵢ, uᵢ). An estimator that averages q directions has put the 1/q into the cᵢ.
        num_forwards: how often the objective was evaluated.
        base: f(x), where it was evaluated.
        scalars: further numbers that the update depends on, such as curvatures along the directions; recorded with the
            coefficients. Most estimators have none.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> u = Direction(seed=7)
    >>> estimate = GradientEstimate(loss=0.5, terms=((2.0, u),), num_forwards=2)
    >>> bool((estimate.of(model, "weight") == 2 * u.of(model, "weight")).all())
    True
    """

    loss: float
    terms: tuple[tuple[float, Direction], ...]
    num_forwards: int
    base: float | None = None
    scalars: tuple[float, ...] = ()

    @property
    def is_finite(self) -> bool:
        """Whether the loss, each coefficient and each scalar may reach the weights, in single precision."""
        numbers = (*(c for c, _ in self.terms), *self.scalars)
        return math.isfinite(self.loss) and all(abs(number) <= _LARGEST for number in numbers)

    def mapped(self, f: Callable[[float], float]) -> GradientEstimate:
        """The estimate with f(c) in place of each c; its scalars are as they were."""
        return replace(self, terms=tuple((f(c), u) for c, u in self.terms))

    def agreed(self, tuned: ParameterSet) -> GradientEstimate:
        """The estimate that all processes of a sharded model go on with: see `zotune.model.shards.agreed`."""
        if not tuned.is_distributed:
            return self
        own = [self.loss, math.nan if self.base is None else self.base, *(c for c, _ in self.terms), *self.scalars]
        loss, base, *numbers = tuned.agreed(own)
        terms = tuple((c, u) for c, (_, u) in zip(numbers, self.terms, strict=False))
        scalars = tuple(numbers[len(terms) :])
        return replace(self, loss=loss, base=None if self.base is None else base, terms=terms, scalars=scalars)

    def rounded(self, f: Callable[[float], float]) -> GradientEstimate:
        """The estimate with every number that is recorded rounded by f."""
        return replace(self.mapped(f), scalars=tuple(map(f, self.scalars)))

    def of(self, model: nn.Module | ParameterSet, name: str) -> Tensor:
        """The part of ĝ for one tensor: its shape, float32 (float64 for a float64 tensor)."""
        return combine(self.terms, ParameterSet.of(model)[name])


def averaged(coefficients: Sequence[float], directions: Sequence[Direction]) -> tuple[tuple[float, Direction], ...]:
    """The terms of ĝ from a coefficient a direction: the mean over those directions that share a block.

    >>> averaged([2.0, 4.0], [Direction(1), Direction(2)])[1][0]
    2.0
    """
    shares = Counter(u.tensors for u in directions)
    return tuple((c / shares[u.tensors], u) for c, u in zip(coefficients, directions, strict=True))


def merged(estimates: Sequence[GradientEstimate]) -> GradientEstimate:
    """The estimates of several blocks as one: all terms and scalars, and the mean loss."""
    if len(estimates) == 1:
        return estimates[0]
    loss = sum(e.loss for e in estimates) / len(estimates)
    terms = tuple(term for e in estimates for term in e.terms)
    scalars = tuple(number for e in estimates for number in e.scalars)
    return GradientEstimate(loss, terms, sum(e.num_forwards for e in estimates), scalars=scalars)
