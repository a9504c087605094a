"""Whether the evaluations of an objective drew different random numbers: their difference would then be chance.

Dropout that is still on, or a batch that is chosen within the closure, moves torch's generators on from one evaluation
to the next. An objective that seeds them itself leaves them where the evaluation before left them, and is let be.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise

from torch import Tensor

from zotune.errors import UsageError
from zotune.system.generators import generator_states, is_same_state

State = tuple[Tensor, ...]
_ENDS: ContextVar[list[State] | None] = ContextVar("ends_of_evaluations", default=None)


def note_evaluation() -> None:
    """Note that an evaluation of the objective has ended."""
    ends = _ENDS.get()
    if ends is not None:
        ends.append(generator_states())


@contextmanager
def same_draws() -> Iterator[None]:
    """Within this context all evaluations must see the same random numbers.

    Raises:
        UsageError: on leaving, if the evaluations drew on from each other, or several in one pass drew at all.
    """
    before, ends = generator_states(), list[State]()
    token = _ENDS.set(ends)
    try:
        yield
    finally:
        _ENDS.reset(token)
    if not is_same_state(before, generator_states()) and _draw_on(ends):
        raise UsageError(
            "the objective draws random numbers: the values of a step's probes, which may differ by the weights alone, "
            "also differ by chance. Dropout is on in a module that is not part of the optimizer's model or sets its "
            "own mode (put it into eval mode with .eval()), or the closure chooses its batch (choose it before); what "
            "has to be random can be seeded at the closure's beginning, torch.manual_seed(step)."
        )


def _draw_on(ends: Sequence[State]) -> bool:
    """Whether each evaluation left the generators elsewhere; also if there are none, as of probes in one pass."""
    return len(ends) != 1 and not any(is_same_state(one, other) for one, other in pairwise(ends))
