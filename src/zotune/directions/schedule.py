"""Samplers that change as a run goes on, and the choice of the sampler for each step.

A mask that stays for some steps, or a factor that directions share for a while, belongs to a run and a step, not to
one direction. What a step draws from is a function of the run's seed and the step's number (and of weights, where
masks follow them), so that a run that is resumed, and a ledger that is replayed, have the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from zotune.directions.samplers import Sampler
from zotune.errors import UsageError
from zotune.model.parameters import ParameterSet, TunedTensor

# A tensor to its numbers.
Weights = Callable[[TunedTensor], Tensor]
Value = TypeVar("Value")


@runtime_checkable
class StatefulSampler(Sampler, Protocol):
    """The sampler of one step of a `ScheduledSampler`, with a state that restores it."""

    def state(self) -> dict[str, Any]:
        """The plain values from which `ScheduledSampler.restored` makes this sampler again."""


class ScheduledSampler(ABC):
    """A sampler that changes as a run goes on: `at` gives the sampler of each step.

    Attributes:
        base: the sampler that it is made from.
    """

    base: Sampler | ScheduledSampler

    @abstractmethod
    def at(
        self, tuned: ParameterSet, seed: int, step: int, before: Any = None, weights: Weights = TunedTensor.numbers
    ) -> Sampler:
        """The sampler of one step of the run with this `seed`; `before` is the sampler of an earlier step, if there was
        one.

        `weights` gives a tensor's numbers, where the model itself does not hold them.
        """

    @abstractmethod
    def restored(self, tuned: ParameterSet, seed: int, state: dict[str, Any]) -> Sampler:
        """The sampler whose `StatefulSampler.state` is given."""

    @property
    @abstractmethod
    def constants(self) -> dict[str, Any]:
        """The constants that the directions depend on besides the base and the run's seed, in plain values; for
        ledgers.
        """

    @property
    def depends_on_weights(self) -> bool:
        """Whether a direction can be made again only with the weights as they were."""
        return depends_on_weights(self.base)


class FixedSampler(ScheduledSampler):
    """A sampler that is made for the tuned tensors of a run, and stays as it is."""

    @abstractmethod
    def of(self, tuned: ParameterSet) -> Sampler:
        """The sampler of every step.

        Raises:
            UsageError: it does not fit the tensors.
        """

    def at(
        self, tuned: ParameterSet, seed: int, step: int, before: Any = None, weights: Weights = TunedTensor.numbers
    ) -> Sampler:
        """As `ScheduledSampler.at`."""
        return self.of(tuned) if before is None else before

    def restored(self, tuned: ParameterSet, seed: int, state: dict[str, Any]) -> Sampler:
        """As `ScheduledSampler.restored`."""
        return self.of(tuned)


def by_tensor(tuned: ParameterSet, given: Mapping[str, Value], what: str) -> Iterator[tuple[TunedTensor, Value]]:
    """Yield the tuned tensor of each name, and its value; `what` names the values in errors.

    Raises:
        UsageError: no tuned tensor has the name.
    """
    for name, value in given.items():
        tensor = tuned.named(name)
        if tensor is None:
            raise UsageError(f"{what}: no tuned tensor is called {name!r}, so what was given for it has no effect.")
        yield tensor, value


AnySampler = Sampler | ScheduledSampler


def at_step(
    sampler: AnySampler,
    tuned: ParameterSet,
    seed: int,
    step: int,
    before: Any = None,
    weights: Weights = TunedTensor.numbers,
) -> Sampler:
    """As `ScheduledSampler.at`; a sampler that is always the same is that of every step."""
    return sampler.at(tuned, seed, step, before, weights) if isinstance(sampler, ScheduledSampler) else sampler


def restored(sampler: AnySampler, tuned: ParameterSet, seed: int, state: Any) -> Sampler:
    """As `ScheduledSampler.restored`; a sampler that is always the same has no state."""
    return sampler.restored(tuned, seed, state) if isinstance(sampler, ScheduledSampler) else sampler


def state_of(sampler: Sampler | None) -> dict[str, Any] | None:
    """The state of a step's sampler; None where it has none."""
    return sampler.state() if isinstance(sampler, StatefulSampler) else None


def depends_on_weights(sampler: AnySampler) -> bool:
    """Whether a sampler's directions can be made again only with the weights as they were."""
    return isinstance(sampler, ScheduledSampler) and sampler.depends_on_weights


def description_of(sampler: AnySampler) -> Any:
    """A sampler in plain values, for ledgers: its name, or its base and constants."""
    if isinstance(sampler, ScheduledSampler):
        return {"base": description_of(sampler.base), **sampler.constants}
    return repr(sampler)


class SamplerState:
    """The sampler of each step of a run."""

    def __init__(self, tuned: ParameterSet, sampler: AnySampler) -> None:
        self._tuned, self._sampler = tuned, sampler
        self._last: Sampler | None = None

    def begin(self, seed: int, weights: Weights) -> None:
        """Make the first step's sampler from the numbers that `weights` returns; the model need not hold them."""
        self._last = at_step(self._sampler, self._tuned, seed, 0, None, weights)

    def at(self, seed: int, step: int) -> Sampler:
        """The sampler of a step of the run with this seed."""
        self._last = at_step(self._sampler, self._tuned, seed, step, self._last)
        return self._last

    def of(self, seed: int, state: Any) -> Sampler:
        """The sampler of an earlier step, from its state."""
        return restored(self._sampler, self._tuned, seed, state)

    def state(self) -> dict[str, Any] | None:
        """The state that later samplers depend on besides the seed; None if there is none."""
        return state_of(self._last)

    def load(self, seed: int, state: dict[str, Any] | None) -> None:
        """Continue from a saved `state`."""
        self._last = None if state is None else restored(self._sampler, self._tuned, seed, state)
