"""Searches: generators that yield points and are sent the loss at each, so that the caller runs the trials."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Mapping, Sequence
from typing import Any, TypeVar

from zotune.errors import UsageError

Value = TypeVar("Value")
# Values by option.
Point = dict[str, Any]
# Yields points and is sent the loss at each.
Search = Generator[Value, float, None]


def grid(axes: Mapping[str, Sequence[Any]]) -> Search[Point]:
    """Yield every combination of the axes' values; the last axis changes fastest.

    >>> list(grid({"learning_rate": (0.1, 0.2), "mu": (1e-3,)}))
    [{'learning_rate': 0.1, 'mu': 0.001}, {'learning_rate': 0.2, 'mu': 0.001}]
    """
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def optuna_trials(axes: Mapping[str, Sequence[Any]], num_trials: int, seed: int) -> Search[Point]:
    """Yield `num_trials` points of Optuna's TPE sampler.

    Numbers above 0 are drawn between the smallest and the largest value of their axis, on a logarithmic scale; other
    axes, and axes of one value, keep to their values.

    Raises:
        UsageError: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise UsageError("a search by Optuna needs Optuna: pip install 'zotune[bench]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    for _ in range(num_trials):
        trial = study.ask()
        loss = yield {name: _suggested(trial, name, values) for name, values in axes.items()}
        # Optuna cannot use an infinite loss, so the trial is reported as failed.
        failed = None if math.isfinite(loss) else optuna.trial.TrialState.FAIL
        study.tell(trial, None if failed else loss, state=failed)


def _suggested(trial: Any, name: str, values: Sequence[Any]) -> Any:
    """Return Optuna's value for one axis."""
    kinds = {type(value) for value in values}
    if kinds == {float} and min(values) > 0:
        return trial.suggest_float(name, min(values), max(values), log=True)
    if kinds == {int} and min(values) > 0:
        return trial.suggest_int(name, min(values), max(values), log=True)
    return trial.suggest_categorical(name, list(values))


def climb(start: float, factor: float, most: int) -> Search[float]:
    """Yield the multiples of `start` by powers of `factor` downhill, until both neighbours of the best are worse.

    The loss as a function of the learning rate falls, then rises, so at most `most` trials find a rate within `factor`
    of the best one that they can reach. Equal losses count as worse for the larger value.

    >>> search, loss = climb(1.0, 10, 5), {100.0: 2.0, 10.0: 1.0, 1.0: 3.0}
    >>> point, tried = next(search), []
    >>> while point is not None:
    ...     tried.append(point)
    ...     try:
    ...         point = search.send(loss[point])
    ...     except StopIteration:
    ...         point = None
    >>> tried
    [1.0, 10.0, 100.0]
    """
    losses: dict[int, float] = {}
    while len(losses) < most:
        best = min(losses, key=lambda power: (losses[power], power), default=0)
        # A larger rate comes first, because a rate that is too small learns nothing; unless the best one diverges.
        step = -1 if losses.get(best) == math.inf else 1
        power = next((p for p in (best, best + step, best - step) if p not in losses), None)
        if power is None:
            return
        losses[power] = yield start * factor**power
