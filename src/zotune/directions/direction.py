"""Random directions, kept as seeds.

A direction over a model with d parameters costs one integer, not d numbers: its part for a parameter,
or for any slice of it, is made again whenever it is needed (Malladi et al., 2023, arXiv 2305.17333,
section 2.1). Which number belongs to which element is fixed by `zotune.noise.spec`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from operator import index

import torch
from torch import Tensor, nn

from zotune import noise
from zotune.directions.blocks import Block
from zotune.directions.samplers import Factors, Sampler, adding, factored, kernel_of, part_of, rademacher
from zotune.model.parameters import ParameterSet, TunedTensor
from zotune.system import limits


@dataclass(frozen=True)
class Direction:
    """A random direction u ∈ Rᵈ over the tuned tensors of a model, kept as one seed.

    Args:
        seed: 0 ≤ seed < 2⁶⁴.
        sampler: the distribution of the entries.
        block: where u is not zero; everywhere by default.

    >>> model = nn.Linear(2, 3)
    >>> u = Direction(seed=7)
    >>> u.of(model, "bias").tolist()
    [-1.0, 1.0, 1.0]
    >>> u.of(model, "weight").shape, u.of(model, "weight").dtype
    (torch.Size([3, 2]), torch.float32)
    """

    seed: int
    sampler: Sampler = rademacher
    block: Block | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", index(self.seed))  # arithmetic of other integers may overflow
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"a direction's seed is an integer in [0, 2**64), got {self.seed}")

    @property
    def tensors(self) -> frozenset[int] | None:
        """Ids of the tensors for which u is not zero; None for all."""
        return None if self.block is None else self.block.ids

    def within(self, block: Block | None) -> Direction:
        """The same direction, zero outside `block`."""
        return replace(self, block=block)

    def moves(self, tensor_id: int) -> bool:
        """Whether the part for a tensor is not zero."""
        return self.block is None or tensor_id in self.block.ids

    def sampler_of(self, tensor_id: int) -> Sampler:
        """The sampler of the part for a tensor."""
        return part_of(self.sampler, tensor_id)

    def kernel(self, tensor_id: int) -> int | None:
        """The noise stream whose kernels make the part for a tensor; None where no kernel does."""
        return kernel_of(self.sampler_of(tensor_id))

    def factors(self, tensor_id: int, device: torch.device, start: int = 0, size: int | None = None) -> Factors | None:
        """The thin factors of the part for a tensor, of the rows that elements start … start + size - 1 lie in.

        None where the part has no factors.
        """
        sampler = factored(self.sampler_of(tensor_id))
        return None if sampler is None else sampler.factors(self.seed, tensor_id, device, start, size)

    def all_factors(self, ids: Iterable[int], device: torch.device) -> dict[int, Factors]:
        """The factors of the parts for some tensors, drawn together; empty where there are none or they are large."""
        sampler = factored(self.sampler)
        return {} if sampler is None else sampler.together(self.seed, filter(self.moves, ids), device)

    def has_factors(self, tensor_id: int) -> bool:
        """Whether the part for a tensor is known by thin factors."""
        return factored(self.sampler_of(tensor_id)) is not None

    def of(self, model: nn.Module | ParameterSet, name: str) -> Tensor:
        """The part of u for the tensor called `name` (any of a tied tensor's names): its shape, float32.

        Raises:
            KeyError: no tensor of the model that requires a gradient has this name.
        """
        tensor = ParameterSet.of(model)[name]
        out = torch.empty(tensor.parameter.shape, dtype=torch.float32, device=tensor.device)
        if not self.moves(tensor.id):
            return out.zero_()
        self.sampler.fill(out.view(-1), self.seed, tensor.id, 0)
        return out


Terms = Sequence[tuple[float, Direction]]


def moving(terms: Terms, tensor_id: int) -> Terms:
    """The terms whose directions are not zero for a tensor."""
    return [(a, u) for a, u in terms if u.moves(tensor_id)]


def add_terms(
    out: Tensor,
    x: Tensor,
    terms: Terms,
    tensor_id: int,
    start: int = 0,
    rounding_seed: int | None = None,
    rounding: int = noise.ROUNDING,
) -> None:
    """Compute out = x + Σ aᵢ uᵢ for flat, contiguous slices that begin at element `start` of tensor `tensor_id`.

    One pass where a kernel serves all directions, otherwise chunk by chunk with a small scratch.
    Half-precision results are rounded to nearest, or without bias at random, by the stream `rounding`, if given a
    `rounding_seed`.
    """
    terms = moving(terms, tensor_id)
    if (fused := one_pass(terms, tensor_id)) is not None:
        noise.add(out, x, *fused, tensor_id, start, rounding_seed, rounding)
        return
    if (sampler := adding({u.sampler_of(tensor_id) for _, u in terms})) is not None:
        seeds, scales = [u.seed for _, u in terms], [a for a, _ in terms]
        sampler.add(out, x, seeds, scales, tensor_id, start, rounding_seed, rounding)
        return
    if noise.adds_products(x.device) and (found := _all_factors(terms, tensor_id, start, x)):
        factors = [(f.left, f.right) for f in found]
        noise.add_products(out, x, factors, [a for a, _ in terms], tensor_id, start, rounding_seed, rounding)
        return
    dtype = noise.compute_dtype(x.dtype)
    size = limits.UPDATE_ELEMENTS
    for lo in range(0, x.numel(), size):
        part = slice(lo, min(lo + size, x.numel()))
        total = x[part].to(dtype) + sum_terms(terms, tensor_id, start + lo, part.stop - lo, dtype, x.device)
        noise.round_to(out[part], total, rounding_seed, tensor_id, start + lo, rounding)


def one_pass(terms: Terms, tensor_id: int) -> tuple[int, tuple[int, ...], tuple[float, ...]] | None:
    """Stream, seeds and scales of terms whose directions share a sampler with a kernel; None for any others."""
    samplers = {u.sampler_of(tensor_id) for _, u in terms}
    kernel = kernel_of(samplers.pop()) if len(samplers) == 1 else None
    if kernel is None:
        return None
    return kernel, tuple(u.seed for _, u in terms), tuple(a for a, _ in terms)


def _all_factors(terms: Terms, tensor_id: int, start: int, x: Tensor) -> list[Factors]:
    """The factors of each term for the rows of a slice; empty unless all terms have factors of one rank."""
    samplers = [factored(u.sampler_of(tensor_id)) for _, u in terms]
    if None in samplers or len({s.rank for s in samplers if s is not None}) != 1:
        return []
    factors = (u.factors(tensor_id, x.device, start, x.numel()) for _, u in terms)
    return [f for f in factors if f is not None]


def combine(terms: Terms, tensor: TunedTensor) -> Tensor:
    """Σ aᵢ uᵢ for one whole tensor: its shape, float32 (float64 for a float64 tensor)."""
    p = tensor.parameter
    total = torch.zeros(p.numel(), dtype=noise.compute_dtype(p.dtype), device=tensor.device)
    add_terms(total, total, terms, tensor.id)
    return total.view(p.shape)


def sum_terms(terms: Terms, tensor_id: int, start: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Σ aᵢ uᵢ for elements start … start + size - 1 of one tensor, in the order of the terms."""
    u = torch.empty(size, dtype=torch.float32, device=device)
    total = torch.zeros(size, dtype=dtype, device=device)
    for a, direction in terms:
        direction.sampler.fill(u, direction.seed, tensor_id, start)
        total += u.to(dtype) * torch.tensor(a, dtype=dtype, device=device)
    return total
