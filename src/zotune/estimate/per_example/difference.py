r"""Finite differences with one direction an example, or a group of examples, in the passes that one direction costs.

    F_g(x) = Σ_{i in group g} wᵢ ℓᵢ(x),  Σᵢ wᵢ = 1        so that f = Σ_g F_g
    c_g = (F_g(x + μu_g) - F_g(x - μu_g)) / 2μ             from the examples' own losses
    ĝ = Σ_g c_g u_g                                        E[ĝ] = Σ_g ∇F_g = ∇f, up to O(μ²)

A batch of B examples along one direction gives one number; along k directions it gives k, in the same two passes.
Source: Wen et al., 2018 (Flipout, arXiv 1803.04386); Sarkar et al., 2025 (EGGROLL, arXiv 2511.16652); GRZO
(arXiv 2606.02857).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zotune.directions.direction import Direction
from zotune.errors import UsageError
from zotune.estimate.finite_difference import Estimator, central_difference, forward_difference
from zotune.estimate.forward_mode.gradient_check import CheckedForwardGradient
from zotune.estimate.per_example.estimator import AUTO, Examples, PerExampleEstimator, Probes
from zotune.estimate.per_example.forward import PerExampleForwardGradient
from zotune.estimate.per_example.objective import PerExample
from zotune.estimate.per_example.weights import each_alone
from zotune.model.parameters import ParameterSet

# By the difference that one direction would take: the points a of its probes, in units of μ.
_POINTS: dict[Any, tuple[float, ...]] = {central_difference: (1.0, -1.0), forward_difference: (1.0,)}


@dataclass(frozen=True)
class PerExampleDifference(PerExampleEstimator):
    """Differences of each example's loss along the direction of its group.

    Attributes:
        difference: `central_difference` or `forward_difference`.
        mu: μ > 0.
    """

    difference: Any = central_difference
    mu: float = 1e-3

    @property
    def constants(self) -> dict[str, Any]:
        """As `PerExampleEstimator.constants`."""
        return {"difference": self.difference, "mu": self.mu, "directions": self.directions}

    @property
    def passes(self) -> tuple[int, int]:
        """As `zotune.estimate.estimators`: those of a query, whatever the number of its directions."""
        return len(_POINTS[self.difference]), int(self.difference is forward_difference)

    def measured(
        self, examples: Examples, tuned: ParameterSet, runs: Sequence[Sequence[Direction]], groups: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
        """As `PerExampleEstimator.measured`."""
        points = [a * self.mu for a in _POINTS[self.difference]]

        def measure(part: PerExample, run: Sequence[Direction], groups: Sequence[int]) -> Tensor:
            at_once = max(1, part.most)
            some = [points[lo : lo + at_once] for lo in range(0, len(points), at_once)]
            return torch.cat([part.losses(each_alone(tuned, run, groups, own)) for own in some])

        probes = Probes(examples, runs, groups, len(points), measure)
        losses, base = probes.take(with_base=self.difference is forward_difference)
        other, spacing = (losses[:, 1], 2 * self.mu) if base is None else (base, self.mu)
        passes = losses.shape[0] * losses.shape[1] + (base is not None)
        return (losses[:, 0] - other) / spacing, losses.mean(axis=(0, 1)) if base is None else base, passes


def with_directions_per_batch(estimator: Estimator, directions: int | str, queries: int) -> PerExampleEstimator:
    """The estimator with k directions a batch in place of one.

    Args:
        estimator: a central or forward difference with its μ, or the forward gradient.
        directions: k ≥ 1, or "auto".
        queries: how often a step estimates the gradient, at the passes of one direction each; their mean is taken.

    Raises:
        UsageError: there is no such estimator with a direction for each of some examples.
        ValueError: k is out of range.
    """
    if directions != AUTO and (not isinstance(directions, int) or directions < 1):
        raise ValueError(f'directions_per_batch is a number of at least 1, or "auto", got {directions!r}')
    if isinstance(estimator, CheckedForwardGradient):
        return PerExampleForwardGradient(directions, queries)
    bound = estimator.keywords if isinstance(estimator, partial) else {}
    kind = estimator.func if isinstance(estimator, partial) else estimator
    if kind not in _POINTS or bound.keys() != {"mu"}:
        raise UsageError(
            "directions_per_batch goes with differences of losses (zotune.central_difference, "
            "zotune.forward_difference) and with forward gradients, not with "
            f"{getattr(kind, '__name__', type(kind).__name__)}. Leave it out."
        )
    return PerExampleDifference(directions, queries, kind, bound["mu"])
