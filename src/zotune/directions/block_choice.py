"""Block coordinates: each step estimates and moves one block, chosen by turns, at random, or by what earlier steps
found.

A choice follows from the run's seed, the step's number and the coefficients of earlier steps, so that a run that is
resumed and a ledger that is replayed choose the same blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from zotune.directions.blocks import Block, Blocks, check_partition
from zotune.directions.direction import Terms
from zotune.model.parameters import ParameterSet
from zotune.noise import derive_seed

# The name of the choices' seeds among what is derived from a run's seed.
_PURPOSE = 8


class Choice(StrEnum):
    """How the block of a step is chosen: by turns (`CYCLIC`), each with the same probability (`RANDOM`), or those with
    large coefficients more often (`ADAPTIVE`).
    """

    CYCLIC = "cyclic"
    RANDOM = "random"
    ADAPTIVE = "adaptive"


class ActiveBlocks(Protocol):
    """The blocks that each step of a run estimates, of all blocks of a partition. A shallow copy stays as it is."""

    blocks: tuple[Block | None, ...]

    def at(self, seed: int, step: int) -> tuple[Block | None, ...]:
        """The blocks of a step of the run with this seed."""

    def weight(self, seed: int, step: int) -> float:
        """What the coefficients of a step are multiplied by before they are applied."""

    def observe(self, terms: Terms) -> None:
        """Take note of the terms of a step that was taken."""

    @property
    def constants(self) -> dict[str, Any] | None:
        """What a replay needs to make the same choices, in plain values; None where there is none."""

    def state(self) -> Any:
        """What later choices depend on besides the seed, in plain values."""

    def load(self, state: Any) -> None:
        """Continue from a saved `state`."""


class EveryBlock:
    """Each step estimates all blocks."""

    constants = None

    def __init__(self, blocks: tuple[Block | None, ...]) -> None:
        self.blocks = blocks

    def at(self, seed: int, step: int) -> tuple[Block | None, ...]:
        """As `ActiveBlocks.at`."""
        return self.blocks

    def weight(self, seed: int, step: int) -> float:
        """As `ActiveBlocks.weight`."""
        return 1.0

    def observe(self, terms: Terms) -> None:
        """As `ActiveBlocks.observe`."""

    def state(self) -> None:
        """As `ActiveBlocks.state`."""

    def load(self, state: Any) -> None:
        """As `ActiveBlocks.load`."""


@dataclass(frozen=True)
class OneBlock:
    """Some blocks of which each step estimates one, as an argument of `ZerothOrder`; see `zotune.block_coordinate`.

    Attributes:
        blocks: a partition of the tuned tensors.
        choice: how a step's block is chosen.
        explore: γ, the share of adaptive choices that is the same for all blocks; 0 < γ ≤ 1.
        decay: δ, how much of a block's score stays when it is measured again; 0 ≤ δ < 1.
        unbiased: whether steps are divided by the probability of their block.
    """

    blocks: Blocks
    choice: Choice = Choice.RANDOM
    explore: float = 0.2
    decay: float = 0.9
    unbiased: bool = False


class ChosenBlock:
    """Each step estimates one block; the state of an `OneBlock` in a run."""

    def __init__(self, options: OneBlock) -> None:
        self.blocks: tuple[Block | None, ...] = tuple(options.blocks)
        self._options = options
        # By block: the mean size of its coefficients, None before it was measured. Replaced, never changed.
        self._scores: tuple[float | None, ...] = (None,) * len(options.blocks)

    def at(self, seed: int, step: int) -> tuple[Block | None, ...]:
        """As `ActiveBlocks.at`."""
        return (self.blocks[self._place(seed, step)],)

    def _place(self, seed: int, step: int) -> int:
        if self._options.choice == Choice.CYCLIC:
            return step % len(self.blocks)
        drawn, total = derive_seed(seed, step, 0, _PURPOSE) / 2**64, 0.0
        for place, share in enumerate(self.shares()):
            total += share
            if drawn < total:
                return place
        return len(self.blocks) - 1

    def shares(self) -> list[float]:
        """The probability of each block in the coming step."""
        count, options = len(self.blocks), self._options
        known = [score for score in self._scores if score is not None]
        if options.choice != Choice.ADAPTIVE or not sum(known):
            return [1 / count] * count
        # A block that was not measured yet counts as much as the mean of those that were.
        mean = sum(known) / len(known)
        scores = [mean if score is None else score for score in self._scores]
        total = sum(scores)
        return [options.explore / count + (1 - options.explore) * score / total for score in scores]

    def weight(self, seed: int, step: int) -> float:
        """As `ActiveBlocks.weight`."""
        return 1 / self.shares()[self._place(seed, step)] if self._options.unbiased else 1.0

    def observe(self, terms: Terms) -> None:
        """As `ActiveBlocks.observe`: a block's score is a running mean of the root mean square of its coefficients."""
        if self._options.choice != Choice.ADAPTIVE or not terms:
            return
        # The terms hold cᵢ/q.
        size = math.sqrt(sum(c * c for c, _ in terms) * len(terms))
        place, decay = self.blocks.index(terms[0][1].block), self._options.decay
        before = self._scores[place]
        score = size if before is None else decay * before + (1 - decay) * size
        self._scores = (*self._scores[:place], score, *self._scores[place + 1 :])

    @property
    def constants(self) -> dict[str, Any]:
        """As `ActiveBlocks.constants`."""
        own = self._options
        adaptive = {"explore": own.explore, "decay": own.decay} if own.choice == Choice.ADAPTIVE else {}
        return {"choice": str(own.choice), "unbiased": own.unbiased, **adaptive}

    def state(self) -> list[float | None]:
        """As `ActiveBlocks.state`."""
        return list(self._scores)

    def load(self, state: Any) -> None:
        """As `ActiveBlocks.load`."""
        self._scores = tuple(state)


def active_blocks(blocks: Iterable[Block] | OneBlock | None, tuned: ParameterSet) -> ActiveBlocks:
    """The blocks of a run's steps, from the argument of `ZerothOrder`.

    Raises:
        UsageError: the blocks are no partition of the tuned tensors.
    """
    if blocks is None:
        return EveryBlock((None,))
    partition = blocks.blocks if isinstance(blocks, OneBlock) else tuple(blocks)
    check_partition(partition, tuned)
    return ChosenBlock(blocks) if isinstance(blocks, OneBlock) else EveryBlock(partition)
