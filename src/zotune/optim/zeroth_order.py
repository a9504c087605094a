"""The zeroth-order optimizer: direction → estimate → transform → apply, equation (2) of the paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from zotune.apply.line_search import LineSearch, fixed
from zotune.apply.tensor_update import AnyTransform, Rounding, TensorUpdate, placed_state
from zotune.apply.transforms import Coefficient, clipped, identity, unchanged
from zotune.apply.update import Step, update_tensors_
from zotune.apply.window import CoefficientWindow
from zotune.directions.block_choice import OneBlock, active_blocks
from zotune.directions.blocks import Block
from zotune.directions.blocks import BlockOrder as BlockOrder
from zotune.directions.direction import Direction, Terms
from zotune.directions.samplers import rademacher
from zotune.directions.schedule import AnySampler, SamplerState, Weights
from zotune.errors import UsageError
from zotune.estimate.activation_cache import ActivationCache, NoActivationCache
from zotune.estimate.estimate import GradientEstimate
from zotune.estimate.estimators import EstimatorState, has_fixed_records
from zotune.estimate.finite_difference import Estimator, central_difference
from zotune.estimate.objective import Closure
from zotune.estimate.per_example.difference import with_directions_per_batch
from zotune.estimate.probes import refused
from zotune.model.parameters import ParameterSet
from zotune.noise import derive_seed
from zotune.optim.base import CountingOptimizer
from zotune.optim.checks import as_groups, check_closure, check_group, check_own, check_sampler, check_values
from zotune.optim.deferred import deferred_updates
from zotune.optim.record import StepRecord, described
from zotune.optim.step_line import StepLine
from zotune.system.uninterrupted import uninterrupted

_DIRECTION, _ROUNDING = 0, 1


class ZerothOrder(CountingOptimizer):
    """A torch optimizer that needs forward passes only. Its closure returns the loss and never calls backward.

    Args:
        model: any `nn.Module`; its parameters that require a gradient are tuned.
        lr: learning rate η ≥ 0.
        estimator: how ĝ is made from the objective and the directions; default: `central_difference`, μ = 1e-3.
        transform: h; a function of some elements of ĝ and their state, see `zotune.apply.transforms`; or an
            `zotune.apply.subspace.InSubspace`, a function of a matrix's coordinates.
        coefficient: a function applied to each c before ĝ is summed, such as its sign.
        step: the line search along the step, see `zotune.apply.line_search`.
        sampler: the distribution of the directions; `zotune.sparse` makes a sparse one, `zotune.low_rank` one of
            matrices of low rank.
        num_queries: q ≥ 1, directions a step (and block).
        directions_per_batch: k, or "auto": each of the q is k directions, one for each of k groups of the examples, in
            the passes of one direction; see `zotune.per_example`, which makes the objective that this needs. "auto"
            follows how far the examples' gradients agree, and multiplies lr by what that gains.
        blocks: a partition of the tuned tensors, estimated block by block, see `zotune.directions.blocks`; or a
            `OneBlock`, of whose blocks each step estimates one.
        block_order: "joint" or "sequential", see `BlockOrder`.
        reuse_prefix: with blocks, cache the activations that a block cannot change, see
            `zotune.estimate.activation_cache`.
        window: rebuild the transform's state from the last so many steps' coefficients, in place of keeping it.
            No memory, but each step makes the noise of `window` steps; the same bits while steps ≤ window.
        weight_decay: λ ≥ 0, decoupled: x ← x - η (h(ĝ) + λ x). Tensors of fewer than two dimensions (biases, gains of
            norms) are exempt.
        max_coefficient: coefficients c (before the mean over queries) are cut to ± this.
        rounding: how half-precision weights are written; see `Rounding`.
        seed: seed of all directions and roundings of the run: the same seed, model and objective give the same bits.
        params: tune these instead: parameters of `model`, or groups of them as in torch, with their own `lr` and
            `weight_decay`.
        max_skipped: after so many steps in a row with such an estimate, `NonFiniteLossError` is raised.

    Attributes:
        num_steps: steps taken so far, skipped ones included.
        num_skipped: steps with an estimate that was NaN or infinite, which left weights and state untouched. Of
            sequential blocks the others were written; the record's scale is NaN for each that was left out.
        num_forwards: evaluations of the objective so far.
        on_step: called with the record of each step, once it is taken; for a ledger, see `zotune.ledger`. An exception
            from it undoes the step.

    A step is whole or not at all: after an exception from the closure or anything else, weights, state and counters
    are those before it (where sequential blocks tune more than 16 MiB, see `zotune.optim.undo`).

    Coefficients and learning rates are rounded to float32 before they are used (not where float64 weights are tuned),
    so that a record holds exactly what was applied.

    Raises:
        ValueError: a value is out of range.
        UsageError: nothing can be tuned, the blocks are no partition, or two options exclude each other.

    >>> model = nn.Linear(3, 1)
    >>> x, y = torch.randn(8, 3), torch.zeros(8, 1)
    >>> opt = ZerothOrder(model, lr=0.05)
    >>> losses = [opt.step(lambda: nn.functional.mse_loss(model(x), y)) for _ in range(100)]
    >>> losses[-1] < losses[0]
    True
    """

    def __init__(  # noqa: PLR0913 - as torch's optimizers: every option by keyword, each with a default
        self,
        model: nn.Module,
        lr: float,
        *,
        estimator: Estimator | None = None,
        transform: AnyTransform = identity,
        coefficient: Coefficient = unchanged,
        step: LineSearch = fixed,
        sampler: AnySampler = rademacher,
        num_queries: int = 1,
        directions_per_batch: int | str | None = None,
        blocks: Sequence[Block] | OneBlock | None = None,
        block_order: BlockOrder | str = BlockOrder.JOINT,
        reuse_prefix: bool = True,
        window: int | None = None,
        weight_decay: float = 0.0,
        max_coefficient: float | None = None,
        rounding: Rounding | str = Rounding.STOCHASTIC,
        seed: int = 0,
        params: Iterable[Any] | None = None,
        max_skipped: int = 10,
    ) -> None:
        check_values(lr, num_queries, window, weight_decay, max_coefficient, seed)
        groups = None if params is None else as_groups(params)
        chosen = None if groups is None else [p for group in groups for p in group["params"]]
        self.tuned = ParameterSet(model, chosen)
        check_sampler(sampler, self.tuned, window)
        self.block_choice = active_blocks(blocks, self.tuned)
        self.blocks = self.block_choice.blocks
        self.block_order = BlockOrder(block_order)
        self.estimator: Estimator = estimator or partial(central_difference, mu=1e-3)
        if directions_per_batch is not None:
            self.estimator = with_directions_per_batch(self.estimator, directions_per_batch, num_queries)
            reuse_prefix = False  # there are no activations of all examples that the rows' own passes could share
        self._prefix = ActivationCache(self.tuned) if blocks is not None and reuse_prefix else NoActivationCache()
        self.transform, self.coefficient, self.line_search = transform, coefficient, step
        self.max_coefficient, self.sampler, self.num_queries = max_coefficient, sampler, num_queries
        self.rounding, self.seed = Rounding(rounding), seed
        self._sampling = SamplerState(self.tuned, sampler)
        self._estimation = EstimatorState(num_queries)
        self._window = None if window is None else CoefficientWindow(window - 1)
        defaults = {"lr": lr, "weight_decay": weight_decay}
        super().__init__(groups or [{"params": [t.parameter for t in self.tuned]}], defaults, max_skipped)
        self._deferred = deferred_updates(self.tuned, self.param_groups, self.rounding, self.sampler)
        self._is_complete = True

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

    def estimate(self, closure: Closure, blocks: Sequence[Block | None] | None = None) -> GradientEstimate:
        """Estimate the gradient at the present weights, of some `blocks` if given. The weights are not changed."""
        with self._prefix:
            return self._estimate(closure, blocks or self.active_blocks)

    def _estimate(self, closure: Closure, blocks: Sequence[Block | None]) -> GradientEstimate:
        if not self._taken:  # sequential blocks of one step have equally many directions
            self._estimation.begin(self.estimator, closure)
        directions = self.directions(blocks, self._estimation.num_directions)
        self._prefix.record(closure)
        estimate = self.estimator(self.reusing(closure), self.tuned, directions)
        self.count_forwards(estimate.num_forwards)
        return estimate.agreed(self.tuned).rounded(self.recorded)

    def reusing(self, closure: Closure) -> Closure:
        """The same objective; within a step its layers that the current perturbation cannot reach are skipped."""
        return self._prefix.of(closure)

    def count_forwards(self, num_forwards: int) -> None:
        """Count evaluations of closures of `reusing`: passes that the activation cache added count, values it knew do
        not.
        """
        self.num_forwards += num_forwards + self._prefix.num_passes
        self._prefix.num_passes = 0

    def apply(self, estimate: GradientEstimate) -> None:
        """Update the weights, x ← x - η h(ĝ), one tensor at a time. An estimate that is not finite is counted and
        skipped.

        Raises:
            NonFiniteLossError: `max_skipped` estimates in a row were not finite.
            UsageError: it is to be recorded, and is not of this step's directions.
        """
        if self.on_step is not None:
            count = self._estimation.num_directions
            check_own(estimate, self.directions(count=count) if len(self._rounds) == 1 else None)
        estimate = estimate.rounded(self.recorded)
        with self.whole_step(), uninterrupted():
            self._taken = []
            self._take(estimate, 1.0 if estimate.is_finite else math.nan, self._write)
            self._count()
        self.stop_if_skipping()

    def step(  # type: ignore[override]
        self, closure: Closure | None = None, *, inspect: Callable[[GradientEstimate], None] | None = None
    ) -> float:
        """One step; returns the loss. `closure` returns the loss and never calls backward.

        It is called several times (see `num_forwards`), so it must be a function of the weights: the same
        batch each time. Modules are in eval mode meanwhile (no dropout). `inspect`, if given, is called with each
        estimate before it is applied.
        """
        closure = check_closure(closure)
        with self.whole_step():
            loss = self.take_step(closure, inspect or (lambda estimate: None))
        self.stop_if_skipping()
        return loss

    def take_step(
        self,
        closure: Closure,
        inspect: Callable[[GradientEstimate], None] = lambda estimate: None,
        also: Callable[[], None] = lambda: None,
    ) -> float:
        """As `step`, within a `whole_step`. `also` is called just before the last write, if there is one."""
        self._taken = []
        *rounds, last = self._rounds

        def measured(blocks: Sequence[Block | None]) -> tuple[GradientEstimate, float]:
            estimate = self._estimate(closure, blocks)
            inspect(estimate)
            return estimate, self.line_search(self._line(closure, estimate)) if estimate.is_finite else math.nan

        with self._prefix:
            for blocks in rounds:
                self._take(*measured(blocks), self._write)
            estimate, scale = measured(last)
        with uninterrupted():
            if not math.isnan(scale):
                also()
            self._take(estimate, scale, self._write)
            return self._count()

    def _line(self, closure: Closure, estimate: GradientEstimate) -> StepLine:
        """The objective along the step that the estimate gives."""
        return StepLine(self.tuned, self.reusing(closure), self.updates(estimate), estimate.base, self.count_forwards)

    def skip(self) -> None:
        """Count a skipped step, for a caller who found something else in it that is not finite."""
        with self.whole_step():
            self.leave_out()
        self.stop_if_skipping()

    def leave_out(self) -> None:
        """As `skip`, within a `whole_step`."""
        self._taken = []
        self.close_early()

    def close_early(self) -> None:
        """As `CountingOptimizer.close_early`: what is left out has coefficients and loss NaN."""
        scalars = (math.nan,) * max((len(estimate.scalars) for estimate, _ in self._taken), default=0)
        for blocks in self._rounds[len(self._taken) :]:
            terms = tuple((math.nan, u) for u in self.directions(blocks, self._estimation.num_directions))
            self._taken.append((GradientEstimate(math.nan, terms, 0, scalars=scalars), math.nan))
        self._count()

    def replay_step(self, record: StepRecord) -> None:
        """Take the step of a record again: the same bits, without data or a forward pass.

        The optimizer must be as that which took it: made alike, over the same weights, after the same steps.

        Raises:
            UsageError: it is not the next step.
        """
        self._replay(record, self._write)

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

    @property
    def has_fixed_records(self) -> bool:
        """Whether all steps have `num_queries` coefficients a block and no scalars, so that records are of one size."""
        return has_fixed_records(self.estimator)

    @property
    def window(self) -> int | None:
        """The number of steps whose coefficients the transform's state is rebuilt from; None where it is kept."""
        return None if self._window is None else self._window.maxlen + 1

    @property
    def _rounds(self) -> list[tuple[Block | None, ...]]:
        return self.block_order.rounds(self.active_blocks)

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
            self._deferred.add(step, scale, self._undo, in_sequence=len(self._rounds) > 1)
            self._prefix.moved(frozenset(t.id for t in self.tuned if step.moves(t)))
            self.tuned.reshard()
            # An enclosing torch.autocast remembers casts of the weights, which are now those before the update.
            torch.clear_autocast_cache()
            self._undo.is_writing = False

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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's while the optimizer is made; afterwards the set of tuned tensors is fixed.

        Raises:
            UsageError: the optimizer is complete, or the group has options that groups do not have.
        """
        if hasattr(self, "_is_complete"):
            raise UsageError(
                "a parameter group cannot be added later: blocks, masks and a ledger are made for the tensors that an "
                "optimizer begins with. Make a new one with all groups, params=[{'params': …, 'lr': …}, …], and load "
                "what state there is."
            )
        super().add_param_group(param_group)
        check_group(param_group)

    def placed(self, value: Tensor, parameter: Tensor, key: str) -> Tensor:
        """As `CountingOptimizer.placed`, also of weights that are offloaded or in shards."""
        tensor = self.tuned.find(parameter)
        return value if tensor is None else placed_state(self.transform, tensor, key, value)

    def _count(self) -> float:
        if self._window is not None:
            self._window.close()
        return super()._count()

    def state_dict(self) -> dict[str, Any]:
        """Torch's state, and under "zeroth_order" the seed, counters, masks and window that the next step needs."""
        with self._deferred.states_in(self.state):
            state = super().state_dict()
        own: dict[str, Any] = {"seed": self.seed, "noise_version": self.tuned.noise_version}
        own |= {"sampler": self._sampling.state(), "history": self._window and self._window.state()}
        own["one_by_one"] = sorted(refused(self.tuned))
        learned = {"learned": self._estimation.learned, "block_choice": self.block_choice.state()}
        state["zeroth_order"] |= own | {name: value for name, value in learned.items() if value is not None}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken; float32 state stays float32."""
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
