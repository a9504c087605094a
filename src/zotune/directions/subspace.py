"""Directions within a subspace that stays for some steps: for an m × n tensor U = L Z Rᵀ with small coordinates Z.

The columns of L (m × r), and of R (n × r) where there is one, are orthonormal: those of a Gaussian matrix, made
orthonormal (uniform on all such). They are drawn anew every so many steps. So all directions and updates of these steps
lie in r n, or r², numbers, which is what a transform of whole matrices works on (`zotune.apply.subspace`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from zotune.directions.low_rank import SpanningThinSampler, drawn, matrix_shapes
from zotune.directions.samplers import Factors, Sampler, Subspace, gaussian
from zotune.directions.schedule import ScheduledSampler, Weights
from zotune.errors import UsageError
from zotune.model.parameters import ParameterSet, TunedTensor
from zotune.model.portable_algebra import orthonormal
from zotune.noise import derive_seed

# Purpose numbers of the bases' seeds in `derive_seed`.
_LEFT, _RIGHT = 5, 6


class Sides(StrEnum):
    """Where a basis is: U = L Z with Z (r × n), or U = √(mn)/r L Z Rᵀ with Z (r × r)."""

    LEFT = "left"
    BOTH = "both"


class _Bases:
    """The bases of one draw, each made when it is first used; those of another draw take their place."""

    def __init__(self) -> None:
        self._seed: int | None = None
        self._found: dict[tuple[int, int, int, torch.device], Tensor] = {}

    def get(self, seed: int, side: int, tensor_id: int, rows: int, rank: int, device: torch.device) -> Tensor:
        """The basis of one side of a tensor: (rows, rank), float32. Callers must not write into it."""
        if seed != self._seed:
            self._seed, self._found = seed, {}
        key = (side, tensor_id, rank, device)
        if key not in self._found:
            entries = torch.empty(rows * rank, dtype=torch.float32, device=device)
            gaussian.fill(entries, derive_seed(seed, side), tensor_id, 0)
            self._found[key] = orthonormal(entries.view(rows, rank)).float()
        return self._found[key]


@dataclass(frozen=True)
class _Reshaped:
    """The sampler of a matrix that was reshaped: its numbers lie in a subspace, but its rows have no thin factors."""

    sampler: SubspaceSampler
    shares_subspace = True

    def fill(self, out: Tensor, seed: int, tensor_id: int, start: int) -> None:
        """As `Sampler.fill`."""
        self.sampler.fill(out, seed, tensor_id, start)

    def coordinates(self, seed: int, tensor_id: int, device: torch.device) -> Tensor:
        """As `zotune.directions.samplers.SpanningSampler.coordinates`."""
        return self.sampler.coordinates(seed, tensor_id, device)

    def subspace(self, tensor_id: int, device: torch.device, seed: int | None = None) -> Subspace:
        """As `zotune.directions.samplers.SpanningSampler.subspace`."""
        return self.sampler.subspace(tensor_id, device, seed)


@dataclass(frozen=True)
class SubspaceSampler(SpanningThinSampler):
    """The sampler of one step of a run with directions in a subspace; see `zotune.subspace`.

    Attributes:
        base: the distribution of the coordinates' entries, and of the directions of tensors that are no matrices.
        rank: r ≥ 1; that of a matrix with fewer rows (or columns, if there are bases on both sides) is their number.
        sides: where the bases are.
        seed: seed of the bases.
        square: whether matrices are reshaped towards squares.
        whole: by tensor id, (m, n) of the matrices as they are. A tensor of more dimensions is one of shape[0] rows.
        shapes: by tensor id, the shapes that the subspaces are of.
    """

    base: Sampler
    rank: int
    sides: Sides
    seed: int
    square: bool
    whole: Mapping[int, tuple[int, int]] = field(compare=False, repr=False)
    bases: _Bases = field(compare=False, repr=False)
    shapes: Mapping[int, tuple[int, int]] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        shapes = {i: nearest_square(m * n) for i, (m, n) in self.whole.items()} if self.square else self.whole
        object.__setattr__(self, "shapes", shapes)

    def part(self, tensor_id: int) -> Sampler:
        """As `zotune.directions.samplers.part_of`."""
        own = self.shapes.get(tensor_id)
        return _Reshaped(self) if own is not None and own != self.whole[tensor_id] else super().part(tensor_id)

    def together(self, seed: int, ids: Iterable[int], device: torch.device) -> dict[int, Factors]:
        """As `zotune.directions.samplers.FactoredSampler.together`: none, for the bases are there already."""
        return {}

    def coordinates(self, seed: int, tensor_id: int, device: torch.device) -> Tensor:
        """As `zotune.directions.samplers.SpanningSampler.coordinates`."""
        rank = self._rank_of(tensor_id)
        columns = self.shapes[tensor_id][1] if self.sides == Sides.LEFT else rank
        return drawn(self.base, rank, seed, tensor_id, 0, columns, device).t()

    def subspace(self, tensor_id: int, device: torch.device, seed: int | None = None) -> Subspace:
        """As `zotune.directions.samplers.SpanningSampler.subspace`."""
        (m, n), rank, seed = self.shapes[tensor_id], self._rank_of(tensor_id), self.seed if seed is None else seed
        left = self.bases.get(seed, _LEFT, tensor_id, m, rank, device)
        if self.sides == Sides.LEFT:
            return Subspace(seed, left, None)
        right = self.bases.get(seed, _RIGHT, tensor_id, n, rank, device)
        return Subspace(seed, left, right, math.sqrt(m * n) / rank)

    def _rank_of(self, tensor_id: int) -> int:
        m, n = self.shapes[tensor_id]
        return min(self.rank, m) if self.sides == Sides.LEFT else min(self.rank, m, n)

    def state(self) -> dict[str, Any]:
        """As `zotune.directions.schedule.StatefulSampler.state`."""
        return {"basis_seed": self.seed}


@dataclass(frozen=True)
class InSubspaces(ScheduledSampler):
    """A sampler of directions in a subspace that is renewed as a run goes on; see `subspace`."""

    base: Sampler
    rank: int
    interval: int
    sides: Sides
    square: bool = False
    _bases: _Bases = field(default_factory=_Bases, compare=False, repr=False)

    def at(
        self, tuned: ParameterSet, seed: int, step: int, before: Any = None, weights: Weights = TunedTensor.storage
    ) -> SubspaceSampler:
        """As `ScheduledSampler.at`."""
        own = derive_seed(seed, step // self.interval, 0, _LEFT)
        if isinstance(before, SubspaceSampler) and before.seed == own:
            return before
        return self._sampler(tuned, own)

    def restored(self, tuned: ParameterSet, seed: int, state: dict[str, Any]) -> SubspaceSampler:
        """As `ScheduledSampler.restored`."""
        return self._sampler(tuned, state["basis_seed"])

    @property
    def constants(self) -> dict[str, Any]:
        """As `ScheduledSampler.constants`."""
        reshaped = {"square": True} if self.square else {}
        return {"rank": self.rank, "interval": self.interval, "sides": str(self.sides), **reshaped}

    def _sampler(self, tuned: ParameterSet, seed: int) -> SubspaceSampler:
        shapes = matrix_shapes(tuned)
        return SubspaceSampler(self.base, self.rank, self.sides, seed, self.square, shapes, self._bases)


def nearest_square(count: int) -> tuple[int, int]:
    """The shape (a, b) of so many numbers with a ≤ b and b - a as small as can be.

    >>> nearest_square(4 * 576), nearest_square(2 * 7)
    ((48, 48), (2, 7))
    """
    rows = next((a for a in range(math.isqrt(count), 0, -1) if count % a == 0), 0)
    return rows, count // rows if rows else 0


def subspace(
    base: Sampler, rank: int, *, interval: int, sides: Sides | str = Sides.LEFT, square: bool = False
) -> InSubspaces:
    r"""Directions of matrices within a subspace that stays for some steps.

        left:  U = L Z,               L (m × r) with orthonormal columns, Z (r × n)
        both:  U = √(mn)/r L Z Rᵀ,    R (n × r) too, Z (r × r)

    Z is drawn anew for each direction, L and R every `interval` steps. E[u uᵀ] is the projection onto the subspace,
    r/m of the identity on average with L alone; with both, and the factor that makes E‖U‖² = mn, the identity on
    average.

    Args:
        base: the distribution of the entries of Z: `gaussian` or `rademacher`. Tensors of fewer than two dimensions
            get its directions as they are.
        rank: r ≥ 1.
        interval: steps between two draws of the bases, at least 1.
        sides: "left" or "both".
        square: reshape each matrix, its numbers row by row, to the a × b = m × n that is nearest to a square. A thin
            matrix, such as LoRA's, then has a subspace of that rank, where its short side would allow but a smaller
            one. A probe then makes the matrix whole.

    Raises:
        UsageError: a value is out of range, or the base is no sampler of independent entries.

    Memory: the bases, 4 r bytes for each row of a matrix (and each column, with both).

    Source: Yu et al., 2024 (SubZero, arXiv 2410.08989: both); Lang et al., 2026 (ZO-Muon, arXiv 2602.17155: left).

    >>> import zotune as zo
    >>> model = torch.nn.Linear(30, 20)
    >>> opt = zo.zo_sgd(model, lr=0.1, sampler=subspace(zo.gaussian, 2, interval=50, sides="both"))
    >>> (u,) = opt.directions()
    >>> int(torch.linalg.matrix_rank(u.of(model, "weight")))
    2
    """
    if isinstance(base, ScheduledSampler):
        raise UsageError(f"the coordinates' entries must be independent, got {base!r}; give gaussian or rademacher.")
    if rank < 1:
        raise UsageError(f"a subspace has at least one dimension, got {rank=}")
    if interval < 1:
        raise UsageError(f"a basis serves at least one step, got {interval=}")
    return InSubspaces(base, rank, interval, Sides(sides), square)
