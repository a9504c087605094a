"""The forward gradient, checked before it is trusted.

An operation that torch does not know how to differentiate (a kernel for quantised weights, a custom operator, a
`detach`) may drop tangents without a word: the loss is right and its derivative is wrong, often zero. So the first
coefficient is compared with central differences along the same direction. In half precision these are too noisy with
many tuned weights, so the operations that drop tangents are found and each kind is judged by its effect: what `detach`
cuts is passed on in a second pass, and numbers that leave torch are changed in another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves, tree_map

from zotune.directions.direction import Direction
from zotune.errors import UsageError
from zotune.estimate.estimate import GradientEstimate
from zotune.estimate.finite_difference import central_difference
from zotune.estimate.forward_mode.dual_numbers import tangent_of
from zotune.estimate.forward_mode.jvp import forward_gradient
from zotune.estimate.objective import Accumulated, Closure, objective, probing
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


# In half precision differences only judge a coefficient of zero, and all five are to agree: where μ is large enough for
# rounding, a large model may be far from linear, and then some three of five lie together by chance.
_TRIALS = {
    torch.float64: Trial(1e-4, (1.6e-3, 4e-4, 2.5e-5, 6.25e-6), 1e-14, 0.01),
    torch.float32: Trial(1e-3, (1.6e-2, 4e-3, 2.5e-4, 6.25e-5), 2e-7, 0.03),
    torch.float16: Trial(1e-2, (4e-2, 2e-2, 5e-3, 2.5e-3), 1e-4, 0.2, agreeing=5, doubt=2.0),
    torch.bfloat16: Trial(1e-2, (4e-2, 2e-2, 5e-3, 2.5e-3), 5e-4, 0.25, agreeing=5, doubt=2.0),
}


class CheckedForwardGradient:
    """`forward_gradient`, whose first estimate is checked along its first direction.

    In single and double precision it is compared with central differences. That takes two further forward passes,
    once; eight more where they leave a doubt. A mismatch must exceed what rounding and curvature explain, which is
    judged by how far differences with several μ agree with one another. In half precision a further pass is taken only
    where the objective calls `detach`, two where numbers leave torch (`item`), and differences only where the
    coefficient is zero. An operator that extends torch (a kernel for quantised weights) and drops tangents is refused
    by name in any precision. The passes are no part of the estimate, whose `num_forwards` does not count them.

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

    passes, cost = (1, 0), 2

    def __init__(self) -> None:
        self._is_checked = False

    def __call__(self, closure: Closure, tuned: ParameterSet, directions: Sequence[Direction]) -> GradientEstimate:
        """As `forward_gradient`."""
        if self._is_checked:
            return forward_gradient(closure, tuned, directions)
        # Of several processes each checks the whole objective, so that all find the same.
        closure = closure.whole if isinstance(closure, Accumulated) else closure
        with _Losing() as lost:
            estimate = forward_gradient(_followed(closure, lost), tuned, directions)
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
    precision = precision_of(tuned.model)
    if not is_compared(precision) and c != 0:
        said = _without_cuts(closure, tuned, u, c, abs(estimate.loss), precision) if lost.cuts else None
        said = "it depends on numbers that left torch" if lost.numbers and _reads_numbers(closure, tuned) else said
        if said is not None:
            raise UsageError(
                f"the forward gradient's coefficient is {c:.4g}, but {said}: the loss depends on the weights in ways "
                f"that forward-mode differentiation does not see. Tangents end in: {', '.join(sorted(lost.names))}. "
                f"{remedy}"
            )
        return

    def slope(mu: float) -> float:
        return central_difference(closure, tuned, [u], mu=mu).terms[0][0]

    found = contradicted(c, slope, estimate.loss, tuned.model)
    if found is not None:
        where = f" Tangents end in: {', '.join(sorted(lost.names))}." if lost.names else ""
        raise UsageError(
            f"the forward gradient's coefficient is {c:.4g}, but differences of the loss say {found:.4g}: the loss "
            f"depends on the weights in ways that forward-mode differentiation does not see.{where} Usual reasons are "
            "quantised weights, operators without a derivative, .detach(), and a loss that is not a function of the "
            f"weights alone. {remedy}"
        )


def is_compared(precision: torch.dtype) -> bool:
    """Whether differences of the loss are sharp enough in a precision to judge a coefficient."""
    return precision in (torch.float32, torch.float64)


def _without_cuts(
    closure: Closure, tuned: ParameterSet, u: Direction, c: float, loss: float, precision: torch.dtype
) -> str | None:
    """What the coefficient would be if `detach` passed tangents on, if that is another one; else None."""
    with _PassingOn():
        found = forward_gradient(closure, tuned, [u]).terms[0][0]
    trial = _TRIALS[precision]
    if _near(c, found, trial.tolerance, trial.rounding * loss / trial.first):
        return None
    return f"{found:.4g} with what .detach() or .data cuts off"


def _reads_numbers(closure: Closure, tuned: ParameterSet) -> bool:
    """Whether the loss changes if the numbers that leave torch do; numbers that are only reported change nothing."""

    def value(function: Closure) -> float:
        with probing(tuned.model):
            return float(objective(function))

    plain = value(closure)
    with _Scaling() as scaling:
        scaled = value(_followed(closure, scaling))
    return isfinite(plain) and not _near(plain, scaled, 1e-6)


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


def contradicted(c: float, slope: Callable[[float], float], loss: float, model: nn.Module) -> float | None:
    """As `contradiction`, in the precision of a model; one whose differences are compared."""
    return contradiction(c, slope, abs(loss), _TRIALS[precision_of(model)])


def _near(a: float, b: float, relative: float, absolute: float = 0.0) -> bool:
    # Written so that a difference that is not a number settles nothing, and contradicts nothing.
    return not abs(a - b) > relative * max(abs(a), abs(b)) + absolute


def precision_of(model: nn.Module) -> torch.dtype:
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


class _Following(TorchFunctionMode):
    """Knows whether a call comes from the objective's closure, and not from what reads its value."""

    is_inside = False


def _followed(closure: Closure, mode: _Following) -> Closure:
    """Return the closure as one whose calls the mode knows."""
    if isinstance(closure, Accumulated):
        return Accumulated(tuple(_followed(part, mode) for part in closure.closures), closure.weights)

    def inside() -> Any:
        mode.is_inside = True
        try:
            return closure()
        finally:
            mode.is_inside = False

    return inside


class _Losing(_Following):
    """Names the functions that are given tangents and return floating-point numbers without one.

    That is right for some of torch's own (`zeros_like`, `sign`), may be wrong for those that cut (`detach`) or return
    numbers of Python (`item`), and is never right for an operator that extends torch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.operators: set[str] = set()
        self.cuts = self.numbers = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.is_floating_point()]
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_floating_point()]
        is_number = self.is_inside and func in _TO_NUMBERS
        if "_unpack_dual" in str(func):  # our own rules look at tangents
            return result
        if not (made or is_number) or all(tangent_of(t) is None for t in given):
            return result
        if is_number or all(tangent_of(t) is None for t in made):
            self.cuts, self.numbers = self.cuts or func in _CUTS, self.numbers or is_number
            extends = isinstance(func, (OpOverload, OpOverloadPacket)) and not str(func).startswith(("aten", "prim"))
            (self.operators if extends else self.names).add(str(func) if extends else resolve_name(func) or str(func))
        return result


_CUTS: set[Any] = {torch.detach, Tensor.detach, Tensor.detach_, Tensor.data.__get__}  # type: ignore[attr-defined]
_TO_NUMBERS: set[Any] = {Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__float__, Tensor.__array__}


class _PassingOn(TorchFunctionMode):
    """Within this context `detach` returns a tensor with its tangent."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        cuts = func in _CUTS and isinstance(args[0], Tensor) and tangent_of(args[0]) is not None
        return args[0].view_as(args[0]) if cuts else func(*args, **(kwargs or {}))


class _Scaling(_Following):
    """Within this context the numbers that leave torch are larger by an eighth."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        is_number = (
            self.is_inside and func in _TO_NUMBERS and isinstance(args[0], Tensor) and args[0].is_floating_point()
        )
        return tree_map(lambda number: number * 1.125, result) if is_number else result
