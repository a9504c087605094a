"""One tensor's update, x ← (1 - ηλ) x - a η h(ĝ), for any slice of it and without writing x unless told to.

The same computation serves to apply a step and to look at it beforehand: a slice comes out with the
same bits either way, rounding included.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from zotune.apply import fused
from zotune.apply.transforms import State, Transform, identity
from zotune.directions.direction import Terms, add_terms, moving, one_pass
from zotune.estimate.perturb import move_rows_one_by_one
from zotune.model.parameters import TunedTensor
from zotune.noise import add_many, compute_dtype, round_to

# Elements at a time where ĝ or its transform is made: the temporaries stay at some megabytes.
_CHUNK = 1 << 18
_HALF = (torch.bfloat16, torch.float16)


class Rounding(StrEnum):
    """How an update is written into bfloat16 or float16 weights. It concerns no other dtype.

    `STOCHASTIC` rounds up or down at random so that the mean is exact and nothing is stored; `MASTER`
    keeps a float32 copy (4 bytes a number); `NEAREST` loses every update below half a rounding unit.
    """

    STOCHASTIC = "stochastic"
    MASTER = "master"
    NEAREST = "nearest"


@dataclass(frozen=True)
class TensorUpdate:
    """What a step does to one tensor.

    Attributes:
        terms: (cᵢ, uᵢ) of ĝ.
        history: the terms of earlier steps, oldest first, from which the transform's state is made again;
            None if it is kept in `state`.
        state: the transform's state; tensors of the tensor's shape, and plain numbers.
        lr, weight_decay: η, λ.
        rounding_seed: names the stochastic rounding of half-precision weights; None for rounding to nearest.
        master: float32 weights that take the update in place of the half-precision ones.
    """

    tensor: TunedTensor
    terms: Terms
    transform: Transform
    state: State
    lr: float
    weight_decay: float
    rounding_seed: int | None
    history: Sequence[Terms] | None = None
    master: Tensor | None = None

    @property
    def is_sum(self) -> bool:
        """Whether the terms are all that is added to the weights, so that no ĝ need be in memory."""
        return self.transform is identity and not self.weight_decay

    def moves(self, scale: float) -> Terms:
        """The terms as they are added where `is_sum`."""
        return [(-scale * self.lr * c, u) for c, u in self.terms]

    def move(self, out: Tensor, x: Tensor, start: int, scale: float) -> State:
        """Write the updated x into `out`, flat slices from element `start` on; the slice's new state. `scale` is a."""
        if self.is_sum:
            add_terms(out, x, self.moves(scale), self.tensor.id, start, self.rounding_seed)
            return {}
        return self._step(out, x, self._state(start, x), start, scale)

    def take(self, x: Tensor, state: State, start: int, scale: float) -> State:
        """Update a flat slice in place, given the state of just its elements; the slice's new state.

        What is given as the state may be written too. With a = 0 the slice stays, and the state advances.
        """
        if self.is_sum:
            if scale:
                add_terms(x, x, self.moves(scale), self.tensor.id, start, self.rounding_seed)
            return {}
        if (after := fused.take(self, x, state, start, scale)) is not None:
            return after
        return self._step(x if scale else torch.empty_like(x), x, state, start, scale)

    def _step(self, out: Tensor, x: Tensor, state: State, start: int, scale: float) -> State:
        before = state if self.history is None else self._rebuilt(start, x)
        step, after = self.transform(self._gradient(self.terms, start, x), before)
        y = x.to(compute_dtype(x.dtype)) * (1 - self.lr * self.weight_decay) - scale * self.lr * step
        round_to(out, y, self.rounding_seed, self.tensor.id, start)
        return after

    def write(self, scale: float) -> State:
        """Update the weights; the tensor's new state. With a = 0 the weights stay, and the state advances."""
        if self.is_sum and not scale:
            return self.state
        x = self.read()
        after: State = {}
        size = max(1, x.numel()) if self.is_sum else _CHUNK
        for lo in range(0, x.numel(), size):
            part = x[lo : lo + size]
            new = self.take(part, self._state(lo, part), lo, scale)
            for key, value in new.items() if self.history is None else ():
                if isinstance(value, Tensor):
                    whole = after.setdefault(key, self._room(key, value)).view(-1)[lo : lo + size]
                    if whole.data_ptr() != value.data_ptr():
                        whole.copy_(value)
                else:
                    after[key] = value
        if scale:
            self.keep(x)
        return after

    @property
    def is_flat(self) -> bool:
        """Whether what takes the update lies in memory in the order of its elements."""
        return self.master is not None or self.tensor.storage().is_contiguous()

    def read(self) -> Tensor:
        """What takes the update, flat: the weights themselves if that can be, or else their master or a copy."""
        return (self.tensor.storage().contiguous() if self.master is None else self.master).view(-1)

    def keep(self, x: Tensor) -> None:
        """Put what `read` gave, updated, into the weights, if it is not they."""
        weights = self.tensor.storage()
        if x.data_ptr() != weights.data_ptr():
            weights.copy_(x.view(weights.shape))

    def _room(self, key: str, like: Tensor) -> Tensor:
        if key in self.state:
            return self.state[key]  # type: ignore[no-any-return]
        return torch.empty(self.tensor.parameter.shape, dtype=like.dtype, device=like.device)

    def _gradient(self, terms: Terms, start: int, like: Tensor) -> Tensor:
        total = torch.zeros(like.numel(), dtype=compute_dtype(like.dtype), device=like.device)
        add_terms(total, total, terms, self.tensor.id, start)
        return total

    def _state(self, start: int, like: Tensor) -> State:
        """The state of a slice, as it is kept."""
        part = slice(start, start + like.numel())
        return {k: v.view(-1)[part] if isinstance(v, Tensor) else v for k, v in self.state.items()}

    def _rebuilt(self, start: int, like: Tensor) -> State:
        """The state of a slice, made again from the terms of earlier steps."""
        state: State = {}
        for terms in self.history or ():
            _, state = self.transform(self._gradient(terms, start, like), state)
        return state


def write_all(updates: Iterable[TensorUpdate], scale: float) -> list[tuple[TensorUpdate, State]]:
    """`TensorUpdate.write` for many tensors; those that are moved by the same terms are moved together."""
    together: dict[Any, list[tuple[TensorUpdate, Tensor]]] = {}
    states = []
    for update in updates:
        # A tensor that has to be copied is written alone: one copy at a time.
        alone = not (update.is_sum and scale and update.is_flat)
        shared = None if alone else one_pass(update.moves(scale), update.tensor.id)
        if shared is None:
            states.append((update, update.write(scale)))
        else:
            x = update.read()
            together.setdefault((x.device, x.dtype, *shared, update.rounding_seed), []).append((update, x))
    for (_, _, stream, seeds, scales, rounding_seed), members in together.items():
        ids = [update.tensor.id for update, _ in members]
        add_many([x for _, x in members], ids, stream, seeds, scales, rounding_seed)
        for update, x in members:
            update.keep(x)
    return states


@dataclass(frozen=True)
class Step:
    """What a step does, whatever the weights: from it each tensor's update is made.

    Attributes:
        terms: (cᵢ, uᵢ) of ĝ over all tensors, with coefficients as they are applied.
        rates: (η, λ) of each parameter group.
        rounding_seed: names the stochastic rounding, where `rounding` is that.
        history: as in `TensorUpdate`, over all tensors.
    """

    terms: Terms
    transform: Transform
    rates: Sequence[tuple[float, float]]
    rounding: Rounding
    rounding_seed: int
    history: Sequence[Terms] | None

    def moves(self, tensor: TunedTensor) -> bool:
        """Whether the step concerns a tensor."""
        return any(u.moves(tensor.id) for _, u in self.terms)

    def on(self, tensor: TunedTensor, group: int, state: State) -> TensorUpdate:
        """The update of a tensor in parameter group number `group`, as its dtype and shape have it.

        `state` is the transform's, with the tensor's `master`, where there is one. Of the tensor no number is read.
        """
        p = tensor.parameter
        lr, weight_decay = self.rates[group]
        is_stochastic = p.dtype in _HALF and self.rounding == Rounding.STOCHASTIC
        return TensorUpdate(
            tensor,
            moving(self.terms, tensor.id),
            self.transform,
            {k: v for k, v in state.items() if k != "master"},
            lr,
            weight_decay if p.dim() > 1 else 0.0,
            self.rounding_seed if is_stochastic else None,
            None if self.history is None else [own for t in self.history if (own := moving(t, tensor.id))],
            state.get("master"),
        )


def keep_master(tensor: TunedTensor, rounding: Rounding, state: State) -> State:
    """A tensor's state, with its master weights where `rounding` wants them and they are not there yet."""
    weights = tensor.storage()
    if weights.dtype in _HALF and rounding == Rounding.MASTER and "master" not in state:
        state["master"] = weights.float().contiguous()
    return state


@dataclass(frozen=True)
class Updated:
    """The model after a step that has not been taken: a displacement for `zotune.estimate.perturb.displaced`."""

    updates: dict[int, TensorUpdate]
    scale: float

    @property
    def tensors(self) -> frozenset[int]:
        """As `Displacement.tensors`."""
        return frozenset(self.updates)

    def move(self, out: Tensor, x: Tensor, tensor: TunedTensor, start: int) -> None:
        """As `Displacement.move`."""
        update = self.updates[tensor.id]
        if update.master is None:
            update.move(out, x, start, self.scale)
            return
        master = update.master.view(-1)[start : start + x.numel()]
        moved = torch.empty_like(master)
        update.move(moved, master, start, self.scale)
        out.copy_(moved)

    def move_rows(self, rows: Tensor, indices: Tensor, tensor: TunedTensor) -> None:
        """As `Displacement.move_rows`."""
        move_rows_one_by_one(self, rows, indices, tensor)

    def factors(self, tensor: TunedTensor, device: torch.device) -> None:
        """As `Displacement.factors`: the update that is written is known as a sum of matrices, not by its factors."""
