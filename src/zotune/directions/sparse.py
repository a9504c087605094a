"""Sparse directions: a fraction of the entries is set to zero, the same ones in probe and update.

Source: the paper, section 5 (gradient pruning): layer-wise ratios from one global magnitude threshold,
then random masks with these ratios, drawn anew as the run goes on. Masks are never stored: a random one
comes from its own stream of the noise specification, one by magnitude from the weights at the moment
of use, which do not move between probe and update.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from zotune import noise
from zotune.directions.samplers import Sampler
from zotune.directions.schedule import AnySampler, ScheduledSampler, Weights, at_step, restored, state_of
from zotune.model.parameters import ParameterSet, TunedTensor
from zotune.system import limits

# The name of mask seeds among what is derived from a run's seed.
_PURPOSE = 2


class Mask(StrEnum):
    """The entries that a mask sets to zero: `RANDOM` entries, or those of the smallest weights (`MAGNITUDE`)."""

    RANDOM = "random"
    MAGNITUDE = "magnitude"


class Group(StrEnum):
    """How sparsity is divided: by one magnitude threshold over all tensors (`GLOBAL`), or equally in every tensor
    (`LAYER`).
    """

    GLOBAL = "global"
    LAYER = "layer"


@dataclass(frozen=True)
class Level:
    """The mask of one tensor: it covers every weight below `threshold`, and weights at the threshold with probability
    `ratio`.

    A random mask has no threshold and covers every weight with probability `ratio`.
    """

    ratio: float
    threshold: float | None = None


@dataclass(frozen=True)
class Sparse(ScheduledSampler):
    """A sampler whose directions are masked, with a mask that is drawn again as a run goes on; see `sparse`."""

    base: AnySampler
    sparsity: float
    mask: Mask
    group: Group
    interval: int

    def at(
        self,
        tuned: ParameterSet,
        seed: int,
        step: int,
        before: Masked | None = None,
        weights: Weights = TunedTensor.numbers,
    ) -> Masked:
        """As `ScheduledSampler.at`: the levels of the step before may still hold."""
        epoch = step // self.interval
        base = at_step(self.base, tuned, seed, step, before and before.base, weights)
        if before is not None and before.epoch == epoch:
            return before if before.base == base else self._masked(tuned, seed, epoch, before.levels, base)
        # The paper's ratios are those of the weights that a run begins with; a mask by magnitude follows the weights.
        if before is not None and self.mask == Mask.RANDOM:
            return self._masked(tuned, seed, epoch, before.levels, base)
        return self._masked(tuned, seed, epoch, self._levels(tuned, weights), base)

    def restored(self, tuned: ParameterSet, seed: int, state: dict[str, Any]) -> Masked:
        """As `ScheduledSampler.restored`."""
        levels = {int(key): Level(*level) for key, level in state["levels"].items()}
        return self._masked(tuned, seed, state["epoch"], levels, restored(self.base, tuned, seed, state.get("base")))

    @property
    def constants(self) -> dict[str, Any]:
        """As `ScheduledSampler.constants`."""
        own = {"sparsity": self.sparsity, "mask": str(self.mask), "group": str(self.group)}
        return {**own, "interval": self.interval}

    @property
    def depends_on_weights(self) -> bool:
        """As `ScheduledSampler.depends_on_weights`."""
        return self.mask == Mask.MAGNITUDE or super().depends_on_weights

    def _masked(self, tuned: ParameterSet, seed: int, epoch: int, levels: dict[int, Level], base: Sampler) -> Masked:
        weights = {t.id: t for t in tuned} if self.depends_on_weights else {}
        return Masked(base, noise.derive_seed(seed, epoch, 0, _PURPOSE), epoch, levels, weights)

    def _levels(self, tuned: ParameterSet, weights: Weights) -> dict[int, Level]:
        groups = [list(tuned)] if self.group == Group.GLOBAL else [[t] for t in tuned]
        return {i: level for tensors in groups for i, level in self._levels_of(tensors, weights).items()}

    def _levels_of(self, tensors: Sequence[TunedTensor], weights: Weights) -> dict[int, Level]:
        levels = {t.id: Level(self.sparsity) for t in tensors}
        if self.mask == Mask.RANDOM and self.group == Group.LAYER:
            return levels
        # A threshold would mask the whole of a tensor that is zero now (a bias, an adapter's second factor), for ever.
        graded = [t for t in tensors if any(bool(chunk.any()) for chunk in _magnitudes(weights(t)))]
        if not graded:
            return levels
        counts, threshold = _quantile(graded, self.sparsity, weights)
        below, equal = (sum(c[i] for c in counts.values()) for i in (0, 1))
        total = sum(t.parameter.numel() for t in graded)
        ties = min(max((self.sparsity * total - below) / equal, 0.0), 1.0) if equal else 0.0
        for t in graded:
            less, same = counts[t.id]
            ratio = (less + ties * same) / t.parameter.numel()
            levels[t.id] = Level(ratio) if self.mask == Mask.RANDOM else Level(ties, threshold)
        return levels


@dataclass(frozen=True, eq=False)
class Masked:
    """The sampler of one step of a sparse run: u ⊙ m, with m a function of the mask's seed and the weights."""

    base: Sampler
    mask_seed: int
    epoch: int
    levels: dict[int, Level]
    weights: dict[int, TunedTensor]

    def fill(self, out: Tensor, seed: int, tensor_id: int, start: int) -> None:
        """As `Sampler.fill`."""
        self.base.fill(out, seed, tensor_id, start)
        level = self.levels[tensor_id]
        if level.threshold is None:
            noise.mask(out, level.ratio, self.mask_seed, tensor_id, start)
            return
        weights = self.weights[tensor_id].storage().contiguous().view(-1)[start : start + out.numel()]
        magnitude = weights.to(out.device).abs().float()
        ties = torch.ones_like(out)
        noise.mask(ties, level.ratio, self.mask_seed, tensor_id, start)
        out.masked_fill_((magnitude < level.threshold) | ((magnitude == level.threshold) & (ties == 0)), 0.0)

    def state(self) -> dict[str, Any]:
        """As `zotune.directions.schedule.StatefulSampler.state`."""
        levels = {i: (level.ratio, level.threshold) for i, level in self.levels.items()}
        return {"epoch": self.epoch, "levels": levels, "base": state_of(self.base)}


def sparse(
    base: AnySampler,
    sparsity: float,
    *,
    mask: Mask | str = Mask.RANDOM,
    group: Group | str = Group.GLOBAL,
    interval: int = 1,
) -> Sparse:
    r"""Directions û = m ⊙ u with a mask m ∈ {0, 1}ᵈ, in which a fraction `sparsity` of the entries is zero.

        m_j = 0 with probability s_l for entry j of tensor l,   Σ_l d_l s_l = s d

    The layer-wise sparsity s_l is the fraction of the tensor's weights that are among the smallest s d of
    all (one global magnitude threshold). E[ĝ] = (1 - s_l) ∇f for a random mask drawn anew each step.
    A tensor whose weights are all zero has no smallest ones: it gets s_l = s.

    Args:
        base: the distribution of the entries that are not zero.
        sparsity: s, the fraction of entries that are zero; 0 ≤ s < 1.
        mask: "random", as in the paper: zeros at random places, s_l in each tensor; or "magnitude": zeros at the
            tensor's smallest weights, as they are at that moment.
        group: "global": s_l from one threshold for all weights; "layer": s_l = s in every tensor.
        interval: steps between two masks. A mask by magnitude costs two passes over the weights each time.

    Raises:
        ValueError: a value is out of range or unknown.

    Memory: none beyond that of the base; a mask is made with the part of u that it belongs to.

    Source: the paper, section 5 and Table 8.

    >>> import zotune as zo
    >>> model = torch.nn.Linear(200, 50, bias=False)
    >>> opt = zo.zo_sgd(model, lr=0.1, sampler=zo.sparse(zo.gaussian, sparsity=0.2))
    >>> (u,) = opt.directions()
    >>> round(float((u.of(model, "weight") == 0).float().mean()), 1)
    0.2
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is the fraction of entries set to zero, at least 0 and below 1; got {sparsity=}")
    if interval < 1:
        raise ValueError(f"a mask serves at least one step, got {interval=}")
    return Sparse(base, sparsity, Mask(mask), Group(group), interval)


def _magnitudes(x: Tensor) -> Iterator[Tensor]:
    """|x| of one tensor in single precision, chunk by chunk."""
    flat = x.contiguous().view(-1)
    for lo in range(0, flat.numel(), limits.STATISTIC_ELEMENTS):
        yield flat[lo : lo + limits.STATISTIC_ELEMENTS].abs().float()


def _quantile(
    tensors: Sequence[TunedTensor], fraction: float, weights: Weights
) -> tuple[dict[int, tuple[int, int]], float]:
    """The smallest τ that at least a `fraction` of all |x| do not exceed, and per tensor how many are < τ and = τ.

    Positive floats are ordered as their bit patterns: a histogram of the upper half of the bits finds the bin of τ,
    one of the lower half within that bin finds τ, without sorting and in half a megabyte.
    """
    wanted = fraction * sum(t.parameter.numel() for t in tensors)

    def patterns() -> Iterable[Tensor]:
        return (m.view(torch.int32) for t in tensors for m in _magnitudes(weights(t)))

    upper, before = _bin((p >> 16 for p in patterns()), wanted)
    lower, _ = _bin((p[p >> 16 == upper] & 0xFFFF for p in patterns()), wanted - before)
    threshold = torch.tensor(upper << 16 | lower, dtype=torch.int32, device="cpu").view(torch.float32)
    counts = {}
    for t in tensors:
        chunks = [(int((m < threshold).sum()), int((m == threshold).sum())) for m in _magnitudes(weights(t))]
        counts[t.id] = (sum(c[0] for c in chunks), sum(c[1] for c in chunks))
    return counts, float(threshold)


def _bin(values: Iterable[Tensor], wanted: float) -> tuple[int, int]:
    """The first of 2¹⁶ values up to which at least `wanted` (and at least one) of all lie; how many lie before it."""
    histogram = torch.zeros(1 << 16, dtype=torch.int64, device="cpu")
    for v in values:
        histogram += torch.bincount(v.long().cpu(), minlength=1 << 16)
    reached = histogram.cumsum(0)
    found = min(int(torch.searchsorted(reached.double(), max(wanted, 1.0))), int(histogram.nonzero()[-1]))
    return found, int(reached[found] - histogram[found])
