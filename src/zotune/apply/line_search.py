"""How far to go along a step, once ĝ is known: `fixed`, or the best of three points.

A step rule returns the factor a of x ← x - a η h(ĝ): 1 for the step, 0 for staying, -1 for going back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from zotune.apply.update import Updated
from zotune.estimate.estimate import GradientEstimate
from zotune.estimate.objective import Closure, evaluate, probing
from zotune.estimate.perturb import displaced

if TYPE_CHECKING:
    from zotune.optim.zeroth_order import ZerothOrder

StepRule = Callable[["ZerothOrder", Closure, GradientEstimate], float]


def fixed(optimizer: ZerothOrder, closure: Closure, estimate: GradientEstimate) -> float:
    """Take the step as it is."""
    return 1.0


def conservative(optimizer: ZerothOrder, closure: Closure, estimate: GradientEstimate) -> float:
    """Argmin of f over {x, x - η h(ĝ), x + η h(ĝ)}, on the batch that ĝ comes from.

    The points are looked at with the bits that the weights would have; x itself does not move, so staying
    is exact. Ties keep x; a point whose f is NaN or infinite is never chosen. Two forward passes more than
    the estimate's, and a third for f(x) where neither the estimate nor a pass recorded for its blocks knows it.

    Source: the paper, appendix A (ZO-SGD-Cons), after Kim et al., 2021.
    """
    updates, closure = optimizer.updates(estimate), optimizer.reusing(closure)
    with probing(optimizer.tuned.model):
        values = {0.0: evaluate(closure) if estimate.base is None else estimate.base}
        for scale in (1.0, -1.0):
            with displaced(optimizer.tuned, Updated(updates, scale)):
                values[scale] = evaluate(closure)
    optimizer.count_forwards(3 if estimate.base is None else 2)
    # `min` takes the first of equals.
    return min(values, key=lambda scale: values[scale] if math.isfinite(values[scale]) else math.inf)
