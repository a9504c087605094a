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

from zotune.directions.direction import Direction
from zotune.errors import UsageError
from zotune.estimate.estimate import GradientEstimate
from zotune.estimate.finite_difference import Estimator, central_difference, forward_difference
from zotune.estimate.mesh import Cell
from zotune.estimate.objective import Accumulated, Closure, as_accumulated, probing
from zotune.estimate.per_example.agreement import Seen, after, directions_that_pay, gain, products_and_squares
from zotune.estimate.per_example.objective import PerExample, unperturbed
from zotune.estimate.per_example.weights import each_alone
from zotune.model.parameters import ParameterSet

AUTO = "auto"
# By the difference that one direction would take: the points a of its probes, in units of μ.
_POINTS: dict[Any, tuple[float, ...]] = {central_difference: (1.0, -1.0), forward_difference: (1.0,)}


@dataclass(frozen=True)
class Examples:
    """The examples of a step's micro-batches, in order.

    Attributes:
        closure: the objective.
        weights: wᵢ of each example, which add up to 1.
        bounds: where each micro-batch's examples begin, and the end.
    """

    closure: Accumulated
    weights: NDArray[np.float64]
    bounds: Sequence[int]

    @classmethod
    def of(cls, closure: Closure) -> Examples:
        """The examples of an objective.

        Raises:
            UsageError: it does not know their losses.
        """
        whole = as_accumulated(closure)
        parts = [part for part in whole.closures if isinstance(part, PerExample)]
        if len(parts) < len(whole.closures):
            raise UsageError(
                "directions_per_batch needs the loss of each example: make the objective by zotune.per_example(losses, "
                "*inputs), or zotune.accumulate of such ones."
            )
        shares = [np.array(part.weights) / sum(part.weights) for part in parts]
        weights = [share * w / sum(whole.weights) for share, w in zip(shares, whole.weights, strict=True)]
        return cls(whole, np.concatenate(weights), [0, *np.cumsum([len(part) for part in parts]).tolist()])

    def __len__(self) -> int:
        return self.bounds[-1]

    def groups(self, k: int) -> NDArray[np.int64]:
        """The group of each example, of k groups of neighbours that differ in size by one at most."""
        return np.arange(len(self)) * k // len(self)


@dataclass(frozen=True)
class PerExampleDifference:
    """An estimator of `directions_per_batch`: its directions come in runs of k, one for each group of the examples.

    Attributes:
        difference: `central_difference` or `forward_difference`.
        mu: μ > 0.
        directions: k, of which a smaller batch takes one an example; or "auto".
        queries: runs of directions of each block, whose mean is taken.
    """

    difference: Any = central_difference
    mu: float = 1e-3
    directions: int | str = AUTO
    queries: int = 1

    @property
    def constants(self) -> dict[str, Any]:
        """What a ledger's header says about it."""
        return {"difference": self.difference, "mu": self.mu, "directions": self.directions}

    @property
    def passes(self) -> tuple[int, int]:
        """As `zotune.estimate.estimators`: those of a query, whatever the number of its directions."""
        return len(_POINTS[self.difference]), int(self.difference is forward_difference)

    @property
    def has_scalars(self) -> bool:
        """Whether estimates carry what `agreement` needs."""
        return self.directions == AUTO

    def num_groups(self, learned: Seen | None, closure: Closure) -> int:
        """As `zotune.estimate.estimators`: k of the coming step."""
        size = len(Examples.of(closure))
        return directions_that_pay(learned, size) if isinstance(self.directions, str) else min(self.directions, size)

    def rate(self, learned: Seen | None, closure: Closure) -> float:
        """The learning rates' factor: how many times less ĝ varies than along one direction; 1 if k is fixed."""
        if not self.has_scalars:
            return 1.0
        return gain(learned, self.num_groups(learned, closure), len(Examples.of(closure)))

    def observed(self, learned: Seen | None, estimate: GradientEstimate) -> list[float] | None:
        """As `zotune.estimate.estimators`."""
        return after(learned, *estimate.scalars) if self.has_scalars else None

    def __call__(self, closure: Closure, tuned: ParameterSet, directions: Sequence[Direction]) -> GradientEstimate:
        """The estimate along runs of directions, each over one block: the mean over the runs of a block.

        Raises:
            UsageError: the objective does not give each example's loss alone, or copies of tensors take too much.
        """
        examples = Examples.of(closure)
        num_blocks = len({u.tensors for u in directions})
        k = len(directions) // (num_blocks * self.queries)
        runs = [directions[lo : lo + k] for lo in range(0, len(directions), k)]
        groups = examples.groups(k)
        probe = _Probes(examples, tuned, runs, groups, [a * self.mu for a in _POINTS[self.difference]])
        with probing(tuned.model):
            losses, base = probe.losses(with_base=self.difference is forward_difference)
        other, spacing = (losses[:, 1], 2 * self.mu) if base is None else (base, self.mu)
        slopes = (losses[:, 0] - other) / spacing
        terms = tuple(
            (float(c) / self.queries, u)
            for run, own in zip(runs, slopes, strict=True)
            for c, u in zip(np.bincount(groups, own * examples.weights, k), run, strict=True)
        )
        means = losses.mean(axis=(0, 1)) if base is None else base
        scalars = _agreement(slopes, groups, self.queries) if self.has_scalars else ()
        passes = losses.shape[0] * losses.shape[1] + (base is not None)
        return GradientEstimate(float(means @ examples.weights), terms, passes, scalars=scalars)


@dataclass(frozen=True)
class _Probes:
    """The losses of all examples at the points of each run of directions, from the cells of a table."""

    examples: Examples
    tuned: ParameterSet
    runs: Sequence[Sequence[Direction]]
    groups: NDArray[np.int64]
    points: Sequence[float]

    def losses(self, *, with_base: bool) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Return (runs, points, examples) losses, and (examples,) losses at x."""
        whole, bounds = self.examples.closure, self.examples.bounds
        found = np.empty((len(self.runs), len(self.points), len(self.examples)))
        base = np.empty(len(self.examples))
        cells = [
            Cell(part, run, (bounds[part + 1] - bounds[part]) * (len(self.points) if run < len(self.runs) else 1))
            for part in range(len(whole.closures))
            for run in range(len(self.runs) + with_base)
        ]

        def compute(own: Sequence[int]) -> list[list[float]]:
            return [self._of_cell(cells[i]) for i in own]

        for cell, numbers in zip(cells, whole.mesh.evaluate(cells, compute), strict=True):
            of_part = slice(bounds[cell.part], bounds[cell.part + 1])
            to = base[of_part] if cell.group == len(self.runs) else found[cell.group, :, of_part]
            to[...] = np.reshape(numbers, to.shape)
        return found, base if with_base else None

    def _of_cell(self, cell: Cell) -> list[float]:
        """The losses of a micro-batch's examples along one run of directions, or at x."""
        part = self.examples.closure.closures[cell.part]
        assert isinstance(part, PerExample)
        if cell.group == len(self.runs):
            return part.losses(unperturbed).double().flatten().tolist()
        groups = self.groups[self.examples.bounds[cell.part] : self.examples.bounds[cell.part + 1]].tolist()
        at_once = max(1, part.most)
        some = [self.points[lo : lo + at_once] for lo in range(0, len(self.points), at_once)]
        each = [each_alone(self.tuned, self.runs[cell.group], groups, points) for points in some]
        return torch.cat([part.losses(rows) for rows in each]).double().flatten().tolist()


def _agreement(slopes: NDArray[np.float64], groups: NDArray[np.int64], queries: int) -> tuple[float, float]:
    """The sums over blocks, and the means over a block's queries, of `products_and_squares`."""
    found = np.array([products_and_squares(own, groups) for own in slopes]).sum(axis=0) / queries
    return float(found[0]), float(found[1])


def with_directions_per_batch(estimator: Estimator, directions: int | str, queries: int) -> PerExampleDifference:
    """The estimator with k directions a batch in place of one.

    Args:
        estimator: a central or forward difference with its μ.
        directions: k ≥ 1, or "auto".
        queries: how often a step estimates the gradient, at the passes of one direction each; their mean is taken.

    Raises:
        UsageError: there is no such estimator with a direction for each of some examples.
        ValueError: k is out of range.
    """
    if directions != AUTO and (not isinstance(directions, int) or directions < 1):
        raise ValueError(f'directions_per_batch is a number of at least 1, or "auto", got {directions!r}')
    bound = estimator.keywords if isinstance(estimator, partial) else {}
    kind = estimator.func if isinstance(estimator, partial) else estimator
    if kind not in _POINTS or bound.keys() != {"mu"}:
        raise UsageError(
            "directions_per_batch goes with differences of losses (zotune.central_difference, "
            f"zotune.forward_difference), not with {getattr(kind, '__name__', type(kind).__name__)}. Leave it out."
        )
    return PerExampleDifference(kind, bound["mu"], directions, queries)
