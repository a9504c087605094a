"""Samplers that are renewed as a run goes on, and which of them serves which step.

A mask that stays for some steps, or a factor that directions share for a while, belongs to a run and a step, not to
one direction. What a step draws from is a function of the run's seed and the step's number (and of weights, where
masks follow them), so that a run that is resumed, and a ledger that is replayed, have the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from zotune.directions.direction import Sampler
from zotune.model.parameters import TunedTensor, TunedTensors

# A tensor to its numbers.
Weights = Callable[[TunedTensor], Tensor]


@runtime_checkable
class SamplerOfAStep(Sampler, Protocol):
    """What a `Renewed` sampler is at one step."""

    def state(self) -> dict[str, Any]:
        """What `Renewed.restored` makes this sampler from, in plain values."""


class Renewed(ABC):
    """A sampler that is renewed as a run goes on.

    Attributes:
        base: the sampler that it is made from.
    """

    base: Sampler | Renewed

    @abstractmethod
    def at(
        self, tuned: TunedTensors, seed: int, step: int, before: Any = None, weights: Weights = TunedTensor.storage
    ) -> Sampler:
        """The sampler of one step of the run that `seed` names. `before` is that of an earlier step, if there was one.

        `weights` gives a tensor's numbers, where the model itself does not hold them.
        """

    @abstractmethod
    def restored(self, tuned: TunedTensors, seed: int, state: dict[str, Any]) -> Sampler:
        """The sampler that `SamplerOfAStep.state` describes."""

    @property
    @abstractmethod
    def constants(self) -> dict[str, Any]:
        """All that its directions depend on besides its base and the run's seed, in plain values; for ledgers."""

    @property
    def depends_on_weights(self) -> bool:
        """Whether a direction can be made again only with the weights as they were."""
        return isinstance(self.base, Renewed) and self.base.depends_on_weights


AnySampler = Sampler | Renewed


def at_step(
    sampler: AnySampler,
    tuned: TunedTensors,
    seed: int,
    step: int,
    before: Any = None,
    weights: Weights = TunedTensor.storage,
) -> Sampler:
    """As `Renewed.at`; a sampler that is always the same is that of every step."""
    return sampler.at(tuned, seed, step, before, weights) if isinstance(sampler, Renewed) else sampler


def restored(sampler: AnySampler, tuned: TunedTensors, seed: int, state: Any) -> Sampler:
    """As `Renewed.restored`; a sampler that is always the same has no state."""
    return sampler.restored(tuned, seed, state) if isinstance(sampler, Renewed) else sampler


def state_of(sampler: Sampler | None) -> dict[str, Any] | None:
    """The state of a step's sampler; None where it has none."""
    return sampler.state() if isinstance(sampler, SamplerOfAStep) else None


class StepSampler:
    """The sampler of each step of a run."""

    def __init__(self, tuned: TunedTensors, sampler: AnySampler) -> None:
        self._tuned, self._sampler = tuned, sampler
        self._last: Sampler | None = None

    def begin(self, seed: int, weights: Weights) -> None:
        """Make the first step's mask with the numbers that `weights` gives, where the model does not hold them."""
        self._last = at_step(self._sampler, self._tuned, seed, 0, None, weights)

    def at(self, seed: int, step: int) -> Sampler:
        """The sampler of a step of the run that `seed` names."""
        self._last = at_step(self._sampler, self._tuned, seed, step, self._last)
        return self._last

    def of(self, seed: int, state: Any) -> Sampler:
        """The sampler of an earlier step, from its state."""
        return restored(self._sampler, self._tuned, seed, state)

    def state(self) -> dict[str, Any] | None:
        """What the coming steps' samplers depend on besides the seed; None where there is nothing of the kind."""
        return state_of(self._last)

    def load(self, seed: int, state: dict[str, Any] | None) -> None:
        """Go on from `state`."""
        self._last = None if state is None else restored(self._sampler, self._tuned, seed, state)
