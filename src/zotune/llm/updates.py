"""One update of a run: by a zeroth-order method or by a first-order baseline, over the same micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zotune.directions import SAMPLERS
from zotune.errors import NonFiniteLossError
from zotune.estimators import accumulate, central_difference, forward_difference
from zotune.llm.checks import check_first_estimate, check_mu
from zotune.llm.config import FIRST_ORDER, TrainConfig
from zotune.llm.models import LanguageModel
from zotune.methods import METHODS
from zotune.optimizer import ZerothOrder

_DIFFERENCES = {"central": central_difference, "forward": forward_difference}


def make_optimizer(module: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The method by name, over the parameters that require a gradient."""
    if config.method in FIRST_ORDER:
        tuned = [p for p in module.parameters() if p.requires_grad]
        kind: Any = torch.optim.SGD if config.method == "fo_sgd" else torch.optim.Adam
        optimizer: torch.optim.Optimizer = kind(tuned, lr=config.learning_rate)
        return optimizer
    return METHODS[config.method](
        module,
        config.learning_rate,
        mu=config.mu,
        num_queries=config.num_queries,
        sampler=SAMPLERS[config.sampler],
        difference=_DIFFERENCES[config.difference],
        rounding=config.rounding,
        seed=config.seed,
    )


def scheduled(learning_rate: float, kind: str, done: float) -> float:
    """η when a fraction `done` of the steps, in [0, 1), is behind.

    >>> [scheduled(2.0, kind, 0.5) for kind in ("constant", "linear")], round(scheduled(2.0, "cosine", 0.5), 6)
    ([2.0, 1.0], 1.0)
    """
    factors = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return learning_rate * factors[kind]


# The optimizer, the mean loss of each micro-batch, and how many examples each has → the loss.
Update = Callable[[Any, Sequence[Callable[[], Tensor]], Sequence[int]], float]


class ZerothOrderStep:
    """One step of forward passes only; the micro-batches add up to one objective. The first is looked at hard."""

    def __init__(self, mu: float) -> None:
        self._mu = mu

    def __call__(
        self, optimizer: ZerothOrder, closures: Sequence[Callable[[], Tensor]], weights: Sequence[int]
    ) -> float:
        """One update; the loss before it."""
        is_first = optimizer.num_steps == 0
        if is_first:
            check_mu(optimizer.tuned, self._mu)
        estimate = optimizer.estimate(accumulate(closures, weights))
        if is_first:
            check_first_estimate(optimizer, estimate, self._mu)
        optimizer.apply(estimate)
        return estimate.loss


class FirstOrderStep:
    """One step by back-propagation, the micro-batches' gradients added up."""

    def __init__(self, lm: LanguageModel, *, checkpointing: bool, max_skipped: int = 10) -> None:
        self._lm, self._max_skipped, self._skipped = lm, max_skipped, 0
        if checkpointing:
            lm.module.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]

    def __call__(
        self, optimizer: torch.optim.Optimizer, closures: Sequence[Callable[[], Tensor]], weights: Sequence[int]
    ) -> float:
        """One update; the loss before it."""
        self._lm.module.train()
        optimizer.zero_grad()
        total = 0.0
        for closure, weight in zip(closures, weights, strict=True):
            loss = closure() * (weight / sum(weights))
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if math.isfinite(total):
            self._skipped = 0
            optimizer.step()
            return total
        self._skipped += 1
        if self._skipped >= self._max_skipped:
            raise NonFiniteLossError(
                f"the loss was NaN or infinite for {self._skipped} steps in a row. Lower the learning rate."
            )
        return total
