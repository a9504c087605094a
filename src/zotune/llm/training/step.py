"""One update of a run by a zeroth-order method, a first-order baseline or both, and checks of the first update.

The checks refuse a μ or a learning rate that is too small for the precision of the weights, and find out whether the
probes may share a forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from zotune.apply.tensor_update import HALF, Rounding
from zotune.apply.update import updated_slice
from zotune.directions.direction import Direction
from zotune.errors import NonFiniteLossError, UsageError
from zotune.estimate.batched_probes import NotSeparableError
from zotune.estimate.estimate import GradientEstimate
from zotune.estimate.estimators import unbound
from zotune.estimate.mesh import ALONE_MESH, Mesh
from zotune.estimate.objective import Batched, accumulate, probing
from zotune.estimate.per_example.objective import PerExample
from zotune.estimate.probes import refuse, values_side_by_side
from zotune.llm.config.run import TrainConfig
from zotune.llm.config.step import StepOptions
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.training.counters import Counters
from zotune.llm.training.optimizers import AnyOptimizer
from zotune.messages import say
from zotune.methods.randopt import best_points
from zotune.model.parameters import ParameterSet, TunedTensor
from zotune.noise import derive_seed
from zotune.optim.hybrid import Hybrid
from zotune.optim.master_weights import FirstOrder, finite_gradients, must_repeat
from zotune.optim.shared_gradients import back_propagate_all
from zotune.optim.zeroth_order import ZerothOrder

# The optimizer, closures of each micro-batch's mean loss, and the weights of the micro-batches → the loss.
Update = Callable[[Any, Sequence[Callable[[], Tensor]], Sequence[int]], float]

# Number of steps in a row without a finite loss after which a first-order run fails.
MAX_SKIPPED = 10
# Number of elements of each tensor in a check.
_SAMPLE = 4096
# The least share of half-precision weights that a probe has to move is one in so many.
_ROUNDED = 512
# Minimum fraction of a sample that has to change. Zeros do not count, because any update changes them.
_MIN_FRACTION = 0.001


class ZerothOrderStep:
    """One step of forward passes only, over micro-batches that add up to one objective; the first step is checked.

    Args:
        mu: μ of the probes; None if there are no probes.
        has_steps: whether the objective is piecewise constant, as accuracy is; equal values of all probes are then no
            error.
        mesh: the processes that share the work.

    Attributes:
        is_flat: whether all probes of such an objective had the same value in the last step.
    """

    def __init__(self, mu: float | None, *, has_steps: bool = False, mesh: Mesh = ALONE_MESH) -> None:
        self._mu, self._has_steps, self._mesh, self.is_flat = mu, has_steps, mesh, False

    def __call__(
        self, optimizer: ZerothOrder, closures: Sequence[Callable[[], Tensor]], weights: Sequence[int]
    ) -> float:
        """Update the weights; return the loss before the update."""
        differs: list[bool] = []
        is_first = not optimizer.num_steps
        if is_first and self._mu is not None:
            check_mu(optimizer.tuned, self._mu)

        def inspect(estimate: GradientEstimate) -> None:
            differs.append(any(c != 0 for c, _ in estimate.terms))
            if is_first:
                check_first_estimate(optimizer, estimate, mu=None if self._has_steps else self._mu)

        loss = optimizer.step(accumulate(closures, weights, mesh=self._mesh), inspect=inspect)
        self.is_flat = self._has_steps and not any(differs)
        return loss


def hybrid_step(mesh: Mesh = ALONE_MESH) -> Update:
    """Return the step that updates both parts from gradients at the same weights; it returns the loss before that."""

    def step(optimizer: Hybrid, closures: Sequence[Callable[[], Tensor]], weights: Sequence[int]) -> float:
        return optimizer.step(accumulate(closures, weights, mesh=mesh))

    return step


class FirstOrderStep:
    """One step by back-propagation, with the gradients of the micro-batches added up."""

    def __init__(self, lm: LanguageModel, counters: Counters, *, checkpointing: bool, seed: int) -> None:
        """`seed` is the seed of dropout; `counters` are those of the run."""
        self._lm, self._counters, self._seed = lm, counters, seed
        if checkpointing:
            lm.module.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]

    def __call__(
        self, optimizer: FirstOrder, closures: Sequence[Callable[[], Tensor]], weights: Sequence[int]
    ) -> float:
        """Update the weights; return the loss before the update, NaN if a gradient is not finite."""
        loss = self._differentiate(optimizer, closures, weights)
        while math.isfinite(loss) and must_repeat(optimizer):
            loss = self._differentiate(optimizer, closures, weights)
        loss = loss if finite_gradients(optimizer) else math.nan
        if math.isfinite(loss):
            optimizer.step()
        elif self._counters.skipped_in_a_row + 1 >= MAX_SKIPPED:
            raise NonFiniteLossError(
                f"the loss or its gradient was NaN or infinite for {MAX_SKIPPED} steps in a row. Lower the learning "
                "rate."
            )
        return loss

    def _differentiate(
        self, optimizer: FirstOrder, closures: Sequence[Callable[[], Tensor]], weights: Sequence[int]
    ) -> float:
        """Add up the gradients of the micro-batches; return the loss."""
        self._lm.module.train()
        losses = back_propagate_all(optimizer, closures, weights, self._lm.mesh, self._drawing)
        return sum(loss * (weight / sum(weights)) for loss, weight in zip(losses, weights, strict=True))

    @contextmanager
    def _drawing(self, part: int) -> Iterator[None]:
        """Let dropout depend on the seed, the step and the micro-batch only, whoever draws it."""
        step = self._counters.step
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(derive_seed(self._seed, step, part))
            yield


def update_of(optimizer: AnyOptimizer, lm: LanguageModel, config: TrainConfig, counters: Counters) -> Update:
    """Return the function that takes the steps of an optimizer."""
    if isinstance(optimizer, Hybrid):
        return hybrid_step(lm.mesh)
    if isinstance(optimizer, ZerothOrder):
        mu = None if config.method == "forward_grad" else config.mu
        return ZerothOrderStep(mu, has_steps=not config.has_gradient, mesh=lm.mesh)
    return FirstOrderStep(lm, counters, checkpointing=config.gradient_checkpointing, seed=config.seed)


def check_mu(tuned: ParameterSet, mu: float) -> None:
    """Refuse a μ that is too small for the precision of the weights.

    Half-precision probes are rounded at random: a probe moves a share of μ over their unit in the last place.

    Raises:
        UsageError: x + μ rounds to x for nearly every non-zero element of a sample, and of half-precision ones a probe
            moves fewer than one in `_ROUNDED`.
    """
    samples = [_sample(tensor) for tensor in tuned]
    changed = _changed_fraction((x, x + mu * (_ROUNDED / 2 if x.dtype in HALF else 1)) for x in samples)
    if tuned.agreed([changed])[0] >= _MIN_FRACTION:
        return
    dtypes = ", ".join(sorted({str(t.storage().dtype).removeprefix("torch.") for t in tuned}))
    raise UsageError(
        f"mu is {mu:g}, too small for weights in {dtypes}: nearly every weight plus or minus mu rounds to itself, so "
        f"both probes see the same model. Use mu of at least {_smallest_mu(tuned):.0e}, or float32 weights or adapters."
    )


def check_first_estimate(optimizer: ZerothOrder, estimate: GradientEstimate, mu: float | None) -> None:
    """Refuse probes whose losses do not differ, and an update that rounding would remove entirely.

    `mu` is None if equal losses are no error: without probes, or for a piecewise constant objective.

    Raises:
        UsageError: the message says which option to change.
    """
    # A single block may have a zero slope at first, such as an adapter's first factor while the second is zero; and
    # where points are chosen, none may be better than the weights.
    is_choice = unbound(optimizer.estimator) is best_points
    has_none = all(c == 0 and u.block is None for c, u in estimate.terms)
    if estimate.is_finite and mu is not None and has_none and not is_choice:
        raise UsageError(
            f"mu is {mu:g}, below the resolution of the loss: both probes gave the same loss ({estimate.loss:.6g}), so "
            "every coefficient would be zero. Use a larger mu, or float32 in place of half precision."
        )
    # During a warm-up the first learning rate is 0.
    has_slope = estimate.is_finite and any(c != 0 for c, _ in estimate.terms) and not _is_warming_up(optimizer)
    if optimizer.rounding == Rounding.NEAREST and has_slope and not _moves(optimizer, estimate):
        raise UsageError(
            f"the learning rate {optimizer.param_groups[0]['lr']:g} cannot work with rounding to nearest: "
            "the first update is below half a rounding unit of every weight, so nothing would move. "
            "Use rounding: stochastic or master, a larger learning rate, or float32."
        )


def _is_warming_up(optimizer: ZerothOrder) -> bool:
    return all(group["lr"] < group.get("initial_lr", 0) for group in optimizer.param_groups)


def _moves(optimizer: ZerothOrder, estimate: GradientEstimate) -> bool:
    """Whether an update, rounded to nearest, changes more than a negligible fraction of a sample of elements."""
    pairs = []
    for update in optimizer.updates(estimate).values():
        x = _sample(update.tensor)
        after = torch.empty_like(x)
        updated_slice(update, after, x, start=0, scale=1.0)
        pairs.append((x, after))
    return optimizer.tuned.agreed([_changed_fraction(pairs)])[0] >= _MIN_FRACTION


def _sample(tensor: TunedTensor) -> Tensor:
    return tensor.storage().flatten()[:_SAMPLE].clone()


def _changed_fraction(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the fraction of non-zero elements that differ between before and after; 1 if all are zero."""
    counts = [(int((x != 0).sum()), int(((x != 0) & (after != x)).sum())) for x, after in pairs]
    total = sum(n for n, _ in counts)
    return sum(moved for _, moved in counts) / total if total else 1.0


def _smallest_mu(tuned: ParameterSet) -> float:
    """Return a power of ten that changes the median weight."""
    found = [x for t in tuned if len(x := _sample(t))]  # a process may hold nothing of a tensor in shards
    sizes = [x.float().abs().median() * torch.finfo(x.dtype).eps for x in found]
    return float(10 ** torch.stack([s.cpu() for s in sizes]).max().log10().ceil())


def try_side_by_side(
    optimizer: AnyOptimizer, closure: Callable[[], Tensor], lm: LanguageModel, options: StepOptions
) -> None:
    """Find out on the closure's few examples whether its probes may share a pass, and say so if they may not."""
    zeroth_order = optimizer.zeroth_order if isinstance(optimizer, Hybrid) else optimizer
    # The forward gradient has no probes that could share a pass, and those of a tensor-parallel plan never do.
    if not isinstance(zeroth_order, ZerothOrder) or options.method == "forward_grad":
        return
    if zeroth_order.tuned.is_tensor_parallel:
        return
    before, u = lm.num_forwards, Direction(seed=0)
    if isinstance(closure, PerExample):
        zeroth_order.estimate(closure)
        lm.num_forwards = before
        zeroth_order.num_forwards = 0
    elif isinstance(closure, Batched) and closure.most > 1:
        try:
            with probing(lm.module):
                values_side_by_side(closure, zeroth_order.tuned, [(1.0, u), (-1.0, u)])
        except NotSeparableError as error:
            say(refuse(closure, zeroth_order.tuned, error))
        lm.num_forwards = before
