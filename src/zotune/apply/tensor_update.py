"""The record of one tensor's update: x ← (1 - ηλ) x - a η h(ĝ), with everything it depends on.

`zotune.apply.update` carries it out with torch operations, `zotune.apply.fused` in one pass of a kernel; both take
this record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from zotune.apply.curvature import OfNoise
from zotune.apply.subspace import InSubspace
from zotune.apply.transforms import State, Transform, identity
from zotune.directions.direction import Terms
from zotune.model.parameters import TunedTensor
from zotune.model.shards import local, whole

AnyTransform = Transform | InSubspace | OfNoise
HALF = (torch.bfloat16, torch.float16)


class Rounding(StrEnum):
    """How `zotune.noise.round_to` writes an update into bfloat16 or float16 weights. It concerns no other dtype.

    `STOCHASTIC` rounds up or down at random so that the mean is exact, and stores nothing; `MASTER` keeps a float32
    copy (4 bytes a number); `NEAREST` loses every update below half a rounding unit.
    """

    STOCHASTIC = "stochastic"
    MASTER = "master"
    NEAREST = "nearest"


def placed_state(transform: AnyTransform, tensor: TunedTensor, key: str, value: Tensor) -> Tensor:
    """An entry of a tensor's saved state where the tensor lies; in shards, the part for this process.

    Coordinates in a subspace may have the shape of the weights, and are no numbers of their elements.
    """
    is_of_subspace = isinstance(transform, InSubspace) and tensor.parameter.dim() > 1 and key != "master"
    return tensor.placed_whole(value) if is_of_subspace else tensor.placed(value)


@dataclass(frozen=True)
class TensorUpdate:
    """The update of one tensor by one step.

    Attributes:
        tensor: the tensor x.
        terms: (cᵢ, uᵢ) of ĝ.
        transform: h.
        state: the transform's state: tensors of the tensor's shape, where it lies, or of the subspace's, and plain
            numbers.
        lr, weight_decay: η, λ.
        rounding_seed: seed of the stochastic rounding of half-precision weights; None for rounding to nearest.
        history: the terms of earlier steps, oldest first, from which the transform's state is computed again;
            None if the state is kept in `state`.
        master: float32 weights that take the update in place of the half-precision ones.
        scalars: of an estimate that has one for each term, as an `OfNoise` needs them.
    """

    tensor: TunedTensor
    terms: Terms
    transform: AnyTransform
    state: State
    lr: float
    weight_decay: float
    rounding_seed: int | None
    history: Sequence[Terms] | None = None
    master: Tensor | None = None
    scalars: Sequence[float] = ()

    @property
    def is_sum(self) -> bool:
        """Whether the step only adds the terms to the weights, so that ĝ need not be in memory."""
        return self.transform is identity and not self.weight_decay

    @property
    def is_whole(self) -> bool:
        """Whether the transform is one of the whole tensor, so that its state has no slices."""
        return isinstance(self.transform, InSubspace)

    def scaled_terms(self, scale: float) -> Terms:
        """The terms with the coefficients that are added to the weights where `is_sum`: -a η cᵢ."""
        return [(-scale * self.lr * c, u) for c, u in self.terms]

    @property
    def is_flat(self) -> bool:
        """Whether the memory that takes the update holds the elements in order."""
        return self.master is not None or self.tensor.storage().is_contiguous()

    def flat_weights(self) -> Tensor:
        """The weights to update, flat: their master copy, or their own memory where it is in order, or else a copy."""
        return (self.tensor.storage().contiguous() if self.master is None else local(self.master)).view(-1)

    def store(self, x: Tensor) -> None:
        """Copy the updated `flat_weights` into the weights, unless they already share their memory.

        Autograd is told: a graph that was made of the weights before them is stale, and refuses to go backward.
        """
        weights = self.tensor.storage()
        if x.data_ptr() != weights.data_ptr():
            weights.copy_(x.view(weights.shape))
        if not self.tensor.parameter.is_inference():
            torch.autograd.graph.increment_version(local(self.tensor.parameter))

    def state_slice(self, start: int, size: int) -> State:
        """The kept state of elements start … start + size - 1 of those in this process; all of it where `is_whole`."""
        part = slice(start, start + size)
        if self.is_whole:
            return self.state
        return {k: local(v).view(-1)[part] if isinstance(v, Tensor) else v for k, v in self.state.items()}

    def of_whole(self) -> TensorUpdate:
        """The update with the state of the whole tensor, gathered: every process of a shard has to call this."""
        if self.tensor.shard is None:
            return self
        state = {k: whole(v) for k, v in self.state.items()}
        return replace(self, tensor=replace(self.tensor, shard=None), state=state, master=whole(self.master))
