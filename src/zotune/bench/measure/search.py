"""The search for the learning rate and μ: a generator yields points and is sent the held-out loss at each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator
from typing import NamedTuple

from zotune.bench.spec.schema import SearchPlan
from zotune.errors import UsageError


class Point(NamedTuple):
    """A point of the search; `mu` is None for a method without finite differences."""

    learning_rate: float
    mu: float | None


# Yields points and is sent the loss at each.
Search = Generator[Point, float, None]


def search(plan: SearchPlan, *, has_mu: bool) -> Search:
    """Yield the points of a plan.

    >>> plan = SearchPlan(learning_rate=(0.1, 0.2), mu=(1e-3,))
    >>> [point.learning_rate for point in search(plan, has_mu=True)]
    [0.1, 0.2]
    """
    mus: tuple[float | None, ...] = plan.mu if has_mu and plan.mu else (None,)
    yield from (_optuna(plan, mus) if plan.by == "optuna" else _grid(plan, mus))


def _grid(plan: SearchPlan, mus: tuple[float | None, ...]) -> Search:
    for point in itertools.product(plan.learning_rate, mus):
        yield Point(*point)


def _optuna(plan: SearchPlan, mus: tuple[float | None, ...]) -> Search:
    """Trials by Optuna's TPE sampler, log-uniform between the smallest and the largest value of the plan."""
    try:
        import optuna
    except ImportError:
        raise UsageError("search by = \"optuna\" needs Optuna: pip install 'zotune[bench]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=plan.seed))
    for _ in range(plan.num_trials):
        trial = study.ask()
        rate = trial.suggest_float("learning_rate", min(plan.learning_rate), max(plan.learning_rate), log=True)
        values = [mu for mu in mus if mu is not None]
        mu = trial.suggest_float("mu", min(values), max(values), log=True) if values else None
        loss = yield Point(rate, mu)
        # Optuna cannot use an infinite loss, so the trial is reported as failed.
        failed = None if math.isfinite(loss) else optuna.trial.TrialState.FAIL
        study.tell(trial, None if failed else loss, state=failed)
