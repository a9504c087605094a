"""Gradient estimates from forward passes: finite differences along random directions.

Source: the paper's equation (RGE) in section 3. An estimator is a function of the objective, the tuned
tensors and the directions; it draws nothing, keeps nothing and leaves the weights alone. Directions may be
confined to blocks: each block's part of ĝ is the mean over the q directions of that block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor, nn

from zotune.directions import Direction
from zotune.estimate import GradientEstimate, averaged
from zotune.perturb import perturbed
from zotune.tangents import tangent_of
from zotune.tuned import TunedTensors

Closure = Callable[[], "Tensor | float"]
Estimator = Callable[[Closure, TunedTensors, Sequence[Direction]], GradientEstimate]


def central_difference(
    closure: Closure, tuned: TunedTensors, directions: Sequence[Direction], *, mu: float
) -> GradientEstimate:
    """Two-sided differences: cᵢ = (f(x + μuᵢ) - f(x - μuᵢ)) / 2μ, ĝ = (1/q) Σ cᵢ uᵢ. 2q forward passes.

    Exact along u for a quadratic f, for any μ; otherwise the bias is O(μ²).

    >>> model = nn.Linear(2, 1, bias=False).double()
    >>> tuned, u = TunedTensors(model), Direction(seed=7)
    >>> estimate = central_difference(lambda: model.weight.square().sum(), tuned, [u], mu=0.1)
    >>> (c, _), = estimate.terms
    >>> slope = (2 * model.weight.detach() * u.of(model, "weight")).sum()
    >>> abs(c - float(slope)) < 1e-12
    True
    """
    q = len(directions)
    with probing(tuned.model):
        values = read([_at(closure, tuned, u, a) for u in directions for a in (mu, -mu)])
    pairs = list(zip(values[::2], values[1::2], strict=True))
    terms = averaged([(plus - minus) / (2 * mu) for plus, minus in pairs], directions)
    return GradientEstimate(sum(map(sum, pairs)) / (2 * q), terms, num_forwards=2 * q)


def forward_difference(
    closure: Closure, tuned: TunedTensors, directions: Sequence[Direction], *, mu: float
) -> GradientEstimate:
    """One-sided differences: cᵢ = (f(x + μuᵢ) - f(x)) / μ, ĝ = (1/q) Σ cᵢ uᵢ. q + 1 forward passes.

    f(x) is evaluated once for all directions. The bias is O(μ).

    >>> model = nn.Linear(2, 1, bias=False).double()
    >>> estimate = forward_difference(lambda: model.weight.sum(), TunedTensors(model), [Direction(7)], mu=0.1)
    >>> estimate.num_forwards
    2
    """
    q = len(directions)
    with probing(tuned.model):
        base, *values = read([objective(closure), *(_at(closure, tuned, u, mu) for u in directions)])
    terms = averaged([(value - base) / mu for value in values], directions)
    return GradientEstimate(base, terms, num_forwards=q + 1, base=base)


def evaluate(closure: Closure) -> float:
    """The objective's value as a double.

    Raises:
        TypeError: as `objective`.
    """
    return float(objective(closure))


def read(values: Sequence[Tensor | float]) -> list[float]:
    """What `objective` gave as numbers; the host waits for a GPU once, not once a value."""
    waiting = [value for value in values if isinstance(value, Tensor)]
    numbers = iter(torch.stack(waiting).tolist() if waiting else ())
    return [next(numbers) if isinstance(value, Tensor) else value for value in values]


def objective(closure: Closure) -> Tensor | float:
    """The objective's value as a double, in a tensor (float64, no dimension) only where it has to carry a tangent, or
    is on a GPU, for which the host would have to wait.

    Raises:
        TypeError: it is no number, or a half-precision one, whose differences are mostly rounding.
    """
    value = closure()
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise TypeError(f"the closure must return one number, got a tensor of shape {tuple(value.shape)}")
        if value.dtype in (torch.bfloat16, torch.float16):
            raise TypeError(
                f"the closure returned a {value.dtype} loss, which is too coarse for differences of losses. "
                "Compute it in single precision, for instance loss_fn(model(x).float(), y)."
            )
        if tangent_of(value) is not None:
            return value.cpu().double().reshape(())
        if value.is_cuda:
            return value.detach().to(torch.float64, copy=True).reshape(())
        return float(value.detach())
    if isinstance(value, Real):
        return float(value)
    raise TypeError(
        f"the closure must return the loss, got {type(value).__name__}: "
        "opt.step(lambda: loss_fn(model(x), y)); it must not call backward()."
    )


@dataclass(frozen=True)
class Accumulated:
    """The objective of a batch in micro-batches: a closure that knows its parts; see `accumulate`."""

    closures: tuple[Closure, ...]
    weights: tuple[float, ...]

    def __call__(self) -> Tensor | float:
        """The weighted mean of the parts."""
        parts = zip(self.weights, self.closures, strict=True)
        return sum(w * objective(closure) for w, closure in parts) / sum(self.weights)


def accumulate(closures: Sequence[Closure], weights: Sequence[float] | None = None) -> Accumulated:
    """The objective of a batch cut into micro-batches: the weighted mean of their objectives.

    Gradient accumulation for a zeroth-order method means to add up the *objective*, not updates: the
    closure returned here gives every probe the whole batch, one micro-batch at a time.

    Args:
        closures: one a micro-batch, each the mean loss of its examples.
        weights: how many examples (or tokens) each holds; equal by default.

    >>> accumulate([lambda: 1.0, lambda: 4.0], weights=[2, 1])()
    2.0
    """
    shares = [1.0] * len(closures) if weights is None else list(weights)
    if len(shares) != len(closures) or not closures:
        raise ValueError(f"one weight for each of at least one closure, got {len(closures)} and {len(shares)}")
    return Accumulated(tuple(closures), tuple(shares))


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Without a graph and with every module in eval mode, so that the objective is a function of x alone."""
    in_training = [module for module in model.modules() if module.training]
    try:
        for module in in_training:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module in in_training:
            module.training = True


def _at(closure: Closure, tuned: TunedTensors, direction: Direction, a: float) -> Tensor | float:
    with perturbed(tuned, direction, a):
        return objective(closure)
