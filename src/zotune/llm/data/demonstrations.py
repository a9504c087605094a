"""In-context learning: solved training rows before the row in question (Brown et al., 2020).

As in Malladi et al. (2023): the rows' prompts with their right answers, a blank line between any two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from zotune.errors import UsageError
from zotune.llm.data.examples import Example

SEPARATOR = "\n\n"


def verbalised(example: Example) -> str:
    """A row as it reads with its right answer.

    >>> verbalised(Example("a gorgeous film It was", (" terrible", " great"), 1))
    'a gorgeous film It was great'
    """
    if example.candidates:
        return (example.prompt + example.candidates[example.label]).strip()
    space = "" if example.prompt[-1:].isspace() else " "
    return f"{example.prompt}{space}{example.answers[0]}".strip()


def choose(rows: Sequence[Example], number: int, seed: int) -> tuple[str, ...]:
    """So many of the rows, verbalised, in the order of the permutation that `seed` names.

    Raises:
        UsageError: there are fewer, or one has no answer.
    """
    if number > len(rows):
        raise UsageError(
            f"{number} demonstrations were asked for, but there are {len(rows)} training rows to choose them from. "
            "Lower --num-demonstrations" + ("." if rows else ", or give rows to choose from with --train-file.")
        )
    order = np.random.RandomState(seed).permutation(len(rows))[:number]
    for example in (rows[i] for i in order):
        if not example.candidates and not example.answers:
            raise UsageError(
                f"{example.place}: a row without an answer is no demonstration. Leave --num-demonstrations out."
            )
    return tuple(verbalised(rows[i]) for i in order)


def num_fitting(lengths: Sequence[int], room: int) -> int:
    """How many of the last texts of such lengths fit into the room.

    >>> num_fitting([5, 3, 4], room=8), num_fitting([5, 3, 4], room=3), num_fitting([], room=3)
    (2, 0, 0)
    """
    totals = np.cumsum(lengths[::-1])
    return int((totals <= room).sum())


def prepend(
    examples: Sequence[Example], demonstrations: Sequence[str], length: Callable[[str], int], limit: int
) -> tuple[tuple[Example, ...], tuple[int, ...]]:
    """Each example behind the demonstrations, and how many of them it has.

    Where they are too long together, the first ones are left out, so that what stays is whole.

    Args:
        examples: what is asked.
        demonstrations: solved rows as text.
        length: how many tokens a text has.
        limit: how many tokens a prompt and its longest candidate may have.
    """
    lengths = [length(text + SEPARATOR) for text in demonstrations]
    needed = [max(length(e.prompt + text) for text in e.candidates or ("",)) for e in examples]
    counts = tuple(num_fitting(lengths, limit - own) for own in needed)
    shown = (demonstrations[len(demonstrations) - count :] for count in counts)
    return tuple(
        replace(e, prompt=SEPARATOR.join([*some, e.prompt.lstrip()])) for e, some in zip(examples, shown, strict=True)
    ), counts
