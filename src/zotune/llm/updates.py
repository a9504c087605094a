"""One update of a run: by a zeroth-order method, a first-order baseline or both, over the same micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zotune.errors import NonFiniteLossError
from zotune.estimators import accumulate
from zotune.hybrid import Hybrid
from zotune.llm.checks import check_first_estimate, check_mu
from zotune.llm.counters import Counters
from zotune.llm.models import LanguageModel
from zotune.noise import derive_seed
from zotune.optimizer import ZerothOrder

# The optimizer, the mean loss of each micro-batch, and how many examples each has → the loss.
Update = Callable[[Any, Sequence[Callable[[], Tensor]], Sequence[int]], float]

# Steps in a row without a finite loss after which a first-order run gives up.
MAX_SKIPPED = 10


class ZerothOrderStep:
    """One step of forward passes only; the micro-batches add up to one objective. The first is looked at hard.

    `mu` is that of probes, None where there are none.
    """

    def __init__(self, mu: float | None) -> None:
        self._mu = mu

    def __call__(
        self, optimizer: ZerothOrder, closures: Sequence[Callable[[], Tensor]], weights: Sequence[int]
    ) -> float:
        """One update; the loss before it."""
        if optimizer.num_steps:
            return optimizer.step(accumulate(closures, weights))
        if self._mu is not None:
            check_mu(optimizer.tuned, self._mu)
        inspect = partial(check_first_estimate, optimizer, mu=self._mu)
        return optimizer.step(accumulate(closures, weights), inspect=inspect)


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
