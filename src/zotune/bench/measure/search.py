"""The search for the learning rate and μ of a cell, by the plan of its experiment."""

from __future__ import annotations

from typing import NamedTuple

from zotune.bench.spec.schema import SearchPlan
from zotune.llm.search import points
from zotune.llm.search.points import Search


class Point(NamedTuple):
    """A point of the search: options of a run by their names; None for what is not searched.

    `mu` is None for a method without finite differences, `hybrid_learning_rate` for runs that are no hybrids.
    """

    learning_rate: float
    mu: float | None = None
    hybrid_learning_rate: float | None = None

    @property
    def options(self) -> dict[str, float]:
        """The options that are searched."""
        return {name: value for name, value in self._asdict().items() if value is not None}


def axes_of(plan: SearchPlan, *, has_mu: bool, is_hybrid: bool = False) -> dict[str, tuple[float, ...]]:
    """The options that a plan searches, with their values.

    >>> axes_of(SearchPlan(learning_rate=(0.1, 0.2), mu=(1e-3,), hybrid_learning_rate=(0.5,)), has_mu=False)
    {'learning_rate': (0.1, 0.2)}
    """
    used = {"learning_rate": True, "mu": has_mu, "hybrid_learning_rate": is_hybrid}
    return {name: values for name, is_used in used.items() if is_used and (values := getattr(plan, name))}


def search(plan: SearchPlan, *, has_mu: bool, is_hybrid: bool = False) -> Search[Point]:
    """Yield the points of a plan, and be sent the held-out loss at each.

    >>> plan = SearchPlan(learning_rate=(0.1, 0.2), mu=(1e-3,))
    >>> [point.learning_rate for point in search(plan, has_mu=True)]
    [0.1, 0.2]
    """
    axes = axes_of(plan, has_mu=has_mu, is_hybrid=is_hybrid)
    by_name = points.optuna_trials(axes, plan.num_trials, plan.seed) if plan.by == "optuna" else points.grid(axes)
    try:
        point = next(by_name)
        while True:
            loss = yield Point(**point)
            point = by_name.send(loss)
    except StopIteration:
        return
