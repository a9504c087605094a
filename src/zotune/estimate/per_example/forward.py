r"""Forward gradients with one tangent an example, or a group of examples, in one dual pass.

    c_g = ∇F_g · u_g,  F_g(x) = Σ_{i in group g} wᵢ ℓᵢ(x)        exact, from the examples' own derivatives
    ĝ = Σ_g c_g u_g                                             E[ĝ] = Σ_g ∇F_g = ∇f

The rows run as copies of the computation, as for differences, and each copy's tuned tensors have the tangents of its
own group. Source: as `zotune.estimate.per_example.difference` and `zotune.estimate.forward_mode.jvp`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from zotune.directions.direction import Direction
from zotune.estimate.copies import each_copy, with_copies
from zotune.estimate.forward_mode.dual_numbers import dual, unpack
from zotune.estimate.perturb import OffsetAlong
from zotune.model.intercept import ParameterInterceptor
from zotune.model.parameters import ParameterSet, TunedTensor


class each_dual(ParameterInterceptor):  # noqa: N801 - named as `each_alone`
    """Each row of a batch with tangents of its own: an `EachRow` whose points are the value and the derivative.

    Args:
        tuned: the tuned tensors of a model.
        directions: u_g of each group, over the same tensors.
        groups: the group of each example.
    """

    def __init__(self, tuned: ParameterSet, directions: Sequence[Direction], groups: Sequence[int]) -> None:
        super().__init__(tuned, directions[0].tensors)
        self._directions, self._groups = directions, groups
        self._of_rows: Sequence[int] = ()
        self._level = 0

    def __call__(self, compute: Callable[..., Tensor], inputs: Sequence[Tensor], owners: Sequence[int]) -> Tensor:
        """As `EachRow`: (2, rows, …)."""
        self._of_rows = [self._groups[owner] for owner in owners]

        def rows(level: int) -> Tensor:
            self._level = level
            with self:
                return compute(*(with_copies(x[:, None], level) for x in inputs))

        # The copies are outermost, so that torch's rules for derivatives see plain tensors with the rows stacked.
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            primal, tangent = unpack(each_copy(rows, len(owners)))
        return torch.stack([primal, torch.zeros_like(primal) if tangent is None else tangent])

    def read(self, tensor: TunedTensor, value: Tensor) -> Tensor:
        """The tensor with each row's tangent."""
        used = sorted(set(self._of_rows))
        made = torch.zeros((len(used), value.numel()), dtype=value.dtype, device=value.device)
        for out, group in zip(made, used, strict=True):
            OffsetAlong(self._directions[group], 1.0).move(out, out, tensor, 0)
        place = {group: i for i, group in enumerate(used)}
        index = torch.tensor([place[group] for group in self._of_rows], device=value.device)
        tangents = made[index].view(-1, *value.shape)
        return with_copies(dual(value.detach().expand(tangents.shape).clone(), tangents), self._level)
