"""Samplers: the distributions that directions are drawn from.

A sampler is any object with `fill`, which writes any slice of a direction's part for one tensor. Optional members say
what else a sampler can do; this module alone looks for them:

    kernel                the stream of the noise specification whose kernels make the numbers (`kernel_of`)
    part(tensor_id)       the sampler of one tensor's part, where tensors have samplers of their own (`part_of`)
    factors(…), together  the thin factors of a matrix's part, for products without the matrix (`factored`)
    subspace, coordinates the subspace that a matrix's parts share for some steps, and where in it one is (`spanning`)
    add(out, x, …)        x plus a sum of many directions in one pass (`adding`)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from zotune import noise


class Sampler(Protocol):
    """A distribution over directions with mean 0 and identity covariance, E[u uᵀ] = I.

    Samplers that compare equal are the same distribution.
    """

    def __hash__(self) -> int: ...

    def fill(self, out: Tensor, seed: int, tensor_id: int, start: int) -> None:
        """Write elements start, start + 1, … of the direction `seed` for one tensor into `out` (flat, float32)."""


@dataclass(frozen=True, eq=False)
class Factors:
    """An offset of low rank for some rows of a matrix: a · left rightᵀ.

    Attributes:
        left: (rows, r), float32; A/√r.
        right: (columns, r), float32; B.
        a: how far to go.
        rounding: seed and tensor id of the probe stream that half-precision products with the offset are rounded by;
            None for to nearest.
    """

    left: Tensor
    right: Tensor
    a: float = 1.0
    rounding: tuple[int, int] | None = None


class FactoredSampler(Sampler, Protocol):
    """A sampler that knows the thin factors of a matrix's part."""

    rank: int

    def factors(self, seed: int, tensor_id: int, device: torch.device, start: int, size: int | None) -> Factors:
        """The factors of one matrix's part, for the rows that elements start … start + size - 1 lie in."""

    def together(self, seed: int, ids: Iterable[int], device: torch.device) -> dict[int, Factors]:
        """The factors of many matrices' parts in one allocation; empty if that would be large."""


@dataclass(frozen=True, eq=False)
class Subspace:
    """The matrices s L Z Rᵀ, for all small Z.

    Attributes:
        seed: names the subspace: its bases are made from it.
        left: L, (m, r), float32; None for the identity.
        right: R, (n, r), float32; None for the identity.
        scale: s.
    """

    seed: int
    left: Tensor | None
    right: Tensor | None
    scale: float = 1.0

    def lifted(self, z: Tensor) -> Factors:
        """The thin factors of s L Z Rᵀ, in the precision of Z; sums are in the order of the columns."""
        if self.left is None:
            assert self.right is not None
            return Factors(z * self.scale if self.scale != 1 else z, self.right.to(z.dtype))
        left = self.left.to(z.dtype)
        if self.right is None:
            return Factors(left * self.scale if self.scale != 1 else left, z.t().contiguous())
        thin = left[:, :1] * z[:1]
        for k in range(1, z.shape[0]):
            thin += left[:, k : k + 1] * z[k : k + 1]
        return Factors(thin * self.scale, self.right.to(z.dtype))


class SpanningSampler(Sampler, Protocol):
    """A sampler whose directions of some steps may share a subspace."""

    shares_subspace: bool

    def subspace(self, tensor_id: int, device: torch.device, seed: int | None = None) -> Subspace:
        """The present subspace of a matrix, or the one of an earlier `seed`."""

    def coordinates(self, seed: int, tensor_id: int, device: torch.device) -> Tensor:
        """Z of one direction's part for a matrix: float32; callers must not write into it."""


@dataclass(frozen=True)
class PhiloxSampler:
    """A sampler with kernels of its own: `kernel` is its stream of the noise specification, `zotune.noise.spec`."""

    name: str
    kernel: int

    def fill(self, out: Tensor, seed: int, tensor_id: int, start: int) -> None:
        """As `Sampler.fill`."""
        noise.fill(out, self.kernel, seed, tensor_id, start)

    def __repr__(self) -> str:
        return self.name


rademacher = PhiloxSampler("rademacher", noise.RADEMACHER)
"""Independent signs ±1: the cheapest sampler, and the one with the smallest fourth moment."""

gaussian = PhiloxSampler("gaussian", noise.GAUSSIAN)
"""Independent standard normal numbers: the paper's sampler."""

SAMPLERS: dict[str, Sampler] = {"rademacher": rademacher, "gaussian": gaussian}


def kernel_of(sampler: Sampler) -> int | None:
    """The noise stream whose kernels make a sampler's numbers; None for a sampler without kernels.

    >>> kernel_of(rademacher) == noise.RADEMACHER
    True
    """
    kernel: int | None = getattr(sampler, "kernel", None)
    return kernel


def part_of(sampler: Sampler, tensor_id: int) -> Sampler:
    """The sampler that one tensor's part of a direction is drawn from; for most samplers, the sampler itself."""
    part = getattr(sampler, "part", None)
    return sampler if part is None else cast(Sampler, part(tensor_id))


def factored(sampler: Sampler) -> FactoredSampler | None:
    """The sampler as one that knows the thin factors of matrices; None where it does not."""
    return cast(FactoredSampler, sampler) if hasattr(sampler, "factors") else None


def spanning(sampler: Sampler) -> SpanningSampler | None:
    """The sampler as one whose directions of some steps share a subspace; None where they do not."""
    return cast(SpanningSampler, sampler) if getattr(sampler, "shares_subspace", False) else None


class AddingSampler(Sampler, Protocol):
    """A sampler that adds up many of its directions in one pass."""

    def add(
        self,
        out: Tensor,
        x: Tensor,
        seeds: Sequence[int],
        scales: Sequence[float],
        tensor_id: int,
        start: int,
        rounding_seed: int | None,
        rounding: int,
    ) -> None:
        """Compute out = x + Σ aᵢ uᵢ for slices of a tensor that begin at element `start`, as `noise.add` does."""


def adding(samplers: set[Sampler]) -> AddingSampler | None:
    """The one sampler of a set, if it adds up its directions itself; else None."""
    found = next(iter(samplers)) if len(samplers) == 1 else None
    return cast(AddingSampler, found) if hasattr(found, "add") else None
