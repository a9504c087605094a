"""The record of one step: its numbers, from which the step can be taken again without data or a forward pass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any


@dataclass(frozen=True)
class StepRecord:
    """The numbers of one step. Its directions are not among them: step number and seed of the run determine these.

    Attributes:
        step: how many steps came before.
        loss: the objective before the step.
        learning_rates: η of each parameter group.
        scales: a of x ← x - a η h(ĝ), one an estimate (several where blocks go one after the other): 1, 0 or -1;
            NaN where the estimate was not finite and left out.
        coefficients: c of each term, block by block, query by query.
        num_forwards: forward passes that the step took.
        scalars: further numbers that the update depends on, block by block, such as curvatures; most methods have none.
    """

    step: int
    loss: float
    learning_rates: tuple[float, ...]
    scales: tuple[float, ...]
    coefficients: tuple[float, ...]
    num_forwards: int
    scalars: tuple[float, ...] = ()

    @property
    def is_skipped(self) -> bool:
        """Whether some estimate was left out."""
        return any(map(math.isnan, self.scales))


def described(function: Any) -> Any:
    """A function as a value that equals that of another one just if they have the same code and bound arguments.

    >>> described(partial(math.pow, 2)) == described(partial(math.pow, 2)), described(partial(math.pow, 2))[1]
    (True, (2,))
    """
    if isinstance(function, partial):
        named = {name: described(value) for name, value in function.keywords.items()}
        return described(function.func), tuple(map(described, function.args)), named
    return function


def kind_of(function: Any) -> str:
    """The name of a function, or of a transform with its rule, whatever constants are bound to it.

    >>> kind_of(partial(math.pow, 2))
    'pow'
    """
    while isinstance(function, partial):
        function = function.func
    name = getattr(function, "__qualname__", type(function).__name__)
    rule = getattr(function, "rule", None)
    return name if rule is None else f"{name}({kind_of(rule)})"
