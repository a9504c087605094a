"""A step is whole or not at all: what is written within a step can be put back while the step is not complete.

Old values are kept only where they take few bytes, as those of adapters do: a copy of all weights would cost what
forward passes save. Where they would take more, the largest part of a step, its forward passes, still comes before the
first write; only blocks that are updated one after the other have written when a later pass fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from zotune.system import limits


class UndoLog:
    """The values from before a step of what it writes.

    Attributes:
        has_written: whether a write has begun.
        is_writing: whether it has not ended.
        is_complete: whether everything written so far can be put back.
        is_over: whether the step is complete, so that nothing is to be put back.

    >>> x, state = torch.nn.Parameter(torch.zeros(2)), {}
    >>> log = UndoLog([state])
    >>> log.keep([x.data], [x])
    >>> state[x] = {"step": x.data.add_(1)}
    >>> log.put_back()
    >>> x.tolist(), state
    ([0.0, 0.0], {})
    """

    def __init__(self, states: Iterable[dict[Any, Any]]) -> None:
        """`states` are those of the optimizers that take part, by parameter."""
        self._states = [(state, {p: dict(of_p) for p, of_p in state.items()}) for state in states]
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._bytes = 0
        self._further: list[Callable[[], None]] = []
        self.has_written = self.is_writing = self.is_over = False
        self.is_complete = True

    def keep(self, weights: Iterable[Tensor], parameters: Iterable[Tensor]) -> None:
        """Copy weights that are about to be written, and the states of their parameters, if there is room for them."""
        held = (before[p] for p in parameters for _, before in self._states if p in before)
        tensors = [*weights, *(v for of_p in held for v in of_p.values() if isinstance(v, Tensor))]
        self._bytes += sum(t.nbytes for t in tensors)
        if self._bytes > limits.UNDO_BYTES:
            self.is_complete, self._kept = False, []
        else:
            self._kept += [(t, t.detach().clone()) for t in tensors]
        self.has_written = self.is_writing = True

    def then(self, take_back: Callable[[], None] | None) -> None:
        """Note how to take back what else was done; None if it cannot be."""
        if take_back is None:
            self.is_complete, self._kept = False, []
        else:
            self._further.append(take_back)

    @torch.no_grad()
    def put_back(self) -> None:
        """Put back the kept values, and all states."""
        for tensor, before in self._kept:
            tensor.detach().copy_(before)
        for state, of_before in self._states:
            state.clear()
            state.update(of_before)
        for take_back in reversed(self._further):
            take_back()
        torch.clear_autocast_cache()
