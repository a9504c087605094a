"""Directions whose entries are scaled by what each multiplies: u = s ⊙ z with s = 1 / (root mean square of the input).

    y = W x:     u_ij = s_j z_ij    s_j ∝ 1 / rms(x_j) over the rows x that a linear layer reads
    y = g ⊙ x:   u_j  = s_j z_j     the same for the gain of a norm, x being the normalised row

Some features of a language model's activations are a hundred times as large as others. A number that multiplies a large
one moves the outputs most, so that with z alone it decides how far a step may go, and all others hardly move. With s
each number moves the outputs alike. A plain step along such directions is one on x = s ⊙ θ, that is gradient descent
with the preconditioner diag(s²): the diagonal of the input's factor in K-FAC (Martens and Grosse, 2015, arXiv
1503.05671), for which forward passes suffice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zotune import noise
from zotune.directions.direction import Direction, add_terms
from zotune.directions.principal import Rows, is_transposed, note_rows, reader_of, readers, width
from zotune.directions.samplers import Sampler
from zotune.directions.schedule import FixedSampler, ScheduledSampler, by_tensor
from zotune.errors import UsageError
from zotune.model.parameters import ParameterSet, TunedTensor
from zotune.system import limits

# The least root mean square that counts, relative to that of the whole row; below it an input counts as noise.
_LEAST = 1e-2


@dataclass(frozen=True)
class _Scale:
    """The scales of a tensor's rows or columns: values[i // every % n] of element i of the flattened tensor."""

    values: Tensor
    every: int

    def of(self, start: int, size: int) -> Tensor:
        """The scales of elements start … start + size - 1."""
        first = start % self.values.numel()
        if self.every == 1 and first + size <= self.values.numel():
            return self.values[first : first + size]
        index = torch.arange(start, start + size, device=self.values.device)
        return self.values[torch.div(index, self.every, rounding_mode="floor") % self.values.numel()]


@dataclass(frozen=True)
class InputScaledSampler:
    """The sampler of a run with scaled directions; see `zotune.input_scaled`.

    Attributes:
        base: the distribution of z, and of the directions of tensors without scales.
        digest: names the scales; samplers with one digest and base are equal.
        scales: by tensor id.
    """

    base: Sampler
    digest: str
    scales: Mapping[int, _Scale] = field(compare=False, repr=False)

    def part(self, tensor_id: int) -> Sampler:
        """As `zotune.directions.samplers.part_of`."""
        return self if tensor_id in self.scales else self.base

    def fill(self, out: Tensor, seed: int, tensor_id: int, start: int) -> None:
        """As `Sampler.fill`."""
        self.base.fill(out, seed, tensor_id, start)
        if (scale := self.scales.get(tensor_id)) is not None:
            out.mul_(scale.of(start, out.numel()))

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
        """As `zotune.directions.samplers.AddingSampler.add`: x + s ⊙ Σ aᵢ zᵢ."""
        dtype, own = noise.compute_dtype(x.dtype), self.scales[tensor_id]
        terms = [(a, Direction(seed, self.base)) for a, seed in zip(scales, seeds, strict=True)]
        for lo in range(0, x.numel(), limits.UPDATE_ELEMENTS):
            part = slice(lo, min(lo + limits.UPDATE_ELEMENTS, x.numel()))
            moved = torch.zeros(part.stop - lo, dtype=dtype, device=x.device)
            add_terms(moved, moved, terms, tensor_id, start + lo)
            moved *= own.of(start + lo, part.stop - lo)
            moved += x[part]
            noise.round_to(out[part], moved, rounding_seed, tensor_id, start + lo, rounding)


@dataclass(frozen=True)
class InputScaled(FixedSampler):
    """A sampler of directions scaled by vectors that are given by the tensors' names; see `input_scaled`."""

    base: Sampler
    scales: Mapping[str, Tensor] = field(compare=False, repr=False)
    digest: str

    @property
    def constants(self) -> dict[str, Any]:
        """As `ScheduledSampler.constants`."""
        return {"input_scaled": self.digest}

    def of(self, tuned: ParameterSet) -> InputScaledSampler:
        """As `FixedSampler.of`."""
        given = by_tensor(tuned, self.scales, "input_scaled")
        return InputScaledSampler(self.base, self.digest, {t.id: _placed(t, values) for t, values in given})


def _placed(tensor: TunedTensor, values: Tensor) -> _Scale:
    """The scales of a tensor on its device: of its inputs, which are its columns, or rows where it is transposed."""
    shape = tensor.parameter.shape
    reader = reader_of(tensor)
    is_rows = len(shape) == 1 or (reader is not None and is_transposed(reader))
    size = shape[0] if is_rows else shape[1:].numel()
    if values.shape != (size,) or not (values.is_meta or (values > 0).all()):
        raise UsageError(
            f"input_scaled: {tensor.name!r} of shape {tuple(shape)} takes {size} positive scales, one for each of its "
            f"inputs, not a tensor of shape {tuple(values.shape)}."
        )
    # A plan has tensors without values.
    device = tensor.device if tensor.is_held else values.device
    return _Scale(values.detach().to(device, torch.float32).contiguous(), shape[1:].numel() if is_rows else 1)


def input_scaled(base: Sampler, scales: Mapping[str, Tensor]) -> InputScaled:
    """Directions of some tensors whose entries are scaled: u = s ⊙ z, with one s for each input.

    Args:
        base: the distribution of z, and of the directions of tensors that `scales` does not name.
        scales: (n,) positive numbers by the names of tuned tensors, such as `zotune.input_scales` finds; of a linear
            layer or the gain of a norm with n inputs.

    Raises:
        UsageError: a name or a vector fits no tuned tensor (when an optimizer is made), or the base changes as a run
            goes on.

    The estimate's mean is diag(s²) ∇f. The scales count by a digest of their numbers: a ledger that was written with
    others is refused.

    >>> import zotune as zo
    >>> model = nn.Linear(2, 1, bias=False)
    >>> sampler = input_scaled(zo.rademacher, {"weight": torch.tensor([1.0, 0.5])})
    >>> (u,) = zo.zo_sgd(model, lr=0.1, sampler=sampler).directions()
    >>> u.of(model, "weight").abs().tolist()
    [[1.0, 0.5]]
    """
    if isinstance(base, ScheduledSampler):
        raise UsageError(f"the entries of z must be independent, got {base!r}; give gaussian or rademacher.")
    digest = hashlib.blake2b(digest_size=16)
    for name, values in sorted(scales.items()):
        digest.update(f"{name} {tuple(values.shape)}".encode())
        if not values.is_meta:
            digest.update(values.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return InputScaled(base, dict(scales), digest.hexdigest())


class _MeanSquares:
    """The mean squares of the columns of rows (rows, n)."""

    def __init__(self, n: int, device: torch.device) -> None:
        self.total, self.num_rows = torch.zeros(n, dtype=torch.float64, device=device), 0

    def add(self, x: Tensor) -> None:
        self.num_rows += len(x)
        self.total += x.double().square().sum(0)


def input_scales(
    model: nn.Module | ParameterSet, run: Callable[[], object], *, rows: Rows | None = None
) -> dict[str, Tensor]:
    """Find 1 / rms of what each tuned tensor multiplies, in a pass; for `zotune.input_scaled`.

    Args:
        model: with the tuned tensors. Those that are the weight of a linear layer or the gain of a norm get scales,
            unless an embedding reads them too.
        run: runs forward passes over some typical inputs.
        rows: of what a module reads, the rows that count, such as those of tokens that are no padding; default: all.

    Returns:
        (n,) float32 scales by name, with a mean square of 1, so that directions are as long as without them. Inputs
        below a hundredth of the row's root mean square count as that.

    Raises:
        UsageError: a tensor was not read, or what it reads is zero or not finite.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> found = input_scales(model, lambda: model(torch.tensor([[1.0, 10.0], [-1.0, 10.0]])))
    >>> ratio = found["weight"][0] / found["weight"][1]
    >>> round(float(ratio), 3), round(float(found["weight"].square().mean()), 3)
    (10.0, 1.0)
    """
    read = readers(ParameterSet.of(model))
    found = {name: _MeanSquares(width(t, m), t.device) for name, (t, m) in read.items()}
    with note_rows({m: found[name] for name, (_, m) in read.items()}, rows), torch.no_grad():
        run()
    return {name: _scales(name, one) for name, one in found.items()}


def planned_scales(tuned: ParameterSet) -> dict[str, Tensor]:
    """The scales that `input_scales` would find, without their numbers: on `meta`."""
    return {name: torch.empty(width(t, m), device="meta") for name, (t, m) in readers(tuned).items()}


def _scales(name: str, one: _MeanSquares) -> Tensor:
    mean = one.total / max(one.num_rows, 1)
    if not mean.isfinite().all() or not mean.any():
        raise UsageError(f"the passes did not read {name!r}, or as zeros or not as finite numbers: it has no scales.")
    inverse = mean.sqrt().clamp(min=_LEAST * float(mean.mean().sqrt())).reciprocal()
    return (inverse / inverse.square().mean().sqrt()).float()
