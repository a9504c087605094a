"""A step is whole or not at all: what is written within a step can be put back while the step is not complete.

Old values are kept only where they take few bytes, as those of adapters do: a copy of all weights would cost what
forward passes save. Where they would take more, the largest part of a step, its forward passes, still comes before the
first write; only blocks that are updated one after the other have written when a later pass fails.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from zotune.system import limits


class UndoLog:
    """The values from before a step of the tensors that it writes, and of all states of its parameters.

    Attributes:
        has_written: whether something was written in the step so far.
        is_complete: whether everything written can be put back.
        is_writing: whether a write has begun and not ended.

    >>> x, state = nn.Parameter(torch.zeros(2)), {}
    >>> log = UndoLog([state])
    >>> with torch.no_grad():
    ...     log.keep([x], [])
    ...     state[x] = {"step": 1}
    ...     log.put_back(x.add_(1))
    >>> x.tolist(), state
    ([0.0, 0.0], {})
    """

    def __init__(self, states: Iterable[dict[nn.Parameter, dict[str, Any]]]) -> None:
        """`states` are those of the optimizers that take part, by parameter."""
        self._states = [(state, {p: dict(of_p) for p, of_p in state.items()}) for state in states]
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._bytes = 0
        self.has_written = self.is_writing = False
        self.is_complete = True

    def keep(self, weights: Iterable[Tensor], parameters: Iterable[nn.Parameter]) -> None:
        """Copy tensors that are about to be written, and the states of some parameters, if there is room for them."""
        held = (of_p[p] for p in parameters for _, of_p in self._states if p in of_p)
        tensors = [*weights, *(v for state in held for v in state.values() if isinstance(v, Tensor))]
        self._bytes += sum(t.nbytes for t in tensors)
        if self._bytes > limits.UNDO_BYTES:
            self.is_complete, self._kept = False, []
        elif self.is_complete:
            self._kept += [(t, t.detach().clone()) for t in tensors]
        self.has_written = self.is_writing = True

    @torch.no_grad()
    def put_back(self, *_: object) -> None:
        """Put back every kept value and every state; newest first."""
        for tensor, before in reversed(self._kept):
            tensor.detach().copy_(before)
        for state, before in self._states:
            state.clear()
            state.update(before)
