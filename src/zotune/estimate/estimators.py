"""Estimators: ĝ from the objective, the tuned tensors and the directions of a step.

An estimator is a function of these three. Optional members say what else it can do; this module alone looks for them:

    passes                         how often it evaluates the objective: for each direction, and at x
    cost                           the arithmetic of one of its passes in forward passes: 2 with tangents, else 1
    has_scalars                    its estimates carry scalars besides coefficients
    num_groups(learned, closure)   the directions that one query has, each for a group of the examples
    rate(learned, closure)         a factor of the learning rates that follows what it has learned
    observed(learned, estimate)    what it has learned after a step along an estimate, in plain values

What an estimator learns begins as None and is a pure function of what records hold, so that a resumed run and a replay
know it too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from zotune.errors import UsageError
from zotune.estimate.estimate import GradientEstimate
from zotune.estimate.objective import Closure

F = TypeVar("F", bound=Callable[..., Any])


def takes(each: int, at_x: int = 0) -> Callable[[F], F]:
    """A decorator: the estimator evaluates the objective `each` times for a direction, and `at_x` times at x."""

    def declare(estimator: F) -> F:
        vars(estimator)["passes"] = each, at_x
        return estimator

    return declare


def passes_of(estimator: Any) -> tuple[int, int]:
    """How often an estimator evaluates the objective: for each direction, and at x.

    >>> from zotune.estimate.finite_difference import forward_difference
    >>> passes_of(partial(forward_difference, mu=1e-3))
    (1, 1)
    """
    found: tuple[int, int] = unbound(estimator).passes
    return found


def cost_of_pass(estimator: Any) -> int:
    """The arithmetic of one of an estimator's passes, in forward passes: 2 where it carries tangents, else 1.

    >>> from zotune.estimate.forward_mode.gradient_check import CheckedForwardGradient
    >>> cost_of_pass(CheckedForwardGradient()), cost_of_pass(lambda closure, tuned, directions: None)
    (2, 1)
    """
    return int(getattr(unbound(estimator), "cost", 1))


def unbound(estimator: Any) -> Any:
    """The estimator itself, without the arguments that are bound to it."""
    return unbound(estimator.func) if isinstance(estimator, partial) else estimator


def has_groups(estimator: Any) -> bool:
    """Whether a query has directions of groups of examples, in place of one direction."""
    return hasattr(unbound(estimator), "num_groups")


def has_fixed_records(estimator: Any) -> bool:
    """Whether the estimates of all steps have the same number of coefficients, and no scalars.

    >>> has_fixed_records(lambda closure, tuned, directions: None)
    True
    """
    return not has_groups(estimator) and not getattr(unbound(estimator), "has_scalars", False)


class EstimatorState:
    """What an optimizer's estimator has learned, and what follows from it for the present step.

    Attributes:
        learned: plain values; None at first, and for an estimator that learns nothing.
        num_directions: directions of each block in the present step.
        rate: the factor of the learning rates in the present step.
    """

    def __init__(self, num_queries: int) -> None:
        """`num_queries` is how many queries a step has."""
        self.learned: Any = None
        self.num_directions, self.rate = num_queries, 1.0
        self._num_queries = num_queries

    def begin(self, estimator: Any, closure: Closure) -> None:
        """Begin a step."""
        own = unbound(estimator)
        groups = own.num_groups(self.learned, closure) if has_groups(own) else 1
        self.num_directions = self._num_queries * groups
        self.rate = own.rate(self.learned, closure) if hasattr(own, "rate") else 1.0

    def replay(self, estimator: Any, num_coefficients: int, num_blocks: int) -> None:
        """Begin the present step as one whose record holds so many coefficients, and rates with all their factors.

        Raises:
            UsageError: the optimizer takes no such steps.
        """
        count, rest = divmod(num_coefficients, num_blocks)
        fits = not count % self._num_queries if has_groups(estimator) else count == self._num_queries
        if rest or not count or not fits:
            raise UsageError(
                f"the record has {num_coefficients} coefficients, but a step here has {self._num_queries} "
                f"{'or a multiple of it ' if has_groups(estimator) else ''}for each of {num_blocks} blocks: it is of "
                "another optimizer."
            )
        self.num_directions, self.rate = count, 1.0

    def learn(self, estimator: Any, estimate: GradientEstimate) -> None:
        """Learn from an estimate that was applied."""
        own = unbound(estimator)
        if hasattr(own, "observed"):
            self.learned = own.observed(self.learned, estimate)
