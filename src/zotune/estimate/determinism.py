"""Whether the evaluations of an objective drew different random numbers: their difference would then be chance.

Dropout that is still on, or a batch that is chosen within the closure, moves torch's generators on from one evaluation
to the next. An objective that seeds them itself leaves them where the evaluation before left them, and is let be.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from zotune.errors import UsageError

# The generators' states; None where they cannot be read, while a CUDA graph is captured.
_State = tuple[Tensor, ...] | None
_ENDS: ContextVar[list[_State] | None] = ContextVar("ends_of_evaluations", default=None)


def note_evaluation() -> None:
    """Note that an evaluation of the objective has ended."""
    ends = _ENDS.get()
    if ends is not None:
        ends.append(_generators())


@contextmanager
def same_draws() -> Iterator[None]:
    """Within this context all evaluations must see the same random numbers.

    Raises:
        UsageError: on leaving, if the evaluations drew on from each other, or several in one pass drew at all.
    """
    before, ends = _generators(), list[_State]()
    token = _ENDS.set(ends)
    try:
        yield
    finally:
        _ENDS.reset(token)
    if not _is_same(before, _generators()) and _draw_on(ends):
        raise UsageError(
            "the objective draws random numbers: the values of a step's probes, which may differ by the weights alone, "
            "also differ by chance. Dropout is on in a module that is not part of the optimizer's model or sets its own "
            "mode (put it into eval mode with .eval()), or the closure chooses its batch (choose it before); what has "
            "to be random can be seeded at the closure's beginning, torch.manual_seed(step)."
        )


def _draw_on(ends: Sequence[_State]) -> bool:
    """Whether each evaluation left the generators elsewhere; also if there are none, as of probes in one pass."""
    return len(ends) != 1 and not any(_is_same(one, next_) for one, next_ in zip(ends, ends[1:], strict=False))


def _generators() -> _State:
    if not torch.cuda.is_initialized():
        return (torch.default_generator.get_state(),)
    if torch.cuda.is_current_stream_capturing():
        return None
    return torch.default_generator.get_state(), *torch.cuda.get_rng_state_all()


def _is_same(one: _State, other: _State) -> bool:
    """Whether two states are known to be the same, or one is not known."""
    return one is None or other is None or all(map(torch.equal, one, other))
