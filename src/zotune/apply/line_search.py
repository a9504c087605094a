"""Line searches: how far to go along a step once ĝ is known.

A line search looks at f along the line x - a η h(ĝ) and returns the factor a: 1 for the step, 0 for staying, -1 for
going back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol


class Line(Protocol):
    """The objective along a step."""

    def value(self, a: float) -> float:
        """f(x - a η h(ĝ)), with the bits that the weights would have. It costs a forward pass unless it is known."""


LineSearch = Callable[[Line], float]


def fixed(line: Line) -> float:
    """Take the step as it is."""
    return 1.0


def conservative(line: Line) -> float:
    """Argmin of f over {x, x - η h(ĝ), x + η h(ĝ)}, on the batch that ĝ comes from.

    x itself does not move, so staying is exact. Ties keep x; a point whose f is NaN or infinite is never chosen. The
    search takes two forward passes more than the estimate, and a third for f(x) where neither the estimate nor a
    pass recorded for its blocks has computed it.

    Source: the paper, appendix A (ZO-SGD-Cons), after Kim et al., 2021.
    """
    values = {a: line.value(a) for a in (0.0, 1.0, -1.0)}
    # `min` takes the first of equals.
    return min(values, key=lambda a: values[a] if math.isfinite(values[a]) else math.inf)
