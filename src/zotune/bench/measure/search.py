"""The search for the learning rate and μ of a cell, by the plan of its experiment."""

from __future__ import annotations

from typing import NamedTuple

from zotune.bench.spec.schema import SearchPlan
from zotune.llm.search import points
from zotune.llm.search.points import Search


class Point(NamedTuple):
    """A point of the search; `mu` is None for a method without finite differences."""

    learning_rate: float
    mu: float | None


def search(plan: SearchPlan, *, has_mu: bool) -> Search[Point]:
    """Yield the points of a plan, and be sent the held-out loss at each.

    >>> plan = SearchPlan(learning_rate=(0.1, 0.2), mu=(1e-3,))
    >>> [point.learning_rate for point in search(plan, has_mu=True)]
    [0.1, 0.2]
    """
    axes = {"learning_rate": plan.learning_rate, **({"mu": plan.mu} if has_mu and plan.mu else {})}
    by_name = points.optuna_trials(axes, plan.num_trials, plan.seed) if plan.by == "optuna" else points.grid(axes)
    try:
        point = next(by_name)
        while True:
            loss = yield Point(point["learning_rate"], point.get("mu"))
            point = by_name.send(loss)
    except StopIteration:
        return
