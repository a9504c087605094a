"""The part of a zeroth-order step that needs no data: from a step's record to its directions and new weights.

A step's directions follow from the seed and the step's number, and its update from the coefficients along them. So
whoever has a record takes the same step, to the bit: the optimizer that measured the coefficients, and a replay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from zotune.apply.line_search import LineSearch
from zotune.apply.tensor_update import AnyTransform, Rounding, TensorUpdate, placed_state
from zotune.apply.transforms import Coefficient, clipped, unchanged
from zotune.apply.update import Step, update_tensors_
from zotune.apply.window import CoefficientWindow
from zotune.directions.block_choice import ActiveBlocks
from zotune.directions.blocks import Block, BlockOrder
from zotune.directions.direction import Direction, Terms
from zotune.directions.schedule import AnySampler, SamplerState, Weights
from zotune.errors import UsageError
from zotune.estimate.activation_cache import ActivationCache, NoActivationCache
from zotune.estimate.estimate import GradientEstimate
from zotune.estimate.estimators import EstimatorState, has_fixed_records
from zotune.estimate.finite_difference import Estimator
from zotune.estimate.probes import refused
from zotune.model.parameters import ParameterSet
from zotune.noise import derive_seed
from zotune.optim.base import CountingOptimizer
from zotune.optim.checks import check_state
from zotune.optim.deferred import NoDeferredUpdates
from zotune.optim.record import StepRecord, described, kind_of
from zotune.system.uninterrupted import uninterrupted

_DIRECTION, _ROUNDING = 0, 1


class RecordedSteps(CountingOptimizer):
    """Steps that follow from their records; `ZerothOrder` adds the measurements that records are made of.

    Attributes:
        tuned: the tuned tensors.
        sampler, num_queries, blocks, block_order, seed: the directions of each step, see `ZerothOrder`.
        block_choice: which of the blocks a step estimates.
        estimator: how the coefficients were measured; the next step's directions and rates may depend on it.
        transform, coefficient, max_coefficient, rounding, line_search: the update, see `ZerothOrder`.
    """

    tuned: ParameterSet
    sampler: AnySampler
    num_queries: int
    blocks: tuple[Block | None, ...]
    block_order: BlockOrder
    block_choice: ActiveBlocks
    seed: int
    estimator: Estimator
    transform: AnyTransform
    coefficient: Coefficient
    max_coefficient: float | None
    rounding: Rounding
    line_search: LineSearch
    _sampling: SamplerState
    _estimation: EstimatorState
    _window: CoefficientWindow | None
    _prefix: ActivationCache | NoActivationCache
    _deferred: NoDeferredUpdates

    def directions(self, blocks: Sequence[Block | None] | None = None, count: int | None = None) -> list[Direction]:
        """The directions of the coming step: a function of the seed and the number of steps taken (and of weights,
        where a sparse sampler masks by magnitude). There are `count` of each block, by default `num_queries`.
        """
        sampler = self._sampling.at(self.seed, self.num_steps)
        queries = [
            Direction(derive_seed(self.seed, self.num_steps, query, _DIRECTION), sampler)
            for query in range(self.num_queries if count is None else count)
        ]
        return [u.within(block) for block in blocks or self.active_blocks for u in queries]

    @property
    def active_blocks(self) -> tuple[Block | None, ...]:
        """The blocks that the coming step estimates: all, or the one that was chosen."""
        return self.block_choice.at(self.seed, self.num_steps)

    @property
    def _rounds(self) -> list[tuple[Block | None, ...]]:
        return self.block_order.rounds(self.active_blocks)

    def replay_step(self, record: StepRecord) -> None:
        """Take the step of a record again: the same bits, without data or a forward pass.

        The optimizer must be as that which took it: made alike, over the same weights, after the same steps.

        Raises:
            UsageError: it is not the next step.
        """
        self._replay(record, self._write)

    def plan_step(self, record: StepRecord) -> list[tuple[Step, float]]:
        """The step of a record and its factor a; several pairs where blocks are updated in sequence.

        It counts as taken, but no weight is read or written: that is the caller's, see `zotune.ledger.stream`.

        Raises:
            UsageError: it is not the next step.
        """
        steps: list[tuple[Step, float]] = []
        self._replay(record, lambda estimate, scale: steps.append((self._step_along(estimate), scale)))
        return steps

    def _replay(self, record: StepRecord, write: Callable[[GradientEstimate, float], None]) -> None:
        if record.step != self.num_steps:
            raise UsageError(f"the record is of step {record.step}, but {self.num_steps} steps have been taken.")
        rates = [group["lr"] for group in self.param_groups]
        self._estimation.replay(self.estimator, len(record.coefficients), sum(map(len, self._rounds)))
        coefficients, scalars = iter(record.coefficients), iter(record.scalars)
        num_scalars = len(record.scalars) // len(self._rounds)
        try:
            for group, rate in zip(self.param_groups, record.learning_rates, strict=True):
                group["lr"] = rate
            with self.whole_step(), uninterrupted():
                self._taken = []
                for blocks, scale in zip(self._rounds, record.scales, strict=True):
                    directions = self.directions(blocks, self._estimation.num_directions)
                    terms = tuple((c, u) for u, c in zip(directions, coefficients, strict=False))
                    own = tuple(islice(scalars, num_scalars))
                    self._take(GradientEstimate(record.loss, terms, 0, scalars=own), scale, write)
                self.num_forwards += record.num_forwards
                self._count()
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate

    def set_noise_version(self, version: int) -> None:
        """Before the first step: make the noise of a version of its specification, as a run that is continued does."""
        if version != self.tuned.noise_version:
            self.tuned.set_noise_version(version)
            self._sampling = SamplerState(self.tuned, self.sampler)

    def begin_masks(self, weights: Weights) -> None:
        """Before the first step: derive the masks of sparse directions from the tensors that `weights` returns.

        For replays over a model that does not hold its numbers; otherwise the first step does it.
        """
        self._sampling.begin(self.seed, weights)

    @property
    def has_fixed_records(self) -> bool:
        """Whether all steps have `num_queries` coefficients a block and no scalars, so that records are of one size."""
        return has_fixed_records(self.estimator)

    @property
    def window(self) -> int | None:
        """The number of steps whose coefficients the transform's state is rebuilt from; None where it is kept."""
        return None if self._window is None else self._window.maxlen + 1

    def _take(self, estimate: GradientEstimate, scale: float, write: Callable[[GradientEstimate, float], None]) -> None:
        """Apply an estimate times `scale`; with NaN neither weights nor state change."""
        if not math.isnan(scale):
            write(estimate, scale)
            if self._window is not None:
                self._window.add(self._terms(estimate))
            self._estimation.learn(self.estimator, estimate)
            self.block_choice.observe(estimate.terms)
        self._taken.append((estimate, scale))

    def updates(self, estimate: GradientEstimate) -> dict[int, TensorUpdate]:
        """The update of each tensor that the estimate moves, by tensor id."""
        return self._deferred.updates(self._step_along(estimate), self.state)

    def _step_along(self, estimate: GradientEstimate) -> Step:
        """The step along the estimate, independent of the weights."""
        return Step(
            self._terms(estimate),
            self.transform,
            tuple(zip(self.applied_rates(), (float(g["weight_decay"]) for g in self.param_groups), strict=True)),
            self.rounding,
            derive_seed(self.seed, self.num_steps, 0, _ROUNDING),
            None if self._window is None else self._window.steps,
            estimate.scalars,
        )

    def _terms(self, estimate: GradientEstimate) -> Terms:
        """The estimate's terms after `coefficient`, the limit and the weight of the chosen block were applied to each
        measured c.
        """
        weight = self.block_choice.weight(self.seed, self.num_steps)
        if self.max_coefficient is None and self.coefficient is unchanged and weight == 1:
            return estimate.terms
        limit = unchanged if self.max_coefficient is None else partial(clipped, limit=self.max_coefficient)
        q = self._estimation.num_directions
        return [(self.coefficient(limit(c * q)) / q * weight, u) for c, u in estimate.terms]

    @torch.no_grad()
    def _write(self, estimate: GradientEstimate, scale: float) -> None:
        """Update the weights by `scale` times the step; the transform's state advances once, whatever the scale."""
        with uninterrupted():
            step = self._step_along(estimate)
            updates = self._deferred.updates(step, self.state, waiting=False)
            tensors = [update.tensor for update in updates.values()]
            self._undo.keep([t.storage() for t in tensors] if scale else [], [t.parameter for t in tensors])
            for update, state in update_tensors_(updates.values(), scale):
                self.state[update.tensor.parameter].update(state)
            self._deferred.note_written(tensors)
            self._deferred.add(step, scale, self._undo, in_sequence=len(self._rounds) > 1)
            self._prefix.moved(frozenset(t.id for t in self.tuned if step.moves(t)))
            self.tuned.reshard()
            # An enclosing torch.autocast remembers casts of the weights, which are now those before the update.
            torch.clear_autocast_cache()
            self._undo.is_writing = False

    def _count(self) -> float:
        if self._window is not None:
            self._window.close()
        return super()._count()

    def settings(self) -> dict[str, Any]:
        """As `CountingOptimizer.settings`; learning rates are in the records, and what the estimator is does not
        matter to them.
        """
        own = ("seed", "sampler", "num_queries", "blocks", "block_order", "max_coefficient", "window", "rounding")
        functions = ("transform", "coefficient", "line_search")
        return {
            **{name: getattr(self, name) for name in own},
            **{name: described(getattr(self, name)) for name in functions},
            "weight_decay": [float(group["weight_decay"]) for group in self.param_groups],
            "param_groups": [[self._name_of(p) for p in group["params"]] for group in self.param_groups],
        }

    def _name_of(self, parameter: Any) -> str:
        tensor = self.tuned.find(parameter)
        return f"{tuple(parameter.shape)}, not tuned" if tensor is None else tensor.name

    def applied_rates(self) -> tuple[float, ...]:
        """As `CountingOptimizer.applied_rates`, times a factor that follows what the estimator has learned."""
        return tuple(self.recorded(float(group["lr"]) * self._estimation.rate) for group in self.param_groups)

    def _names_of_a_step(self) -> tuple[str, ...]:
        return (*super()._names_of_a_step(), "_sampling", "_window", "block_choice", "_estimation")

    def placed(self, value: Tensor, parameter: Tensor, key: str) -> Tensor:
        """As `CountingOptimizer.placed`, also of weights that are offloaded or in shards."""
        tensor = self.tuned.find(parameter)
        return value if tensor is None else placed_state(self.transform, tensor, key, value)

    def state_dict(self) -> dict[str, Any]:
        """Torch's state, and under "zeroth_order" the seed, counters, masks and window that the next step needs."""
        with self._deferred.states_in(self.state):
            state = super().state_dict()
        own: dict[str, Any] = {"seed": self.seed, "noise_version": self.tuned.noise_version}
        own |= {"sampler": self._sampling.state(), "history": self._window and self._window.state()}
        own |= {"one_by_one": sorted(refused(self.tuned)), "transform": kind_of(self.transform)}
        learned = {"learned": self._estimation.learned, "block_choice": self.block_choice.state()}
        state["zeroth_order"] |= own | {name: value for name, value in learned.items() if value is not None}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken; float32 state stays float32.

        Raises:
            UsageError: it is of an optimizer with another kind of state; nothing was changed.
        """
        check_state(state_dict, kind_of(self.transform), self._window is not None, self.block_choice.state())
        super().load_state_dict(state_dict)
        self._deferred.take_states(self.state)
        own = state_dict["zeroth_order"]
        self.seed = own["seed"]
        self.set_noise_version(own.get("noise_version", 1))
        self._sampling.load(self.seed, own["sampler"])
        self.block_choice.load(own.get("block_choice"))
        refused(self.tuned).update(own.get("one_by_one", ()))
        self._estimation.learned = own.get("learned")
        if self._window is not None:
            self._window.load(own["history"] or [], partial(self._sampling.of, self.seed), self.blocks)
