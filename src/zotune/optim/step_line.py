"""The objective along a step before it is taken, which a line search looks at."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

from zotune.apply.tensor_update import TensorUpdate
from zotune.apply.update import Updated
from zotune.estimate.objective import Closure, evaluate, probing
from zotune.estimate.perturb import perturbed_by
from zotune.model.parameters import ParameterSet


@dataclass(frozen=True)
class StepLine:
    """The objective along a step that has not been taken: a `zotune.apply.line_search.Line`.

    Attributes:
        tuned: the tensors that the step moves.
        closure: the objective.
        updates: the step, by tensor id.
        base: f(x), where it is known.
        count: is given the number of each evaluation's passes.
    """

    tuned: ParameterSet
    closure: Closure
    updates: dict[int, TensorUpdate]
    base: float | None
    count: Callable[[int], None]

    def value(self, a: float) -> float:
        """As `Line.value`."""
        if not a and self.base is not None:
            return self.base
        self.count(1)
        with probing(self.tuned.model), nullcontext() if not a else perturbed_by(self.tuned, Updated(self.updates, a)):
            value = evaluate(self.closure)
        return self.tuned.agreed([value])[0]
