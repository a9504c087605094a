"""One update of a run: by a zeroth-order method, a first-order baseline or both, over the same micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zotune.errors import NonFiniteLossError
from zotune.estimate.estimate import GradientEstimate
from zotune.estimate.objective import accumulate
from zotune.llm.models.load import LanguageModel
from zotune.llm.training.checks import check_first_estimate, check_mu
from zotune.llm.training.counters import Counters
from zotune.noise import derive_seed
from zotune.optim.hybrid import Hybrid
from zotune.optim.zeroth_order import ZerothOrder

# The optimizer, the mean loss of each micro-batch, and how many examples each has → the loss.
Update = Callable[[Any, Sequence[Callable[[], Tensor]], Sequence[int]], float]

# Steps in a row without a finite loss after which a first-order run gives up.
MAX_SKIPPED = 10


class ZerothOrderStep:
    """One step of forward passes only; the micro-batches add up to one objective. The first is looked at hard.

    Args:
        mu: that of probes, None where there are none.
        has_steps: whether the objective is a staircase, as accuracy is: equal values of all probes are then no fault.

    Attributes:
        is_flat: whether in the last step all probes of such an objective had the same value.
    """

    def __init__(self, mu: float | None, *, has_steps: bool = False) -> None:
        self._mu, self._has_steps, self.is_flat = mu, has_steps, False

    def __call__(
        self, optimizer: ZerothOrder, closures: Sequence[Callable[[], Tensor]], weights: Sequence[int]
    ) -> float:
        """One update; the loss before it."""
        differs: list[bool] = []
        is_first = not optimizer.num_steps
        if is_first and self._mu is not None:
            check_mu(optimizer.tuned, self._mu)

        def inspect(estimate: GradientEstimate) -> None:
            differs.append(any(c != 0 for c, _ in estimate.terms))
            if is_first:
                check_first_estimate(optimizer, estimate, mu=None if self._has_steps else self._mu)

        loss = optimizer.step(accumulate(closures, weights), inspect=inspect)
        self.is_flat = self._has_steps and not any(differs)
        return loss


def hybrid_step(optimizer: Hybrid, closures: Sequence[Callable[[], Tensor]], weights: Sequence[int]) -> float:
    """One update of both halves from the gradient at the same weights; the loss before it."""
    return optimizer.step(accumulate(closures, weights))


class FirstOrderStep:
    """One step by back-propagation, the micro-batches' gradients added up."""

    def __init__(self, lm: LanguageModel, counters: Counters, *, checkpointing: bool, seed: int) -> None:
        """`seed` names the dropout of each step; `counters` are the run's."""
        self._lm, self._counters, self._seed = lm, counters, seed
        if checkpointing:
            lm.module.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]

    def __call__(
        self, optimizer: torch.optim.Optimizer, closures: Sequence[Callable[[], Tensor]], weights: Sequence[int]
    ) -> float:
        """One update; the loss before it."""
        self._lm.module.train()
        optimizer.zero_grad()
        total = 0.0
        # Dropout is a function of seed and step, so that a run that was stopped goes on as if it had not been.
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(derive_seed(self._seed, self._counters.step))
            for closure, weight in zip(closures, weights, strict=True):
                loss = closure() * (weight / sum(weights))
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
        if math.isfinite(total):
            optimizer.step()
        elif self._counters.skipped_in_a_row + 1 >= MAX_SKIPPED:
            raise NonFiniteLossError(
                f"the loss was NaN or infinite for {MAX_SKIPPED} steps in a row. Lower the learning rate."
            )
        return total
