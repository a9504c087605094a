"""Directions of low rank: the part for an m × n matrix is U = A Bᵀ/√r, and is known by its two thin factors.

A is (m, r), B is (n, r), both of independent entries with mean 0 and variance 1, so E[u uᵀ] = I as for any direction:
E[U_ij U_kl] = Σ_s E[A_is A_ks] E[B_js B_ls] / r, which is 1 where (i, j) = (k, l) and else 0. A product with U is two
thin products: x Uᵀ = (x B) Aᵀ/√r, so that a layer is perturbed without a perturbed weight.
Source: Chen et al., 2024 (LOZO, arXiv 2410.07698); Sarkar et al., 2025 (EGGROLL, arXiv 2511.16652). The bits of an
element: `zotune.noise.spec.low_rank`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zotune import noise
from zotune.directions.samplers import Factors, Sampler, Subspace
from zotune.directions.schedule import ScheduledSampler, Weights
from zotune.errors import UsageError
from zotune.model import matmul as gemm
from zotune.model.parameters import ParameterSet, TunedTensor
from zotune.noise import derive_seed
from zotune.system import limits

# Purpose number of the right factors' seeds in `derive_seed`.
_RIGHT = 3


def product(left: Tensor, right: Tensor) -> Tensor:
    """The product left rightᵀ in float32, summed in the order of the columns; no device uses a fused multiply-add."""
    total = left[:, :1] * right[:, 0]
    for k in range(1, left.shape[1]):
        total += left[:, k : k + 1] * right[:, k]
    return total


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: Sequence[Factors], biases: Tensor | None = None
) -> Tensor:
    """Compute y = x (W + offsetᵢ)ᵀ + b + biases[i] for the i-th of equal shares of x: (…, n) to (…, m).

    The product with W is taken for all shares together; each share then needs two thin products. `biases`: (shares, m).
    """
    rows = x.reshape(-1, x.shape[-1])
    out = gemm.linear(rows, weight, bias)
    add_products(out, rows, factors, biases)
    return out.view(*x.shape[:-1], -1)


def add_products(out: Tensor, x: Tensor, factors: Sequence[Factors], biases: Tensor | None = None) -> None:
    """Add x (aᵢ leftᵢ rightᵢᵀ)ᵀ + biases[i] to the i-th of equal shares of out (rows, m), for x (rows, n) in equal
    shares.

    A power of two of a goes into B, where it costs no digit: in half precision x B might leave the range. The rest is
    no number of such a precision, so it is put to x B.
    """
    seeds, tensor_id = _rounding_of(factors)
    if noise.has_low_rank_matmul_add(out, x):
        pairs, scales = [(f.left, f.right) for f in factors], [f.a for f in factors]
        noise.low_rank_matmul_add_(out, x, pairs, scales, biases, seeds, tensor_id)
        return
    if seeds is not None and out.dtype in noise.HALF:
        _add_products_at_random(out, x, factors, biases)
        return
    if biases is not None:
        out.view(len(factors), -1, out.shape[-1]).add_(biases[:, None])
    for own, f, thin in zip(out.tensor_split(len(factors)), factors, _thins(x, factors), strict=True):
        own.addmm_(thin.to(out.dtype), f.left.to(out.dtype).t())


def _rounding_of(factors: Sequence[Factors]) -> tuple[list[int] | None, int]:
    """The seeds that half-precision products are rounded by, and the tensor's id; None to round to nearest."""
    found = [f.rounding for f in factors if f.rounding is not None]
    return ([seed for seed, _ in found], found[0][1]) if len(found) == len(factors) else (None, 0)


def _add_products_at_random(out: Tensor, x: Tensor, factors: Sequence[Factors], biases: Tensor | None) -> None:
    """As `add_products`, with sums in float32 that are rounded by the probe stream, some rows at a time."""
    at_once = max(1, limits.UPDATE_ELEMENTS // max(1, out.shape[1]))
    shares = zip(out.tensor_split(len(factors)), factors, _thins(x, factors), strict=True)
    for number, (own, f, thin) in enumerate(shares):
        assert f.rounding is not None
        for lo in range(0, len(own), at_once):
            rows = own[lo : lo + at_once]
            y = rows.float() if biases is None else rows.float() + biases[number].float()
            y.addmm_(thin[lo : lo + at_once].float(), f.left.t())
            noise.round_to(rows.view(-1), y.view(-1), *f.rounding, lo * own.shape[1], noise.PROBE)


def _thins(x: Tensor, factors: Sequence[Factors]) -> list[Tensor]:
    """The thin products a x B of each of equal shares of x."""
    scales, powers = zip(*(math.frexp(f.a) for f in factors), strict=True)
    one, copies = factors[0], len(factors)
    if all(f.right is one.right for f in factors) and len(set(powers)) == 1:
        shares = _thin(x, one.right, powers[0]).tensor_split(copies)
        return [own * scale for own, scale in zip(shares, scales, strict=True)]
    shares = x.tensor_split(copies)
    return [_thin(own, f.right, p) * s for own, f, s, p in zip(shares, factors, scales, powers, strict=True)]


def _thin(x: Tensor, right: Tensor, power: int) -> Tensor:
    """2ᵖ x B: (rows, r)."""
    return F.linear(x, (right.t() * 2.0**power).to(x.dtype))


class ThinSampler(ABC):
    """A sampler whose directions of matrices are products of thin factors; other tensors have those of a base.

    Attributes:
        base: the sampler of tensors that are no matrices.
        shapes: rows and columns of each matrix, by tensor id.
    """

    base: Sampler
    shapes: Mapping[int, tuple[int, int]]

    def part(self, tensor_id: int) -> Sampler:
        """As `zotune.directions.samplers.part_of`: a tensor that is no matrix has the base's directions."""
        return self if tensor_id in self.shapes else self.base

    def fill(self, out: Tensor, seed: int, tensor_id: int, start: int) -> None:
        """As `Sampler.fill`."""
        if tensor_id not in self.shapes:
            self.base.fill(out, seed, tensor_id, start)
            return
        found = self.factors(seed, tensor_id, out.device, start, out.numel())
        skipped = start % self.shapes[tensor_id][1]
        out.copy_(product(found.left, found.right).view(-1)[skipped : skipped + out.numel()])

    @abstractmethod
    def factors(
        self, seed: int, tensor_id: int, device: torch.device, start: int = 0, size: int | None = None
    ) -> Factors:
        """As `zotune.directions.samplers.FactoredSampler.factors`."""


class SpanningThinSampler(ThinSampler):
    """A thin sampler whose directions of a matrix lie in a subspace, as coordinates in it."""

    shares_subspace = True

    def factors(
        self, seed: int, tensor_id: int, device: torch.device, start: int = 0, size: int | None = None
    ) -> Factors:
        """As `zotune.directions.samplers.FactoredSampler.factors`."""
        found = self.subspace(tensor_id, device).lifted(self.coordinates(seed, tensor_id, device))
        rows, columns = self.shapes[tensor_id]
        lo, hi = start // columns, rows if size is None else -(-(start + size) // columns)
        return found if (lo, hi) == (0, rows) else Factors(found.left[lo:hi], found.right)

    @abstractmethod
    def subspace(self, tensor_id: int, device: torch.device, seed: int | None = None) -> Subspace:
        """As `zotune.directions.samplers.SpanningSampler.subspace`."""

    @abstractmethod
    def coordinates(self, seed: int, tensor_id: int, device: torch.device) -> Tensor:
        """As `zotune.directions.samplers.SpanningSampler.coordinates`."""


@dataclass(frozen=True)
class LowRankSampler(ThinSampler):
    """The sampler of one step of a run with directions of low rank; see `zotune.low_rank`.

    Attributes:
        base: the distribution of the factors' entries, and of the directions of tensors that are no matrices.
        rank: r ≥ 1.
        right_seed: seed of the right factors that all directions share; None where each direction has its own.
        shapes: by tensor id, (m, n) of the matrices. A tensor of more dimensions is one of shape[0] rows.
    """

    base: Sampler
    rank: int
    right_seed: int | None
    shapes: Mapping[int, tuple[int, int]] = field(compare=False, repr=False)

    def factors(
        self, seed: int, tensor_id: int, device: torch.device, start: int = 0, size: int | None = None
    ) -> Factors:
        """The factors of a matrix's part of a direction, for the rows that elements start … start + size - 1 lie in.

        They are cached; callers must not write into them.
        """
        rows, columns = self.shapes[tensor_id]
        lo, hi = start // columns, rows if size is None else -(-(start + size) // columns)
        right_seed = self._right_seed_of(seed)
        left = drawn(self.base, self.rank, seed, tensor_id, lo, hi, device)
        return Factors(
            left if self.rank == 1 else left * (1.0 / math.sqrt(self.rank)),
            drawn(self.base, self.rank, right_seed, tensor_id, 0, columns, device),
        )

    def together(self, seed: int, ids: Iterable[int], device: torch.device) -> dict[int, Factors]:
        """As `factors`, for all matrices among some tensors in one allocation; empty if that would be large."""
        sizes = {i: tuple(side * self.rank for side in self.shapes[i]) for i in ids if i in self.shapes}
        total = sum(map(sum, sizes.values()))
        if total > limits.FACTOR_ELEMENTS:
            return {}
        right_seed = self._right_seed_of(seed)
        room = torch.empty(total, dtype=torch.float32, device=device)
        sides = iter(torch.split(room, list(chain(*sizes.values()))))
        found = {}
        for i in sizes:
            left, right = next(sides), next(sides)
            self.base.fill(left, seed, i, 0)
            self.base.fill(right, right_seed, i, 0)
            left = left if self.rank == 1 else left.mul_(1.0 / math.sqrt(self.rank))
            found[i] = Factors(left.view(-1, self.rank), right.view(-1, self.rank))
        return found

    def coordinates(self, seed: int, tensor_id: int, device: torch.device) -> Tensor:
        """As `zotune.directions.samplers.SpanningSampler.coordinates`: the left factor."""
        return self.factors(seed, tensor_id, device).left

    @property
    def shares_subspace(self) -> bool:
        """As `zotune.directions.samplers.SpanningSampler`: that of the right factor, if directions share it."""
        return self.right_seed is not None

    def subspace(self, tensor_id: int, device: torch.device, seed: int | None = None) -> Subspace:
        """As `zotune.directions.samplers.SpanningSampler.subspace`."""
        seed = self.right_seed if seed is None else seed
        assert seed is not None
        return Subspace(seed, None, drawn(self.base, self.rank, seed, tensor_id, 0, self.shapes[tensor_id][1], device))

    def _right_seed_of(self, seed: int) -> int:
        return _own_right_seed(seed) if self.right_seed is None else self.right_seed

    def state(self) -> dict[str, Any]:
        """As `zotune.directions.schedule.StatefulSampler.state`."""
        return {"right_seed": self.right_seed}


@lru_cache(maxsize=64)
def _own_right_seed(seed: int) -> int:
    return derive_seed(seed, 0, 0, _RIGHT)


# Each slice of a tensor wants the same factors one after the other. Those of a whole step are not kept: small tensors
# that stay, between activations that go, leave holes in the heap.
@lru_cache(maxsize=4)
def drawn(base: Sampler, rank: int, seed: int, tensor_id: int, lo: int, hi: int, device: torch.device) -> Tensor:
    """Rows lo … hi - 1 of a matrix of `rank` columns, drawn from `base`. Callers must not write into it."""
    found = torch.empty((hi - lo, rank), dtype=torch.float32, device=device)
    base.fill(found.view(-1), seed, tensor_id, lo * rank)
    return found


@dataclass(frozen=True)
class LowRank(ScheduledSampler):
    """A sampler of directions of low rank whose right factor is renewed as a run goes on; see `low_rank`."""

    base: Sampler
    rank: int
    interval: int

    def at(
        self, tuned: ParameterSet, seed: int, step: int, before: Any = None, weights: Weights = TunedTensor.numbers
    ) -> LowRankSampler:
        """As `ScheduledSampler.at`."""
        right_seed = None if self.interval == 1 else derive_seed(seed, step // self.interval, 0, _RIGHT)
        return self._factored(tuned, right_seed)

    def restored(self, tuned: ParameterSet, seed: int, state: dict[str, Any]) -> LowRankSampler:
        """As `ScheduledSampler.restored`."""
        return self._factored(tuned, state["right_seed"])

    @property
    def constants(self) -> dict[str, Any]:
        """As `ScheduledSampler.constants`."""
        return {"rank": self.rank, "interval": self.interval}

    def _factored(self, tuned: ParameterSet, right_seed: int | None) -> LowRankSampler:
        return LowRankSampler(self.base, self.rank, right_seed, matrix_shapes(tuned))


def matrix_shapes(tuned: ParameterSet) -> dict[int, tuple[int, int]]:
    """By tensor id, (m, n) of the tuned matrices; a tensor of more dimensions is one of shape[0] rows."""
    shapes = {t.id: t.parameter.shape for t in tuned if t.parameter.dim() > 1 and t.parameter.numel()}
    return {i: (s[0], s[1:].numel()) for i, s in shapes.items()}


def low_rank(base: Sampler, rank: int = 1, *, interval: int = 1) -> LowRank:
    r"""Directions that are matrices of low rank: for an m × n tensor U = A Bᵀ/√r, known by (m + n) r numbers.

    A (m × r) is drawn anew for each direction, B (n × r) with it or once for some steps. Independent entries of mean 0
    and variance 1 give E[u uᵀ] = I, so E[ĝ] = ∇f as for any sampler. A linear layer is perturbed by two thin products,
    y = x Wᵀ + a (x B) Aᵀ/√r, and no weight is written or copied: probes cost hardly more than their forward passes, and
    many of them (`most` of `zotune.batched`) share the product x Wᵀ.

    Args:
        base: the distribution of the entries of A and B: `gaussian` as in LOZO and EGGROLL, or `rademacher`. Tensors
            of fewer than two dimensions (biases, gains of norms) get its directions as they are. A tensor of more than
            two dimensions counts as a matrix of shape[0] rows.
        rank: r ≥ 1.
        interval: ν ≥ 1, steps between two draws of B. With 1 each direction has its own B (EGGROLL); with more, all
            directions of ν steps share one, so that these steps move a matrix by one of rank at most r (LOZO).

    Raises:
        UsageError: a value is out of range, or the base is no sampler of independent entries.

    Memory: the factors of one tensor. Where a matrix is read by something other than a linear layer or an embedding,
    that tensor, as with other samplers.

    Source: Chen et al., 2024 (LOZO, arXiv 2410.07698), who move probes by A Bᵀ and divide the update by r, where here
    both have 1/√r; Sarkar et al., 2025 (EGGROLL, arXiv 2511.16652).

    >>> import torch
    >>> import zotune as zo
    >>> model = torch.nn.Linear(30, 20)
    >>> opt = zo.zo_sgd(model, lr=0.1, sampler=zo.low_rank(zo.gaussian, rank=2, interval=50))
    >>> (u,) = opt.directions()
    >>> int(torch.linalg.matrix_rank(u.of(model, "weight")))
    2
    """
    if isinstance(base, ScheduledSampler):
        raise UsageError(
            f"the factors' entries must be independent, got {base!r}; zotune.sparse(zotune.low_rank(…), …) masks the "
            "matrix that they make."
        )
    if rank < 1:
        raise UsageError(f"a matrix that is not zero has a rank of at least 1, got {rank=}")
    if interval < 1:
        raise UsageError(f"a factor serves at least one step, got {interval=}")
    return LowRank(base, rank, interval)
