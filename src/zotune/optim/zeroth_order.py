"""The zeroth-order optimizer: direction → estimate → transform → apply, equation (2) of the paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from operator import index
from typing import Any

from torch import nn

from zotune.apply.line_search import LineSearch, fixed
from zotune.apply.tensor_update import AnyTransform, Rounding
from zotune.apply.transforms import Coefficient, identity, unchanged
from zotune.apply.window import CoefficientWindow
from zotune.directions.block_choice import OneBlock, active_blocks
from zotune.directions.blocks import Block
from zotune.directions.blocks import BlockOrder as BlockOrder
from zotune.directions.samplers import rademacher
from zotune.directions.schedule import AnySampler, SamplerState
from zotune.errors import UsageError
from zotune.estimate.activation_cache import ActivationCache, NoActivationCache
from zotune.estimate.estimate import GradientEstimate
from zotune.estimate.estimators import EstimatorState
from zotune.estimate.finite_difference import Estimator, central_difference
from zotune.estimate.objective import Closure
from zotune.estimate.per_example.difference import with_directions_per_batch
from zotune.model.parameters import ParameterSet
from zotune.optim.checks import (
    as_groups,
    check_closure,
    check_group,
    check_own,
    check_sampler,
    check_trainable,
    check_values,
)
from zotune.optim.deferred import deferred_updates
from zotune.optim.recorded_steps import RecordedSteps
from zotune.optim.step_line import StepLine
from zotune.system.uninterrupted import uninterrupted


class ZerothOrder(RecordedSteps):
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

    >>> import torch
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
        self.estimator = estimator or partial(central_difference, mu=1e-3)
        if directions_per_batch is not None:
            self.estimator = with_directions_per_batch(self.estimator, directions_per_batch, num_queries)
            reuse_prefix = False  # there are no activations of all examples that the rows' own passes could share
        self._prefix = ActivationCache(self.tuned) if blocks is not None and reuse_prefix else NoActivationCache()
        self.transform, self.coefficient, self.line_search = transform, coefficient, step
        self.max_coefficient, self.sampler, self.num_queries = max_coefficient, sampler, num_queries
        self.rounding, self.seed = Rounding(rounding), index(seed)
        self._sampling = SamplerState(self.tuned, sampler)
        self._estimation = EstimatorState(num_queries)
        self._window = None if window is None else CoefficientWindow(window - 1)
        defaults = {"lr": lr, "weight_decay": weight_decay}
        super().__init__(groups or [{"params": [t.parameter for t in self.tuned]}], defaults, max_skipped)
        self._deferred = deferred_updates(self.tuned, self.param_groups, self.rounding, self.sampler)
        self._trainable = frozenset(t.name for t in self.tuned if t.parameter.requires_grad)
        self._is_complete = True

    def estimate(self, closure: Closure, blocks: Sequence[Block | None] | None = None) -> GradientEstimate:
        """Estimate the gradient at the present weights, of some `blocks` if given. The weights are not changed."""
        with self._prefix:
            return self._estimate(closure, blocks or self.active_blocks)

    def _estimate(self, closure: Closure, blocks: Sequence[Block | None]) -> GradientEstimate:
        check_trainable(t.name for t in self.tuned if t.name in self._trainable and not t.parameter.requires_grad)
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
