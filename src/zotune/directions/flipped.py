"""Sign-flipped directions: the part for a matrix is U ⊙ (r sᵀ), where a whole step shares U and each has its own signs.

r and s hold independent signs, so that for entries of U with mean 0 and variance 1 E[u uᵀ] = I as for any direction,
and the directions of one step are uncorrelated although they share U. Many of them cost two products with matrices,
x (W + a u)ᵀ = x Wᵀ + a ((x ⊙ s) Uᵀ) ⊙ r, and a sum of them is Σ cᵢ uᵢ = U ⊙ (Σ cᵢ rᵢ sᵢᵀ).
Source: Wen et al., 2018 (Flipout, arXiv 1803.04386); GRZO (arXiv 2606.02857).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zotune import noise
from zotune.directions.samplers import Sampler, kernel_of, rademacher
from zotune.directions.schedule import ScheduledSampler, Weights
from zotune.errors import UsageError
from zotune.model.parameters import ParameterSet, TunedTensor
from zotune.noise import derive_seed
from zotune.system import limits

# Purpose number of the seed of the shared U in `derive_seed`.
_SHARED = 4


@dataclass(frozen=True)
class FlippedSampler:
    """The sampler of one step of a run with sign-flipped directions; see `flipped`.

    Attributes:
        base: the distribution of the entries of U, and of the directions of tensors that are no matrices.
        shared_seed: seed of the U that all directions of the step share.
        shapes: by tensor id, (m, n) of the matrices. A tensor of more dimensions is one of shape[0] rows.
    """

    base: Sampler
    shared_seed: int
    shapes: Mapping[int, tuple[int, int]] = field(compare=False, repr=False)

    def part(self, tensor_id: int) -> Sampler:
        """As `zotune.directions.samplers.part_of`: a tensor that is no matrix has the base's directions."""
        return self if tensor_id in self.shapes else self.base

    def fill(self, out: Tensor, seed: int, tensor_id: int, start: int) -> None:
        """As `Sampler.fill`."""
        if tensor_id not in self.shapes:
            self.base.fill(out, seed, tensor_id, start)
            return
        out.zero_()
        self.add(out, out, [seed], [1.0], tensor_id, start, None, noise.ROUNDING)

    def shared(self, out: Tensor, tensor_id: int, start: int) -> Tensor:
        """Write elements of U from `start` on into `out` (flat, float32), and return it."""
        self.base.fill(out, self.shared_seed, tensor_id, start)
        return out

    def shared_rows(self, indices: Tensor, tensor_id: int) -> Tensor:
        """The rows of U with the given indices: (rows, n), float32."""
        columns = self.shapes[tensor_id][1]
        out = torch.zeros(len(indices), columns, dtype=torch.float32, device=indices.device)
        if (kernel := kernel_of(self.base)) is not None:
            noise.add_rows(out, indices, kernel, self.shared_seed, 1.0, tensor_id)
        else:
            for row, index in zip(out, indices.tolist(), strict=True):
                self.shared(row, tensor_id, index * columns)
        return out

    def signs(self, seed: int, tensor_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The signs r (m,) and s (n,) of a direction's part for a matrix: the first m + n of its seed."""
        rows, columns = self.shapes[tensor_id]
        both = torch.empty(rows + columns, dtype=torch.float32, device=device)
        rademacher.fill(both, seed, tensor_id, 0)
        return both[:rows], both[rows:]

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
        """Compute out = x + U ⊙ Σ aᵢ rᵢ sᵢᵀ for slices that begin at element `start`, as `noise.add` does for others.

        One pass over the slice, some rows at a time, whatever the number of directions.
        """
        columns = self.shapes[tensor_id][1]
        signs = [self.signs(seed, tensor_id, x.device) for seed in seeds]
        dtype, stop = noise.compute_dtype(x.dtype), start + x.numel()
        at_once = max(1, limits.UPDATE_ELEMENTS // columns)
        for row in range(start // columns, -(-stop // columns), at_once):
            lo, hi = max(start, row * columns), min(stop, (row + at_once) * columns)
            factors = [(r[lo // columns : -(-hi // columns)], s) for r, s in signs]
            total = _sum_of_products(factors, scales, tensor_id, lo, hi - lo, dtype)
            total *= self.shared(torch.empty_like(total, dtype=torch.float32), tensor_id, lo)
            part = slice(lo - start, hi - start)
            noise.round_to(out[part], x[part].to(dtype) + total, rounding_seed, tensor_id, lo, rounding)

    def state(self) -> dict[str, Any]:
        """As `zotune.directions.schedule.StatefulSampler.state`."""
        return {"shared_seed": self.shared_seed}


def _sum_of_products(
    factors: Sequence[tuple[Tensor, Tensor]],
    scales: Sequence[float],
    tensor_id: int,
    start: int,
    size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Σ aᵢ rᵢ sᵢᵀ, of the given rows, at elements start … start + size - 1: summed in the order of i."""
    device, columns = factors[0][0].device, len(factors[0][1])
    if noise.adds_products(device) and dtype == torch.float32:
        total = torch.zeros(size, dtype=torch.float32, device=device)
        thin = [(r[:, None], s[:, None]) for r, s in factors]
        noise.add_products(total, total, thin, scales, tensor_id, start)
        return total
    whole = torch.zeros(len(factors[0][0]), columns, dtype=dtype, device=device)
    for (r, s), a in zip(factors, scales, strict=True):
        whole += (r.to(dtype) * torch.tensor(a, dtype=dtype, device=device))[:, None] * s
    return whole.view(-1)[start % columns :][:size]


@dataclass(frozen=True)
class Flipped(ScheduledSampler):
    """A sampler of sign-flipped directions, whose U is another one each step; see `flipped`."""

    base: Sampler

    def at(
        self, tuned: ParameterSet, seed: int, step: int, before: Any = None, weights: Weights = TunedTensor.storage
    ) -> FlippedSampler:
        """As `ScheduledSampler.at`."""
        return self._of(tuned, derive_seed(seed, step, 0, _SHARED))

    def restored(self, tuned: ParameterSet, seed: int, state: dict[str, Any]) -> FlippedSampler:
        """As `ScheduledSampler.restored`."""
        return self._of(tuned, state["shared_seed"])

    @property
    def constants(self) -> dict[str, Any]:
        """As `ScheduledSampler.constants`."""
        return {"flipped": True}

    def _of(self, tuned: ParameterSet, shared_seed: int) -> FlippedSampler:
        shapes = {t.id: t.parameter.shape for t in tuned if t.parameter.dim() > 1 and t.parameter.numel()}
        return FlippedSampler(self.base, shared_seed, {i: (s[0], s[1:].numel()) for i, s in shapes.items()})


def flipped(base: Sampler) -> Flipped:
    r"""Sign-flipped directions: for an m × n tensor U ⊙ (r sᵀ), with one U for all directions of a step.

    E[u uᵀ] = I, so E[ĝ] = ∇f, and different directions of a step are uncorrelated. They pay where there are many of
    them, as with one direction an example (`directions_per_batch`): a linear layer then takes two products with whole
    matrices, x Wᵀ + a ((x ⊙ s) Uᵀ) ⊙ r, and their update one pass over the weights.

    Args:
        base: the distribution of U's entries, `rademacher` or `gaussian`. Tensors of fewer than two dimensions (biases,
            gains of norms) get directions of their own from it. A tensor of more dimensions counts as a matrix of
            shape[0] rows.

    Raises:
        UsageError: the base is no sampler of independent entries.

    Source: Wen et al., 2018 (Flipout, arXiv 1803.04386); GRZO (arXiv 2606.02857).

    >>> import torch
    >>> import zotune as zo
    >>> model = torch.nn.Linear(30, 20)
    >>> opt = zo.zo_sgd(model, lr=0.1, num_queries=2, sampler=zo.flipped(zo.rademacher))
    >>> one, other = (u.of(model, "weight") for u in opt.directions())
    >>> int(torch.linalg.matrix_rank(one * other))
    1
    """
    if isinstance(base, ScheduledSampler):
        raise UsageError(f"the entries of a sign-flipped direction must be independent, got {base!r} as its base.")
    return Flipped(base)
