"""Directions within subspaces that are given: U = L Z Rᵀ of a matrix, u = L z of a vector, with Z drawn anew.

The subspaces may come from anywhere: the principal components of what a layer reads (`zotune.principal_subspaces`,
AGZO), or the singular vectors of its weight. They stay as they are, so that a run of plain steps moves a tensor within
its subspace alone, which has as many dimensions as Z has numbers.
Source: Wang et al., 2026 (AGZO, arXiv 2601.17261): U = Z Rᵀ with R of a layer's inputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zotune.directions.low_rank import SpanningThinSampler, drawn, product
from zotune.directions.samplers import Factors, Sampler, Subspace
from zotune.directions.schedule import FixedSampler, ScheduledSampler, by_tensor
from zotune.errors import UsageError
from zotune.model.parameters import ParameterSet


@dataclass(frozen=True)
class _OfVector:
    """The sampler of a vector's part: u = L z."""

    within: WithinSampler

    def fill(self, out: Tensor, seed: int, tensor_id: int, start: int) -> None:
        """As `Sampler.fill`."""
        left = self.within.subspace(tensor_id, out.device).left
        assert left is not None
        z = torch.empty(left.shape[1], dtype=torch.float32, device=out.device)
        self.within.base.fill(z, seed, tensor_id, 0)
        out.copy_(product(left[start : start + out.numel()], z[None])[:, 0])


@dataclass(frozen=True)
class WithinSampler(SpanningThinSampler):
    """The sampler of a run with directions in given subspaces; see `zotune.within`.

    Attributes:
        base: the distribution of the entries of Z, and of the directions of tensors without a subspace.
        digest: names the subspaces; samplers with one digest and base are equal.
        subspaces: by tensor id.
        shapes: by tensor id, (m, n) of the matrices among them.
        rank: the largest number of columns of a basis.
    """

    base: Sampler
    digest: str
    subspaces: Mapping[int, Subspace] = field(compare=False, repr=False)
    shapes: Mapping[int, tuple[int, int]] = field(compare=False, repr=False)
    rank: int = field(compare=False)

    def part(self, tensor_id: int) -> Sampler:
        """As `zotune.directions.samplers.part_of`."""
        if tensor_id not in self.subspaces:
            return self.base
        return self if tensor_id in self.shapes else _OfVector(self)

    def fill(self, out: Tensor, seed: int, tensor_id: int, start: int) -> None:
        """As `Sampler.fill`."""
        part = self.part(tensor_id)
        if part is self:
            super().fill(out, seed, tensor_id, start)
        else:
            part.fill(out, seed, tensor_id, start)

    def together(self, seed: int, ids: Any, device: torch.device) -> dict[int, Factors]:
        """As `zotune.directions.samplers.FactoredSampler.together`: none."""
        return {}

    def coordinates(self, seed: int, tensor_id: int, device: torch.device) -> Tensor:
        """As `zotune.directions.samplers.SpanningSampler.coordinates`: Z, of the bases' columns or of all."""
        (m, n), own = self.shapes[tensor_id], self.subspaces[tensor_id]
        rows = m if own.left is None else own.left.shape[1]
        columns = n if own.right is None else own.right.shape[1]
        return drawn(self.base, columns, seed, tensor_id, 0, rows, device)

    def subspace(self, tensor_id: int, device: torch.device, seed: int | None = None) -> Subspace:
        """As `zotune.directions.samplers.SpanningSampler.subspace`."""
        return _placed(self.subspaces[tensor_id], device)


@dataclass(frozen=True)
class Within(FixedSampler):
    """A sampler of directions in subspaces that are given by the tensors' names; see `within`."""

    base: Sampler
    subspaces: Mapping[str, Subspace] = field(compare=False, repr=False)
    digest: str

    @property
    def constants(self) -> dict[str, Any]:
        """As `ScheduledSampler.constants`."""
        return {"within": self.digest}

    def of(self, tuned: ParameterSet) -> WithinSampler:
        """As `FixedSampler.of`."""
        by_id, shapes = {}, {}
        for tensor, space in by_tensor(tuned, self.subspaces, "within"):
            _check(tensor.name, space, tensor.parameter.shape)
            by_id[tensor.id] = _placed(space, tensor.device if tensor.is_held else None)
            if tensor.parameter.dim() > 1:
                shapes[tensor.id] = (tensor.parameter.shape[0], tensor.parameter.shape[1:].numel())
        return WithinSampler(self.base, self.digest, by_id, shapes, max(map(dimensions, by_id.values()), default=1))


def dimensions(space: Subspace) -> int:
    """The largest number of columns of a subspace's bases."""
    return max(side.shape[1] for side in (space.left, space.right) if side is not None)


def _check(name: str, space: Subspace, shape: torch.Size) -> None:
    """Check that a subspace is one of a tensor of this shape."""
    rows = (shape[0], shape[1:].numel())
    fits = all(side is None or side.shape[0] == n for side, n in zip((space.left, space.right), rows, strict=True))
    if not fits or (space.right is not None and len(shape) < 2):
        bases = [None if side is None else tuple(side.shape) for side in (space.left, space.right)]
        raise UsageError(
            f"within: the bases of {name!r}, {bases[0]} and {bases[1]}, are no bases of a tensor of shape "
            f"{tuple(shape)}: the left one has a row for each of its rows, the right one for each of its columns."
        )


def within(base: Sampler, subspaces: Mapping[str, Subspace]) -> Within:
    r"""Directions of some tensors within subspaces that are given.

        of a matrix:  U = s L Z Rᵀ    L (m × r) or the identity, R (n × r) or the identity
        of a vector:  u = s L z

    Z is drawn anew for each direction. With orthonormal bases E[u uᵀ] is the projection onto the subspace: the estimate
    is that of the gradient's part within it, whose variance grows with the subspace's dimensions alone.

    Args:
        base: the distribution of the entries of Z, and of the directions of tensors that `subspaces` does not name.
        subspaces: bases by the names of tuned tensors, such as `zotune.principal_subspaces` finds; float32.

    Raises:
        UsageError: a name or a base fits no tuned tensor (when an optimizer is made), or the base of the entries
            changes as a run goes on.

    The bases count by a digest of their numbers: a ledger that was written with others is refused.

    Source: Wang et al., 2026 (AGZO, arXiv 2601.17261).

    >>> import zotune as zo
    >>> from zotune.directions.samplers import Subspace
    >>> model = torch.nn.Linear(3, 2, bias=False)
    >>> first_input = torch.tensor([[1.0], [0.0], [0.0]])
    >>> sampler = within(zo.gaussian, {"weight": Subspace(0, None, first_input)})
    >>> (u,) = zo.zo_sgd(model, lr=0.1, sampler=sampler).directions()
    >>> u.of(model, "weight")[:, 1:].abs().tolist()
    [[0.0, 0.0], [0.0, 0.0]]
    """
    if isinstance(base, ScheduledSampler):
        raise UsageError(f"the entries of Z must be independent, got {base!r}; give gaussian or rademacher.")
    plain = {name: _placed(space, None) for name, space in subspaces.items()}
    return Within(base, plain, _digest(plain))


def _placed(space: Subspace, device: torch.device | None) -> Subspace:
    """A subspace with bases that kernels read, on a device: float32, one row after the other."""

    def placed(side: Tensor | None) -> Tensor | None:
        return None if side is None else side.detach().to(device, torch.float32).contiguous()

    return Subspace(space.seed, placed(space.left), placed(space.right), space.scale)


def _digest(subspaces: Mapping[str, Subspace]) -> str:
    """A digest of names and numbers; of bases on `meta`, which have none, of their shapes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, space in sorted(subspaces.items()):
        digest.update(f"{name} {space.scale}".encode())
        for side in (space.left, space.right):
            digest.update(repr(None if side is None else tuple(side.shape)).encode())
            if side is not None and not side.is_meta:
                digest.update(side.cpu().numpy().tobytes())
    return digest.hexdigest()
