"""Objectives that are a mean over examples, each of which is computed alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from zotune.estimate.copies import each_copy, with_copies
from zotune.estimate.objective import name_of


class EachRow(Protocol):
    """A computation of each of some rows alone, at one or several points of the weights."""

    def __call__(self, compute: Callable[..., Tensor], inputs: Sequence[Tensor], owners: Sequence[int]) -> Tensor:
        """Return the results of all rows at all points: (points, rows, *shape of one).

        Args:
            compute: given each input's part for one row, with a first dimension of 1, the row's result. It is called
                once for all rows, as under `torch.func.vmap`.
            inputs: tensors with the rows along their first dimension.
            owners: the example that each row belongs to; rows of one example are neighbours.
        """


@dataclass(frozen=True)
class PerExample:
    """The weighted mean of examples' losses, of which each can be computed without the others.

    Attributes:
        losses: given how rows are computed, the losses of all examples: (points, examples).
        weights: of each example in the mean; positive.
        mean: the objective itself.
        most: how many points may share a pass.
        name: names the objective among those over the same model.
    """

    losses: Callable[[EachRow], Tensor]
    weights: tuple[float, ...]
    mean: Callable[[], Tensor]
    most: int = 2
    name: str = "objective"

    def __call__(self) -> Tensor:
        """The objective."""
        return self.mean()

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.weights)


def per_example(losses: Callable[..., Tensor], *inputs: Tensor) -> PerExample:
    """The mean of a batch's losses as an objective for `directions_per_batch`: one direction an example.

    The loss of an example is a function of that example alone, because `losses` is given one at a time: it runs once
    under `torch.func.vmap`, which defines every operation as a loop over the examples, or refuses. So a normalisation
    over the batch or other examples as negatives cannot mix the examples: they would see a batch of one.

    Args:
        losses: given each input's part for one example, with a first dimension of 1, the loss of the example: shape
            (1,), single precision or better.
        inputs: tensors with the examples along their first dimension.

    Raises:
        ValueError: the inputs differ in length (when called: the losses have another shape).

    >>> import zotune as zo
    >>> model, x, y = torch.nn.Linear(3, 1), torch.randn(8, 3), torch.zeros(8, 1)
    >>> f = per_example(lambda x, y: (model(x) - y).square().mean(dim=1), x, y)
    >>> opt = zo.zo_sgd(model, lr=0.05, sampler=zo.low_rank(zo.rademacher), directions_per_batch=8)
    >>> values = [opt.step(f) for _ in range(100)]
    >>> values[-1] < values[0], opt.num_forwards
    (True, 200)
    """
    lengths = {len(x) for x in inputs}
    if len(lengths) != 1:
        raise ValueError(f"the inputs must hold the same examples along their first dimension, got {sorted(lengths)}")
    (length,) = lengths

    def loss(*one: Tensor) -> Tensor:
        found = losses(*one)
        if found.shape != (1,):
            raise ValueError(
                f"the loss of one example must have shape (1,), got {tuple(found.shape)}: one number an example, as "
                "with reduction='none'."
            )
        if found.dtype in (torch.bfloat16, torch.float16):
            raise TypeError(
                f"the losses are in {found.dtype}, which is too coarse for their differences. Compute them in single "
                "precision, for instance loss_fn(model(x).float(), y)."
            )
        return found.double()[0]

    def all_losses(each: EachRow) -> Tensor:
        return each(loss, inputs, range(length))

    def mean() -> Tensor:
        return all_losses(unperturbed)[0].mean()

    return PerExample(all_losses, (1.0,) * length, mean, name=name_of(losses))


def unperturbed(compute: Callable[..., Tensor], inputs: Sequence[Tensor], owners: Sequence[int]) -> Tensor:
    """As `EachRow`, at the weights as they are.

    >>> unperturbed(lambda x: x.sum(), [torch.tensor([[1.0, 2.0], [3.0, 4.0]])], [0, 1])
    tensor([[3., 7.]])
    """
    return each_copy(lambda level: compute(*(with_copies(x[:, None], level) for x in inputs)), len(owners))[None]
