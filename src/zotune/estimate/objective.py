"""Objectives as closures: plain ones, ones that know their micro-batches, and ones that know their batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zotune.errors import UsageError
from zotune.estimate.determinism import note_evaluation, same_draws
from zotune.estimate.forward_mode.dual_numbers import dual, tangent_of
from zotune.estimate.mesh import ALONE_MESH, Mesh
from zotune.model.eager_mode import uncompiled
from zotune.model.shards import reshard, whole

Closure = Callable[[], "Tensor | float"]

_TOO_COARSE = (
    "the closure returned a {} loss, which is too coarse for differences of losses. Compute it in single precision, "
    "for instance loss_fn(model(x).float(), y)."
)


def evaluate(closure: Closure) -> float:
    """The objective's value as a double.

    Raises:
        TypeError: as `objective`.
    """
    return float(objective(closure))


def read(values: Sequence[Tensor | float]) -> list[float]:
    """Convert results of `objective` to numbers; the host waits for a GPU once, not once a value."""
    waiting = [value for value in values if isinstance(value, Tensor)]
    numbers = iter(torch.stack(waiting).tolist() if waiting else ())
    return [next(numbers) if isinstance(value, Tensor) else value for value in values]


def objective(closure: Closure) -> Tensor | float:
    """The objective's value as a double, in a tensor (float64, no dimension) only where it has to carry a tangent, or
    is on a GPU, for which the host would have to wait.

    Raises:
        TypeError: it is no number, or a half-precision one, whose differences are mostly rounding.
    """
    value = as_number(closure())
    note_evaluation()
    return value


def as_number(value: object) -> Tensor | float:
    """As `objective`, of a value that a closure has returned."""
    value = whole(value)
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise TypeError(f"the closure must return one number, got a tensor of shape {tuple(value.shape)}")
        if value.dtype in (torch.bfloat16, torch.float16):
            raise TypeError(_TOO_COARSE.format(value.dtype))
        if tangent_of(value) is not None:
            return value.cpu().double().reshape(())
        if value.is_cuda:
            return value.detach().to(torch.float64, copy=True).reshape(())
        return float(value.detach())
    if isinstance(value, np.float16):
        raise TypeError(_TOO_COARSE.format("numpy.float16"))
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
    mesh: Mesh = ALONE_MESH

    def __call__(self) -> Tensor | float:
        """The weighted mean of the parts, of which each process of the mesh evaluates its own."""
        mean: Tensor | float = self.mean([self._value(numbers) for numbers in self._numbers()])
        return mean

    def _numbers(self) -> Sequence[Sequence[Any]]:
        """Each part's value; where several processes share the parts, with its tangent and whether there is one."""

        def own(parts: Sequence[int]) -> list[list[Any]]:
            # Not `objective`, which notes the end of an evaluation: there is one, of all parts.
            values = [as_number(self.closures[i]()) for i in parts]
            return [[value] for value in values] if self.mesh.is_alone else list(map(value_and_tangent, values))

        return self.mesh.evaluate_parts(len(self.closures), 3, own)

    @staticmethod
    def _value(numbers: Sequence[Any]) -> Any:
        if len(numbers) == 1:
            return numbers[0]
        value, tangent, has_tangent = (torch.tensor(x, dtype=torch.float64) for x in numbers)
        return dual(value, tangent) if has_tangent else float(value)

    @property
    def whole(self) -> Accumulated:
        """The same objective, all of whose parts each process evaluates."""
        return Accumulated(self.closures, self.weights)

    def mean(self, values: Sequence[Any]) -> Any:
        """The weighted mean of the parts' values."""
        return sum(w * value for w, value in zip(self.weights, values, strict=True)) / sum(self.weights)


def value_and_tangent(value: Tensor | float) -> list[float]:
    """A number as `objective` gives it: its value, its tangent, and 1 where it has one, else 0."""
    tangent = tangent_of(value) if isinstance(value, Tensor) else None
    return [float(value), 0.0 if tangent is None else float(tangent), float(tangent is not None)]


def as_accumulated(closure: Closure) -> Accumulated:
    """Any objective as one of micro-batches: of a single one if it does not know its parts."""
    return closure if isinstance(closure, Accumulated) else Accumulated((closure,), (1.0,))


def accumulate(
    closures: Sequence[Closure], weights: Sequence[float] | None = None, *, mesh: Mesh = ALONE_MESH
) -> Accumulated:
    """The objective of a batch cut into micro-batches: the weighted mean of their objectives.

    Gradient accumulation for a zeroth-order method means to add up the *objective*, not updates: the
    closure returned here gives every probe the whole batch, one micro-batch at a time.

    Args:
        closures: one a micro-batch, each the mean loss of its examples.
        weights: how many examples (or tokens) each holds, numbers or tensors of one; equal by default. They are added
            up as doubles: of a tensor of another precision the whole objective would have that precision.
        mesh: the processes that share the micro-batches, see `zotune.mesh`. Each gives all closures, in one order, and
            calls its own.

    >>> accumulate([lambda: 1.0, lambda: 4.0], weights=[2, 1])()
    2.0
    """
    shares = [1.0] * len(closures) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(closures) or not closures:
        raise ValueError(f"one weight for each of at least one closure, got {len(closures)} and {len(shares)}")
    if not all(map(math.isfinite, shares)) or not sum(shares):
        raise ValueError(f"a weighted mean needs finite weights whose sum is not 0, got {shares}")
    if len(closures) < mesh.data:
        raise UsageError(
            f"{mesh.data} processes cannot share a batch in {len(closures)}: cut it into {mesh.data} micro-batches or "
            "more, or let some of the processes share the directions (query=…)."
        )
    return Accumulated(tuple(closures), tuple(shares), mesh)


@dataclass(frozen=True)
class Batched:
    """An objective whose probes may share a forward pass.

    Attributes:
        value: the objective's value, shape (), computed by torch functions alone; given the number of probes that
            share the pass, which matters to a counter of passes, not to the value.
        most: how many probes may share a pass.
        name: names the objective among those over the same model.
    """

    value: Callable[[int], Tensor]
    most: int = 2
    name: str = "objective"

    def __call__(self) -> Tensor:
        """The objective."""
        return self.value(1)

    def values(self, copies: int) -> Tensor:
        """The objective's value in each of several copies that meet the same weights: shape (copies,)."""
        return self.value(copies).expand(copies)


def batched(losses: Callable[..., Tensor], *inputs: Tensor, most: int = 2) -> Batched:
    """The mean of a batch's losses as an objective whose probes run side by side: faster, with the same result.

    A probe's two ends read each weight and make each direction once, and a small adapter's copies are one product.
    torch follows through the forward pass what differs between the ends. Where the losses need a number of one end
    alone (`.item()`, a condition on a tensor, rows chosen by a tensor, as mixtures of experts do), the probes of these
    losses run one after the other, and a warning gives the reason once.

    Args:
        losses: given the inputs, the loss of each example: shape (batch,), single precision or better.
        inputs: tensors with the examples along their first dimension.
        most: how many probes may share a pass; more than two only for an adapter that is small, or directions of low
            rank.

    Raises:
        ValueError: the inputs differ in length (when called: the losses do).

    >>> model, x, y = nn.Linear(3, 1), torch.randn(8, 3), torch.zeros(8, 1)
    >>> f = batched(lambda x, y: (model(x) - y).square().mean(dim=1), x, y)
    >>> bool(torch.allclose(f(), nn.functional.mse_loss(model(x), y).double()))
    True
    """
    lengths = {len(x) for x in inputs}
    if len(lengths) != 1:
        raise ValueError(f"the inputs must hold the same examples along their first dimension, got {sorted(lengths)}")
    (length,) = lengths

    def value(_: int) -> Tensor:
        found = losses(*inputs)
        if found.shape != (length,):
            raise ValueError(
                f"the losses of {length} examples must have shape ({length},), got {tuple(found.shape)}: one number an "
                "example, as with reduction='none'."
            )
        if found.dtype in (torch.bfloat16, torch.float16):
            return found.mean()  # which is refused as too coarse, with what to do
        return found.double().mean()

    return Batched(value, most, name_of(losses))


def name_of(function: Callable[..., Any]) -> str:
    """A name of a function that is the same in another process: its module, its place there, and its line."""
    while isinstance(function, partial):
        function = function.func
    code = getattr(function, "__code__", None)
    kind = function if hasattr(function, "__qualname__") else type(function)
    return f"{kind.__module__}.{kind.__qualname__}" + ("" if code is None else f":{code.co_firstlineno}")


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """A context without autograd and compiled code, all modules in eval mode: the objective depends on x alone.

    Raises:
        UsageError: on leaving, if its evaluations drew different random numbers.
    """
    reshard(model)  # what FSDP2 has gathered may be weights from before an update
    in_training = [module for module in model.modules() if module.training]
    try:
        for module in in_training:
            module.training = False
        with torch.no_grad(), uncompiled(), same_draws():
            yield
    finally:
        for module in in_training:
            module.training = True
