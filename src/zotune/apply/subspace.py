"""Transforms of whole matrices that stay small: h acts on the coordinates of ĝ in a subspace.

Where all directions of a step lie in one subspace, U = L Z Rᵀ, so does ĝ = L G Rᵀ with G = Σ cᵢ Zᵢ. A rule takes G, of
r n or r² numbers, to the coordinates H of the step and to its new state, which is as small; the step L H Rᵀ goes to the
weights by its thin factors. Neither ĝ nor a state of the weights' size is ever in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from zotune import noise
from zotune.apply.transforms import State, Transform, identity
from zotune.directions.direction import Terms
from zotune.directions.low_rank import product
from zotune.directions.samplers import Factors, SpanningSampler, Subspace, spanning
from zotune.errors import UsageError
from zotune.model.parameters import TunedTensor
from zotune.model.portable_algebra import portable_matmul
from zotune.system import limits

# The coordinates G (double precision), the state, and the basis that they are of, to those of the step and the state.
Rule = Callable[[Tensor, State, "Basis"], tuple[Tensor, State]]


@dataclass(frozen=True)
class Basis:
    """The subspace that coordinates are of, and the way from an earlier one.

    Attributes:
        tensor_id: of the matrix.
        present: the subspace of this step.
        earlier: the subspace of a seed.
    """

    tensor_id: int
    present: Subspace
    earlier: Callable[[int], Subspace]

    def moved(self, z: Tensor, seed: int) -> Tensor:
        """The coordinates of what is nearest to L Z Rᵀ of the subspace `seed` in the present one: LᵀL' Z R'ᵀR.

        Columns that are not orthonormal count as such by their mean length: Rᵀ R is about n I.
        """
        if seed == self.present.seed:
            return z
        before, now = self.earlier(seed), self.present
        if now.left is not None and before.left is not None:
            z = portable_matmul(portable_matmul(now.left.t(), before.left), z)
        if now.right is not None and before.right is not None:
            share = 1.0 if now.left is not None else 1.0 / now.right.shape[0]
            z = portable_matmul(z.double(), portable_matmul(before.right.t(), now.right)) * share
        return z


@dataclass(frozen=True)
class InSubspace:
    """A transform by a rule for the matrices whose directions share a subspace.

    Attributes:
        rule: what happens to a matrix's coordinates.
        other: the transform of tensors that are no matrices, element by element.
    """

    rule: Rule
    other: Transform = identity

    def of(self, terms: Terms, tensor: TunedTensor) -> InSubspace | Transform:
        """The transform of one tensor.

        Raises:
            UsageError: the directions of a matrix share no subspace.
        """
        if tensor.parameter.dim() < 2 or not tensor.parameter.numel():
            return self.other
        _space(terms, tensor)
        return self


def coordinates_only(gradient: Tensor, state: State, basis: Basis) -> tuple[Tensor, State]:
    """H = G: the sum of all directions by one product."""
    return gradient, state


def thin_step(
    transform: InSubspace, terms: Terms, tensor: TunedTensor, state: State, device: torch.device
) -> tuple[Factors, State]:
    """The thin factors of a matrix's step h(ĝ), and its new state, on a device."""
    sampler, dtype = _space(terms, tensor), noise.compute_dtype(tensor.parameter.dtype)
    present = sampler.subspace(tensor.id, device)
    parts = [c * sampler.coordinates(u.seed, tensor.id, device).double() for c, u in terms]
    gradient = sum(parts[1:], parts[0])
    basis = Basis(tensor.id, present, partial(sampler.subspace, tensor.id, device))
    found, after = transform.rule(gradient, state, basis)
    return present.lifted(found.to(dtype)), {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in after.items()}


def _space(terms: Terms, tensor: TunedTensor) -> SpanningSampler:
    samplers = {u.sampler_of(tensor.id) for _, u in terms}
    found = spanning(samplers.pop()) if len(samplers) == 1 else None
    if found is None:
        raise UsageError(
            f"the transform works on the coordinates of {tensor.name!r} in a subspace, but its directions share none. "
            "Use a sampler of zotune.subspace, or of zotune.low_rank with an interval above 1."
        )
    return found


def add_step(
    out: Tensor, x: Tensor, step: Factors, a: float, keep: float, tensor_id: int, start: int, seed: int | None
) -> None:
    """Compute out = keep x + a (rows of left rightᵀ) for flat slices that begin at element `start` of a matrix."""
    columns = step.right.shape[0]
    rows = slice(start // columns, -(-(start + x.numel()) // columns))
    if keep == 1 and noise.adds_products(x.device) and step.left.dtype == torch.float32:
        factors = [(step.left[rows].contiguous(), step.right)]
        noise.add_products(out, x, factors, [a], tensor_id, start, seed)
        return
    at_once = max(1, limits.UPDATE_ELEMENTS // columns)
    for lo in range(rows.start, rows.stop, at_once):
        hi = min(lo + at_once, rows.stop)
        first, last = max(start, lo * columns), min(start + x.numel(), hi * columns)
        part, whole = slice(first - start, last - start), product(step.left[lo:hi], step.right).view(-1)
        moved = whole[first - lo * columns : last - lo * columns]
        y = x[part].to(moved.dtype) * keep + moved * torch.tensor(a, dtype=moved.dtype, device=moved.device)
        noise.round_to(out[part], y, seed, tensor_id, first)
