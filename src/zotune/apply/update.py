"""Updates: x ← (1 - ηλ) x - a η h(ĝ), for a slice, a tensor or all tensors, in place or into other memory.

The same computation applies a step and evaluates it beforehand (`Updated`): a slice comes out with the same bits
either way, rounding included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zotune.apply import fused
from zotune.apply.curvature import OfNoise, sums_of_noise
from zotune.apply.subspace import InSubspace, add_step, thin_step
from zotune.apply.tensor_update import HALF, AnyTransform, Rounding, TensorUpdate
from zotune.apply.transforms import State
from zotune.directions.direction import Terms, add_terms, moving, one_pass
from zotune.estimate.perturb import move_rows_one_by_one
from zotune.model.parameters import TunedTensor
from zotune.model.shards import local
from zotune.noise import compute_dtype, foreach_axpy_, round_to
from zotune.system import limits


def updated_slice(
    update: TensorUpdate, out: Tensor, x: Tensor, start: int, scale: float, state: State | None = None
) -> State:
    """Write the updated x into `out`: flat slices from element `start` on. `scale` is a; returns the slice's state.

    `state` is that before the update; by default the update's own, where it holds the whole tensor's.
    """
    if update.is_sum:
        add_terms(out, x, update.scaled_terms(scale), update.tensor.id, start, update.rounding_seed)
        return {}
    if update.is_whole:
        return _whole_step(update, out, x, update.state, start, scale)
    return _step(update, out, x, update.state_slice(start, x.numel()) if state is None else state, start, scale)


def update_slice_(update: TensorUpdate, x: Tensor, state: State, start: int, scale: float) -> State:
    """Update a flat slice in place, given the state of its elements; returns the slice's new state.

    A transform of whole matrices has no slices of its state: where it advances, the slice must be all of the tensor.
    The given state may be overwritten. With a = 0 the slice stays as it is and the state advances.
    """
    if update.is_sum:
        if scale:
            add_terms(x, x, update.scaled_terms(scale), update.tensor.id, start, update.rounding_seed)
        return {}
    if update.is_whole:
        return _whole_step(update, x, x, state, start, scale)
    if (after := fused.fused_update_(update, x, state, start, scale)) is not None:
        return after
    return _step(update, x if scale else torch.empty_like(x), x, state, start, scale)


def _whole_step(update: TensorUpdate, out: Tensor, x: Tensor, state: State, start: int, scale: float) -> State:
    assert isinstance(update.transform, InSubspace)
    for terms in update.history or ():
        _, state = thin_step(update.transform, terms, update.tensor, state, x.device)
    step, after = thin_step(update.transform, update.terms, update.tensor, state, x.device)
    if scale or out is not x:
        keep = 1 - update.lr * update.weight_decay
        place = update.tensor.id, start, update.rounding_seed
        add_step(out, x, step, -scale * update.lr, keep, *place)
    return after


def _step(update: TensorUpdate, out: Tensor, x: Tensor, state: State, start: int, scale: float) -> State:
    transform = update.transform
    assert not isinstance(transform, InSubspace)
    if isinstance(transform, OfNoise):
        step, after = transform.rule(*sums_of_noise(update.terms, update.scalars, update.tensor.id, start, x), state)
    else:
        before = state if update.history is None else _state_from_history(update, start, x)
        step, after = transform(_gradient(update, update.terms, start, x), before)
    y = x.to(compute_dtype(x.dtype)) * (1 - update.lr * update.weight_decay) - scale * update.lr * step
    round_to(out, y, update.rounding_seed, update.tensor.id, start)
    return after


def _gradient(update: TensorUpdate, terms: Terms, start: int, like: Tensor) -> Tensor:
    """ĝ for the elements of a slice."""
    total = torch.zeros(like.numel(), dtype=compute_dtype(like.dtype), device=like.device)
    add_terms(total, total, terms, update.tensor.id, start)
    return total


def _state_from_history(update: TensorUpdate, start: int, like: Tensor) -> State:
    """The state of a slice, computed again from the terms of earlier steps."""
    assert not isinstance(update.transform, InSubspace | OfNoise)
    state: State = {}
    for terms in update.history or ():
        _, state = update.transform(_gradient(update, terms, start, like), state)
    return state


def update_tensor_(update: TensorUpdate, scale: float) -> State:
    """Update a tensor's weights; returns its new state. With a = 0 the weights stay and the state advances."""
    if update.is_sum and not scale:
        return update.state
    x = update.flat_weights()
    after: State = {}
    size = max(1, x.numel()) if update.is_sum or update.is_whole else limits.UPDATE_ELEMENTS
    for span in update.tensor.spans(0, x.numel(), size):
        own, before = x[span.local], update.state_slice(span.local.start, span.local.stop - span.local.start)
        part = span.widened(own)
        state = before if update.is_whole else _each_tensor(before, span.widened)
        new = update_slice_(update, part, state, span.start, scale)
        if scale and part is not own:
            own.copy_(span.narrowed(part))
        if update.is_whole:  # which is that of the whole tensor after every span
            after = new if update.history is None else {}
            continue
        for key, value in _each_tensor(new, span.narrowed).items() if update.history is None else ():
            if isinstance(value, Tensor):
                kept = after.setdefault(key, _state_tensor(update, key, value))
                if (target := local(kept).view(-1)[span.local]).data_ptr() != value.data_ptr():
                    target.copy_(value)
            else:
                after[key] = value
    if scale:
        update.store(x)
    return after


def _state_tensor(update: TensorUpdate, key: str, like: Tensor) -> Tensor:
    """The tensor that holds one entry of the whole state: the present one, or a new one."""
    if key in update.state:
        return update.state[key]  # type: ignore[no-any-return]
    weights = update.tensor.storage()
    return update.tensor.distributed(torch.empty(weights.shape, dtype=like.dtype, device=like.device))


def _each_tensor(state: State, function: Callable[[Tensor], Tensor]) -> State:
    return {key: function(value) if isinstance(value, Tensor) else value for key, value in state.items()}


def update_tensors_(updates: Iterable[TensorUpdate], scale: float) -> list[tuple[TensorUpdate, State]]:
    """`update_tensor_` for many tensors; those that are moved by the same terms share one call of the kernels."""
    together: dict[Any, list[tuple[TensorUpdate, Tensor]]] = {}
    states = []
    for update in updates:
        # A tensor that has to be copied is written alone: one copy at a time. So is a shard, by its elements' places.
        alone = not (update.is_sum and scale and update.is_flat and update.tensor.shard is None)
        shared = None if alone else one_pass(update.scaled_terms(scale), update.tensor.id)
        if shared is None:
            states.append((update, update_tensor_(update, scale)))
        else:
            x = update.flat_weights()
            together.setdefault((x.device, x.dtype, *shared, update.rounding_seed), []).append((update, x))
    for (_, _, stream, seeds, scales, rounding_seed), members in together.items():
        ids = [update.tensor.id for update, _ in members]
        foreach_axpy_([x for _, x in members], ids, stream, seeds, scales, rounding_seed)
        for update, x in members:
            update.store(x)
    return states


@dataclass(frozen=True)
class Step:
    """A step as it is independently of the weights; it gives each tensor's update.

    Attributes:
        terms: (cᵢ, uᵢ) of ĝ over all tensors, with coefficients as they are applied.
        rates: (η, λ) of each parameter group.
        rounding_seed: names the stochastic rounding, where `rounding` is that.
        history: as in `TensorUpdate`, over all tensors.
        scalars: those of the estimate, if it has one for each term.
    """

    terms: Terms
    transform: AnyTransform
    rates: Sequence[tuple[float, float]]
    rounding: Rounding
    rounding_seed: int
    history: Sequence[Terms] | None
    scalars: Sequence[float] = ()

    def moves(self, tensor: TunedTensor) -> bool:
        """Whether the step changes a tensor."""
        return any(u.moves(tensor.id) for _, u in self.terms)

    def on(self, tensor: TunedTensor, group: int, state: State) -> TensorUpdate:
        """The update of a tensor of parameter group number `group`, with the rules for its dtype and shape.

        `state` is the transform's state, with the tensor's `master` weights if it has any. The tensor's numbers are not
        read.
        """
        p = tensor.parameter
        lr, weight_decay = self.rates[group]
        terms, transform = moving(self.terms, tensor.id), self.transform
        is_stochastic = p.dtype in HALF and self.rounding == Rounding.STOCHASTIC
        return TensorUpdate(
            tensor,
            terms,
            transform.of(terms, tensor) if isinstance(transform, InSubspace) else transform,
            {k: v for k, v in state.items() if k != "master"},
            lr,
            weight_decay if p.dim() > 1 else 0.0,
            self.rounding_seed if is_stochastic else None,
            None if self.history is None else [own for t in self.history if (own := moving(t, tensor.id))],
            state.get("master"),
            [s for s, (_, u) in zip(self.scalars, self.terms, strict=False) if u.moves(tensor.id)],
        )


def with_master(tensor: TunedTensor, rounding: Rounding, state: State) -> State:
    """Add float32 master weights to a tensor's state where `rounding` needs them and they are missing; returns the
    state.
    """
    weights = tensor.storage()
    if weights.dtype in HALF and rounding == Rounding.MASTER and "master" not in state:
        state["master"] = tensor.distributed(weights.float().contiguous())
    return state


@torch.no_grad()
def read_changed_(master: Tensor, weights: Tensor) -> None:
    """Read weights that were changed by others, for instance loaded, into their master; the others keep their own."""
    master.copy_(torch.where(master.to(weights.dtype) == weights, master, weights.float()))


@dataclass(frozen=True)
class Updated:
    """The weights after a step that has not been taken, as a `WeightOffset` for `perturbed_by`."""

    updates: dict[int, TensorUpdate]
    scale: float
    _whole: dict[int, TensorUpdate] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def tensors(self) -> frozenset[int]:
        """As `WeightOffset.tensors`."""
        return frozenset(self.updates)

    def move(self, out: Tensor, x: Tensor, tensor: TunedTensor, start: int) -> None:
        """As `WeightOffset.move`."""
        update = self._update_of(tensor)
        master = None if update.master is None else local(update.master).view(-1)[start : start + x.numel()]
        for span in tensor.spans(start, x.numel(), max(1, x.numel())):
            own, target = span.widened((x if master is None else master)[span.local]), out[span.local]
            is_direct = span.runs is None and master is None
            moved = target if is_direct else torch.empty_like(own)
            before = update.state_slice(start + span.local.start, span.local.stop - span.local.start)
            state = before if update.is_whole else _each_tensor(before, span.widened)
            updated_slice(update, moved, own, span.start, self.scale, state)
            if not is_direct:
                target.copy_(span.narrowed(moved))

    def _update_of(self, tensor: TunedTensor) -> TensorUpdate:
        """The update of what is read: of a tensor that is read whole, with the state of the whole."""
        update = self.updates[tensor.id]
        if tensor.shard is update.tensor.shard:
            return update
        if tensor.id not in self._whole:
            self._whole.clear()  # a tensor's state at a time
            self._whole[tensor.id] = update.of_whole()
        return self._whole[tensor.id]

    def move_rows(self, rows: Tensor, indices: Tensor, tensor: TunedTensor) -> None:
        """As `WeightOffset.move_rows`."""
        move_rows_one_by_one(self, rows, indices, tensor)

    def factors(self, tensor: TunedTensor, device: torch.device) -> None:
        """As `WeightOffset.factors`: none, for an update is a sum of many matrices."""
