"""Directions whose elements are scaled by numbers of an optimizer's state: u = H^-½ z."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from zotune.directions.samplers import Sampler

# The state H of a tensor, by its id; None where it is 1 everywhere.
Curvatures = Callable[[int], Tensor | None]


def _none(tensor_id: int) -> None:
    return None


@dataclass
class Link:
    """Where a sampler finds the state that scales its directions; it is set when the optimizer is complete."""

    curvatures: Curvatures = _none


@dataclass(frozen=True)
class ScaledSampler:
    """The noise of `base` by the root of a state of the optimizer.

    A direction belongs to the state at the time of its use, so it can be made again only for the next step.
    """

    base: Sampler
    link: Link = field(compare=False)

    def fill(self, out: Tensor, seed: int, tensor_id: int, start: int) -> None:
        """As `Sampler.fill`."""
        self.base.fill(out, seed, tensor_id, start)
        state = self.link.curvatures(tensor_id)
        if state is not None:
            own = state.view(-1)[start : start + out.numel()].double()
            out.copy_(out.double() / own.sqrt())

    def __repr__(self) -> str:
        return f"scaled({self.base!r})"


def base_of(sampler: Sampler) -> Sampler:
    """The sampler of the noise that a direction is made of."""
    return sampler.base if isinstance(sampler, ScaledSampler) else sampler
