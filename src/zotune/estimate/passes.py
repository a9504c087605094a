"""How many forward passes an estimator takes: it says so itself, so that nobody assumes it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def takes(each: int, more: int = 0) -> Callable[[F], F]:
    """A decorator: the estimator evaluates the objective `each` times for a direction, and `more` times at x."""

    def declare(estimator: F) -> F:
        vars(estimator)["passes"] = each, more
        return estimator

    return declare


def passes_of(estimator: Any) -> tuple[int, int]:
    """The evaluations of an estimator: for each direction, and at x.

    >>> from zotune.estimate.finite_difference import forward_difference
    >>> passes_of(partial(forward_difference, mu=1e-3))
    (1, 1)
    """
    while isinstance(estimator, partial):
        estimator = estimator.func
    found: tuple[int, int] = estimator.passes
    return found
