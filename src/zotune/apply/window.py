"""The coefficients and seeds of recent steps, from which a transform's state is computed again, not stored."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from zotune.directions.blocks import Block
from zotune.directions.direction import Direction, Terms
from zotune.directions.samplers import Sampler
from zotune.directions.schedule import state_of


class CoefficientWindow:
    """The terms of the last `maxlen` steps, oldest first: coefficients and seeds, no noise. Skipped steps have none.

    A shallow copy of it stays as it is when steps are added to the original.

    >>> history = CoefficientWindow(1)
    >>> for c in (1.0, 2.0):
    ...     history.add([(c, Direction(7))])
    ...     history.close()
    >>> [[c for c, _ in terms] for terms in history.steps]
    [[2.0]]
    """

    def __init__(self, maxlen: int) -> None:
        self.maxlen = maxlen
        self._steps: deque[Terms] = deque(maxlen=maxlen)
        self._present: Terms = []

    def add(self, terms: Terms) -> None:
        """Add terms that the current step applied; blocks updated in sequence add theirs one after the other."""
        self._present = [*self._present, *terms]

    def close(self) -> None:
        """Close the current step and drop the oldest one if the window is full."""
        if self._present:
            self._steps = deque([*self._steps, self._present], self.maxlen)
        self._present = []

    @property
    def steps(self) -> tuple[Terms, ...]:
        """The terms of each step."""
        return tuple(self._steps)

    def state(self) -> list[dict[str, Any]]:
        """The window in plain values."""
        return [_to_plain(terms) for terms in self._steps]

    def load(
        self, state: Sequence[dict[str, Any]], sampler: Callable[[Any], Sampler], blocks: Sequence[Block | None]
    ) -> None:
        """Restore the window from the result of `state`; `sampler` maps a sampler's saved state to the sampler."""
        named = {None if block is None else block.name: block for block in blocks}
        steps = [(step["terms"], sampler(step["sampler"])) for step in state]
        self._steps = deque(
            ([(c, Direction(seed, u, named[block])) for c, seed, block in terms] for terms, u in steps), self.maxlen
        )


def _to_plain(terms: Terms) -> dict[str, Any]:
    return {
        "terms": [(c, u.seed, None if u.block is None else u.block.name) for c, u in terms],
        "sampler": state_of(terms[0][1].sampler),
    }
