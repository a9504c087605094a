"""The forward gradient, compared with differences of losses before it is trusted.

An operation that torch does not know how to differentiate (a kernel for quantised weights, a custom operator, a
`detach`) may drop tangents without a word: the loss is right and its derivative is wrong, often zero. So the first
coefficient is held against central differences along the same direction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

from zotune.directions.direction import Direction
from zotune.errors import UsageError
from zotune.estimate.dual_numbers import tangent_of
from zotune.estimate.estimate import GradientEstimate
from zotune.estimate.finite_difference import central_difference
from zotune.estimate.jvp import forward_gradient
from zotune.estimate.objective import Closure
from zotune.model.parameters import ParameterSet


@dataclass(frozen=True)
class Trial:
    """How differences are made and read in one precision.

    Attributes:
        first: μ of the difference that mostly settles it.
        others: further μ, around the first; each the half or the quarter of the one before.
        rounding: what the loss may be off by, relative to it.
        tolerance: what a coefficient may be off by, relative to it, in any case.
        agreeing: how many differences with neighbouring μ are to agree with one another.
        doubt: what they may be off by, in multiples of what they differ by.
    """

    first: float
    others: tuple[float, ...]
    rounding: float
    tolerance: float
    agreeing: int = 3
    doubt: float = 3.0


# In half precision all five are to agree: where μ is large enough for rounding, a large model may be far from linear,
# and then some three of five lie together by chance.
_TRIALS = {
    torch.float64: Trial(1e-4, (1.6e-3, 4e-4, 2.5e-5, 6.25e-6), 1e-14, 0.01),
    torch.float32: Trial(1e-3, (1.6e-2, 4e-3, 2.5e-4, 6.25e-5), 2e-7, 0.03),
    torch.float16: Trial(1e-2, (4e-2, 2e-2, 5e-3, 2.5e-3), 1e-4, 0.2, agreeing=5, doubt=2.0),
    torch.bfloat16: Trial(1e-2, (4e-2, 2e-2, 5e-3, 2.5e-3), 5e-4, 0.25, agreeing=5, doubt=2.0),
}


class CheckedForwardGradient:
    """`forward_gradient`, whose first estimate is compared with central differences along its first direction.

    That takes two further forward passes, once; eight more where they leave a doubt. They are no part of the
    estimate, whose `num_forwards` does not count them. A mismatch must exceed what rounding and curvature explain,
    which is judged by how far differences with several μ agree with one another: sharp in single precision, while
    in half precision only large errors stand out. An operator that extends torch (a kernel for quantised weights)
    and drops tangents is refused by name in any precision.

    Raises:
        UsageError: as `forward_gradient`, and if the coefficient is not the derivative of the loss; the operations
            that lost tangents are named.

    >>> model, estimator = nn.Linear(2, 1, bias=False), CheckedForwardGradient()
    >>> tuned, u = ParameterSet(model), Direction(seed=7)
    >>> estimator(lambda: model.weight.square().sum(), tuned, [u]).num_forwards
    1
    >>> wrong = CheckedForwardGradient()
    >>> wrong(lambda: (model.weight * model.weight.detach()).sum(), tuned, [u])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    zotune.errors.UsageError: the forward gradient's coefficient is ..., but differences of the loss ...
    """

    def __init__(self) -> None:
        self._is_checked = False

    def __call__(self, closure: Closure, tuned: ParameterSet, directions: Sequence[Direction]) -> GradientEstimate:
        """As `forward_gradient`."""
        if self._is_checked:
            return forward_gradient(closure, tuned, directions)
        with _Losing() as lost:
            estimate = forward_gradient(closure, tuned, directions)
        if estimate.is_finite:
            _check(closure, tuned, estimate, lost)
            self._is_checked = True
        return estimate


def _check(closure: Closure, tuned: ParameterSet, estimate: GradientEstimate, lost: _Losing) -> None:
    remedy = "Use central_difference, or operations that torch can differentiate (weights that are not quantised)."
    if lost.operators:
        raise UsageError(
            f"the operator {sorted(lost.operators)[0]} has no forward-mode derivative and drops tangents without a "
            f"word, so the forward gradient would be wrong. {remedy}"
        )
    share, u = estimate.terms[0]
    c = share * sum(other.block == u.block for _, other in estimate.terms)

    def slope(mu: float) -> float:
        return central_difference(closure, tuned, [u], mu=mu).terms[0][0]

    found = contradiction(c, slope, abs(estimate.loss), _TRIALS[_precision(tuned.model)])
    if found is not None:
        where = f" Tangents end in: {', '.join(sorted(lost.names))}." if lost.names else ""
        raise UsageError(
            f"the forward gradient's coefficient is {c:.4g}, but differences of the loss say {found:.4g}: the loss "
            f"depends on the weights in ways that forward-mode differentiation does not see.{where} Usual reasons are "
            "quantised weights, operators without a derivative, .detach(), and a loss that is not a function of the "
            f"weights alone. {remedy}"
        )


def contradiction(c: float, slope: Callable[[float], float], loss: float, trial: Trial) -> float | None:
    """What differences of the loss say in place of c, if they clearly do; else None.

    Args:
        c: the derivative in question.
        slope: the central difference for a given μ.
        loss: |f(x)|.
        trial: how to go about it.

    Differences with neighbouring μ bound each other's error: one of O(μ²) falls by 4 or 16 from one to the next, one of
    rounding rises by 2 or 4. Those that agree best are believed, as many and as far as the trial says.

    >>> trial = _TRIALS[torch.float32]
    >>> contradiction(1.0, lambda mu: 1 + 1e5 * mu**2, 1.0, trial) is None
    True
    >>> contradiction(0.0, lambda mu: 1 + mu**2, 1.0, trial) is None
    False
    """
    slopes = {trial.first: slope(trial.first)}
    if _near(c, slopes[trial.first], trial.tolerance):
        return None
    slopes |= {mu: slope(mu) for mu in trial.others}
    mus, count = sorted(slopes), trial.agreeing

    def doubt(some: Sequence[float]) -> float:
        values = [slopes[mu] for mu in some]
        return trial.doubt * (max(values) - min(values)) + trial.rounding * loss / some[0]

    best = min((mus[i : i + count] for i in range(len(mus) - count + 1)), key=doubt)
    said = sorted(slopes[mu] for mu in best)[count // 2]
    return None if _near(c, said, trial.tolerance, doubt(best)) else said


def _near(a: float, b: float, relative: float, absolute: float = 0.0) -> bool:
    # Written so that a difference that is not a number settles nothing, and contradicts nothing.
    return not abs(a - b) > relative * max(abs(a), abs(b)) + absolute


def _precision(model: nn.Module) -> torch.dtype:
    """The coarsest precision that a model may compute in; for integer weights that is unknown, and taken as coarse."""
    tensors = list(model.parameters())
    devices = {t.device.type for t in tensors} - {"meta"}
    autocast = {torch.get_autocast_dtype(device) for device in devices if torch.is_autocast_enabled(device)}
    used = {t.dtype for t in tensors} | autocast
    finer: set[torch.dtype] = set()
    for dtype in (torch.float64, torch.float32, torch.float16):
        finer = finer | {dtype}
        if used <= finer:
            return dtype
    return torch.bfloat16


class _Losing(TorchFunctionMode):
    """Names the functions that are given tangents and return floating-point numbers without one.

    That is right for some of torch's own (`detach`, `zeros_like`), and never for an operator that extends torch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.operators: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.is_floating_point()]
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_floating_point()]
        if made and all(tangent_of(t) is None for t in made) and any(tangent_of(t) is not None for t in given):
            extends = isinstance(func, (OpOverload, OpOverloadPacket)) and not str(func).startswith(("aten", "prim"))
            (self.operators if extends else self.names).add(str(func) if extends else resolve_name(func) or str(func))
        return result
