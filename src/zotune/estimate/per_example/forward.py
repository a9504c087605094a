r"""Forward gradients with one tangent an example, or a group of examples, in the one dual pass of a direction.

    c_g = ∇F_g · u_g,  F_g(x) = Σ_{i in group g} wᵢ ℓᵢ(x)        exact, from the examples' own derivatives
    ĝ = Σ_g c_g u_g                                             E[ĝ] = Σ_g ∇F_g = ∇f

The rows run as copies of the computation, as for differences, and each copy's tuned tensors are dual: x with the
tangent u_g of the row's group. The copies are the outer transformation, so torch's rules for derivatives see plain
tensors with the rows stacked. Each row has copies of what is tuned, so this is for small tuned sets.
Source: as `zotune.estimate.per_example.difference` and `zotune.estimate.forward_mode.jvp`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from zotune.directions.direction import Direction
from zotune.errors import UnreadTensorError, UsageError
from zotune.estimate.copies import each_copy, with_copies
from zotune.estimate.forward_mode.dual_numbers import dual, unpack
from zotune.estimate.forward_mode.gradient_check import contradicted, is_compared, precision_of
from zotune.estimate.forward_mode.jvp import explained, refuse_compiled
from zotune.estimate.per_example.estimator import Examples, PerExampleEstimator, Probes
from zotune.estimate.per_example.objective import PerExample
from zotune.estimate.per_example.weights import each_alone
from zotune.estimate.perturb import OffsetAlong, nbytes
from zotune.model.intercept import ParameterInterceptor
from zotune.model.parameters import ParameterSet, TunedTensor
from zotune.system import limits


class each_dual(ParameterInterceptor):  # noqa: N801 - named as `each_alone`
    """Each row of a batch with tangents of its own: an `EachRow` of one point, whose results are dual numbers.

    It belongs into a `torch.autograd.forward_ad.dual_level()`.

    Args:
        tuned: the tuned tensors of a model.
        directions: u_g of each group, over the same tensors.
        groups: the group of each example.

    Raises:
        UsageError: copies of tensors, one a row, would take more than 256 MiB.
    """

    def __init__(self, tuned: ParameterSet, directions: Sequence[Direction], groups: Sequence[int]) -> None:
        super().__init__(tuned, directions[0].tensors)
        self._directions, self._groups = directions, groups
        self._of_rows: Sequence[int] = ()
        self._level = 0

    def __call__(self, compute: Callable[..., Tensor], inputs: Sequence[Tensor], owners: Sequence[int]) -> Tensor:
        """As `EachRow`.

        Raises:
            UsageError: the computation has no meaning for each row alone, or no derivative.
            UnreadTensorError: a chosen tensor was not read.
        """
        self._of_rows = [self._groups[owner] for owner in owners]
        needed = 2 * nbytes(self.tuned, self.chosen) * len(self._of_rows)
        if needed > limits.EXAMPLE_BYTES:
            raise UsageError(
                f"{len(self._of_rows)} rows would take {needed >> 20} MiB of copies of what is tuned and of its "
                f"tangents, above {limits.EXAMPLE_BYTES >> 20} MiB. Tune fewer numbers, take smaller micro-batches, "
                "or take differences of losses (zo_sgd) along directions of low rank."
            )

        def rows(level: int) -> Tensor:
            self._level = level
            with self:
                return compute(*(with_copies(x[:, None], level) for x in inputs))

        try:
            with explained():
                return each_copy(rows, len(owners))[None]
        except (UsageError, UnreadTensorError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            raise UsageError(
                "one direction an example needs each example's loss without the others, which this objective does not "
                f"give: {str(error).splitlines()[0]}. Leave directions_per_batch out."
            ) from error

    def read(self, tensor: TunedTensor, value: Tensor) -> Tensor:
        """The tensor with each row's tangent, which is made once a group."""
        used = sorted(set(self._of_rows))
        made = torch.zeros((len(used), value.numel()), dtype=value.dtype, device=value.device)
        for out, group in zip(made, used, strict=True):
            OffsetAlong(self._directions[group], 1.0).move(out, out, tensor, 0)
        place = {group: i for i, group in enumerate(used)}
        index = torch.tensor([place[group] for group in self._of_rows], device=value.device)
        tangents = made[index].view(-1, *value.shape)
        # A dual tensor of memory that several elements share is refused by torch.
        return with_copies(dual(value.detach().expand(tangents.shape).clone(), tangents), self._level)


@dataclass(frozen=True)
class PerExampleForwardGradient(PerExampleEstimator):
    """Exact slopes of each example's loss along the direction of its group; single and double precision.

    The first slopes are compared with central differences, as those of `CheckedForwardGradient`: two further passes.
    """

    _checked: list[bool] = field(default_factory=list, compare=False, repr=False)

    passes, cost = (1, 0), 2

    @property
    def constants(self) -> dict[str, Any]:
        """As `PerExampleEstimator.constants`."""
        return {"directions": self.directions}

    def measured(
        self, examples: Examples, tuned: ParameterSet, runs: Sequence[Sequence[Direction]], groups: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
        """As `PerExampleEstimator.measured`.

        Raises:
            UsageError: an operation has no forward-mode derivative or drops tangents, or the model is compiled, cut by
                a tensor-parallel plan, or in half precision.
        """
        _check_model(tuned)

        def measure(part: PerExample, run: Sequence[Direction], groups: Sequence[int]) -> Tensor:
            with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
                primal, tangent = unpack(part.losses(each_dual(tuned, run, groups)))
            return torch.cat([primal, torch.zeros_like(primal) if tangent is None else tangent])

        found, _ = Probes(examples, runs, groups, 2, measure).take(with_base=False)
        losses, slopes = found[0, 0], found[:, 1]
        if not self._checked and np.isfinite(found).all():
            _check(examples, tuned, runs[0], groups, slopes[0], losses)
            self._checked.append(True)
        return slopes, losses, len(runs)


def _check_model(tuned: ParameterSet) -> None:
    refuse_compiled(tuned.model)
    if tuned.is_tensor_parallel or not is_compared(precision_of(tuned.model)):
        raise UsageError(
            "forward gradients with a tangent an example are for models in single or double precision that one process "
            "holds. Use differences of losses (zo_sgd), --dtype float32, or leave directions_per_batch out."
        )


def _check(
    examples: Examples,
    tuned: ParameterSet,
    run: Sequence[Direction],
    groups: NDArray[np.int64],
    slopes: NDArray[np.float64],
    losses: NDArray[np.float64],
) -> None:
    """Compare the slope of the mean loss, each example along its own direction, with differences."""

    def slope(mu: float) -> float:
        def ends(part: PerExample, run: Sequence[Direction], groups: Sequence[int]) -> Tensor:
            return torch.cat([part.losses(each_alone(tuned, run, groups, [a])) for a in (mu, -mu)])

        found, _ = Probes(examples, [run], groups, 2, ends).take(with_base=False)
        return float((found[0, 0] - found[0, 1]) @ examples.weights) / (2 * mu)

    c, loss = float(slopes @ examples.weights), float(losses @ examples.weights)
    said = contradicted(c, slope, loss, tuned.model)
    if said is not None:
        raise UsageError(
            f"the examples' forward gradients add up to {c:.4g}, but differences of their losses say {said:.4g}: the "
            "losses depend on the weights in ways that forward-mode differentiation does not see (detach, a number "
            "read off a tensor, a kernel). Use zo_sgd, whose differences need no derivative."
        )
