"""A step's examples and what is measured of each along the direction of its group; estimators build on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from zotune.directions.direction import Direction
from zotune.errors import UsageError
from zotune.estimate.estimate import GradientEstimate
from zotune.estimate.mesh import Cell
from zotune.estimate.objective import Accumulated, Closure, as_accumulated, probing
from zotune.estimate.per_example.agreement import Seen, after, directions_that_pay, gain, products_and_squares
from zotune.estimate.per_example.objective import PerExample, unperturbed
from zotune.model.parameters import ParameterSet

AUTO = "auto"
# A micro-batch, a run of directions, and the group of each example, to what is measured of each: (numbers, examples).
Measuring = Callable[[PerExample, Sequence[Direction], Sequence[int]], Tensor]


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
class PerExampleEstimator(ABC):
    """An estimator of `directions_per_batch`: its directions come in runs of k, one for each group of the examples.

    Attributes:
        directions: k, of which a smaller batch takes one an example; or "auto".
        queries: runs of directions of each block, whose mean is taken.
    """

    directions: int | str = AUTO
    queries: int = 1

    @property
    @abstractmethod
    def constants(self) -> dict[str, Any]:
        """What a ledger's header says about it."""

    @abstractmethod
    def measured(
        self, examples: Examples, tuned: ParameterSet, runs: Sequence[Sequence[Direction]], groups: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
        """Slopes of the examples' losses along their groups' directions (runs, examples), losses, and passes."""

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
        with probing(tuned.model):
            slopes, losses, passes = self.measured(examples, tuned, runs, groups)
        terms = tuple(
            (float(c) / self.queries, u)
            for run, own in zip(runs, slopes, strict=True)
            for c, u in zip(np.bincount(groups, own * examples.weights, k), run, strict=True)
        )
        scalars = _agreement(slopes, groups, self.queries) if self.has_scalars else ()
        return GradientEstimate(float(losses @ examples.weights), terms, passes, scalars=scalars)


@dataclass(frozen=True)
class Probes:
    """What is measured of all examples along each run of directions, from the cells of a table.

    Attributes:
        examples: of the step.
        runs: directions, one for each group.
        groups: the group of each example.
        numbers: how many are measured of each example.
        measure: of the examples of a micro-batch.
    """

    examples: Examples
    runs: Sequence[Sequence[Direction]]
    groups: NDArray[np.int64]
    numbers: int
    measure: Measuring

    def take(self, *, with_base: bool) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Return (runs, numbers, examples) of what is measured, and (examples,) losses at x."""
        whole, bounds = self.examples.closure, self.examples.bounds
        found = np.empty((len(self.runs), self.numbers, len(self.examples)))
        base = np.empty(len(self.examples))
        cells = [
            Cell(part, run, (bounds[part + 1] - bounds[part]) * (self.numbers if run < len(self.runs) else 1))
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
        """What is measured of a micro-batch's examples along one run of directions, or their losses at x."""
        part = self.examples.closure.closures[cell.part]
        assert isinstance(part, PerExample)
        if cell.group == len(self.runs):
            return part.losses(unperturbed).double().flatten().tolist()
        groups = self.groups[self.examples.bounds[cell.part] : self.examples.bounds[cell.part + 1]].tolist()
        return self.measure(part, self.runs[cell.group], groups).double().flatten().tolist()


def _agreement(slopes: NDArray[np.float64], groups: NDArray[np.int64], queries: int) -> tuple[float, float]:
    """The sums over blocks, and the means over a block's queries, of `products_and_squares`."""
    found = np.array([products_and_squares(own, groups) for own in slopes]).sum(axis=0) / queries
    return float(found[0]), float(found[1])
