"""In-context learning: solved training rows before each prompt (Brown et al., 2020).

As in Malladi et al. (2023), a demonstration is a prompt with its right answer, followed by a blank line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from zotune.errors import UsageError
from zotune.llm.data.examples import Example

SEPARATOR = "\n\n"


def solved_text(example: Example) -> str:
    """Return the text of a row with its right answer.

    >>> solved_text(Example("a gorgeous film It was", (" terrible", " great"), 1))
    'a gorgeous film It was great'
    """
    if example.candidates:
        return (example.prompt + example.candidates[example.label]).strip()
    space = "" if example.prompt[-1:].isspace() else " "
    return f"{example.prompt}{space}{example.answers[0]}".strip()


def choose_demonstrations(rows: Sequence[Example], number: int, seed: int) -> tuple[str, ...]:
    """Choose `number` demonstrations from the rows by a random permutation with `seed`.

    Raises:
        UsageError: there are fewer rows, or a chosen row has no answer.
    """
    if number > len(rows):
        raise UsageError(
            f"{number} demonstrations were asked for, but there are {len(rows)} training rows to "
            f"choose_demonstrations them from. "
            "Lower --num-demonstrations" + ("." if rows else ", or give rows to choose from with --train-file.")
        )
    order = np.random.RandomState(seed).permutation(len(rows))[:number]
    for example in (rows[i] for i in order):
        if not example.candidates and not example.answers:
            raise UsageError(
                f"{example.place}: a row without an answer cannot be a demonstration. Leave --num-demonstrations out."
            )
    return tuple(solved_text(rows[i]) for i in order)


def num_fitting(lengths: Sequence[int], room: int) -> int:
    """Return how many of the last texts, given their lengths, fit into `room`.

    >>> num_fitting([5, 3, 4], room=8), num_fitting([5, 3, 4], room=3), num_fitting([], room=3)
    (2, 0, 0)
    """
    totals = np.cumsum(lengths[::-1])
    return int((totals <= room).sum())


def prepend_demonstrations(
    examples: Sequence[Example], demonstrations: Sequence[str], length: Callable[[str], int], limit: int
) -> tuple[tuple[Example, ...], tuple[int, ...]]:
    """Put demonstrations before each example's prompt; return the examples and their numbers of demonstrations.

    If they do not all fit, the first demonstrations are left out; none is truncated.

    Args:
        examples: the examples to ask.
        demonstrations: solved rows as text.
        length: returns the number of tokens of a text.
        limit: maximum number of tokens of a prompt with its longest candidate.
    """
    lengths = [length(text + SEPARATOR) for text in demonstrations]
    needed = [max(length(e.prompt + text) for text in e.candidates or ("",)) for e in examples]
    counts = tuple(num_fitting(lengths, limit - tokens) for tokens in needed)
    shown = (demonstrations[len(demonstrations) - count :] for count in counts)
    return tuple(
        replace(e, prompt=SEPARATOR.join([*some, e.prompt.lstrip()])) for e, some in zip(examples, shown, strict=True)
    ), counts
