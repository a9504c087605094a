"""Gradient estimates from forward passes: finite differences along random directions.

Source: the paper's equation (RGE) in section 3. An estimator is a function of the objective, the tuned
tensors and the directions; it draws nothing, keeps nothing and leaves the weights alone. Directions may be
confined to blocks: each block's part of ĝ is the mean over the q directions of that block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from zotune.directions.direction import Direction
from zotune.estimate.estimate import GradientEstimate, averaged
from zotune.estimate.estimators import takes
from zotune.estimate.objective import Closure, probing, read
from zotune.estimate.probes import values_at
from zotune.model.parameters import ParameterSet

Estimator = Callable[[Closure, ParameterSet, Sequence[Direction]], GradientEstimate]


@takes(each=2)
def central_difference(
    closure: Closure, tuned: ParameterSet, directions: Sequence[Direction], *, mu: float
) -> GradientEstimate:
    """Two-sided differences: cᵢ = (f(x + μuᵢ) - f(x - μuᵢ)) / 2μ, ĝ = (1/q) Σ cᵢ uᵢ. 2q forward passes.

    Exact along u for a quadratic f, for any μ; otherwise the bias is O(μ²).

    >>> from torch import nn
    >>> model = nn.Linear(2, 1, bias=False).double()
    >>> tuned, u = ParameterSet(model), Direction(seed=7)
    >>> estimate = central_difference(lambda: model.weight.square().sum(), tuned, [u], mu=0.1)
    >>> (c, _), = estimate.terms
    >>> slope = (2 * model.weight.detach() * u.of(model, "weight")).sum()
    >>> abs(c - float(slope)) < 1e-12
    True
    """
    q = len(directions)
    with probing(tuned.model):
        values = read(values_at(closure, tuned, [(a, u) for u in directions for a in (mu, -mu)]))
    terms = averaged(
        [(plus - minus) / (2 * mu) for plus, minus in zip(values[::2], values[1::2], strict=True)], directions
    )
    return GradientEstimate(sum(values) / (2 * q), terms, num_forwards=2 * q)


@takes(each=1, at_x=1)
def forward_difference(
    closure: Closure, tuned: ParameterSet, directions: Sequence[Direction], *, mu: float
) -> GradientEstimate:
    """One-sided differences: cᵢ = (f(x + μuᵢ) - f(x)) / μ, ĝ = (1/q) Σ cᵢ uᵢ. q + 1 forward passes.

    f(x) is evaluated once for all directions. The bias is O(μ).

    >>> from torch import nn
    >>> model = nn.Linear(2, 1, bias=False).double()
    >>> estimate = forward_difference(lambda: model.weight.sum(), ParameterSet(model), [Direction(7)], mu=0.1)
    >>> estimate.num_forwards
    2
    """
    q = len(directions)
    with probing(tuned.model):
        base, *values = read(values_at(closure, tuned, [None, *((mu, u) for u in directions)]))
    terms = averaged([(value - base) / mu for value in values], directions)
    return GradientEstimate(base, terms, num_forwards=q + 1, base=base)
