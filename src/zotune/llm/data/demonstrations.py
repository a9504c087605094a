"""In-context learning: solved training rows before each prompt (Brown et al., 2020).

As in Malladi et al. (2023), a demonstration is a prompt with its right answer, followed by a blank line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from zotune.errors import UsageError
from zotune.llm.data.control_tokens import Span
from zotune.llm.data.examples import Example

SEPARATOR = "\n\n"


class Demonstration(str):
    """The text of a solved row.

    Attributes:
        controls: the (start, end) of the characters in which the texts of control tokens are read as these tokens.
    """

    __slots__ = ("controls",)
    controls: tuple[Span, ...]

    def __new__(cls, text: str, controls: Sequence[Span] = ()) -> Demonstration:
        """Return the text without white space around it; positions are those in `text`."""
        made = super().__new__(cls, text.strip())
        made.controls = shifted(controls, len(text.lstrip()) - len(text))
        return made


def solved_text(example: Example, end: str | None = None) -> Demonstration:
    """Return the text of a row with its right answer, without the end-of-text token `end` behind it.

    >>> solved_text(Example("a gorgeous film It was", (" terrible", " great"), 1))
    'a gorgeous film It was great'
    """
    if example.candidates:
        return Demonstration(
            example.prompt + example.candidates[example.label].removesuffix(end or ""), example.controls
        )
    space = "" if example.prompt[-1:].isspace() else " "
    return Demonstration(f"{example.prompt}{space}{example.answers[0]}", example.controls)


def shifted(spans: Sequence[Span], by: int) -> tuple[Span, ...]:
    """Return (start, end) moved by a number of characters; what would start before the text is cut.

    >>> shifted([(0, 2), (5, 7)], -1)
    ((0, 1), (4, 6))
    """
    return tuple((max(0, lo + by), hi + by) for lo, hi in spans if hi + by > 0)


def choose_demonstrations(
    rows: Sequence[Example], number: int, seed: int, end: str | None = None
) -> tuple[Demonstration, ...]:
    """Choose `number` demonstrations from the rows by a random permutation with `seed`.

    The end-of-text token `end` is left out of them: behind it a model would start another text.

    Raises:
        UsageError: there are fewer rows, or a chosen row has no answer.
    """
    if number > len(rows):
        raise UsageError(
            f"{number} demonstrations were asked for, but there are {len(rows)} training rows to "
            f"choose them from. "
            "Lower --num-demonstrations" + ("." if rows else ", or give rows to choose from with --train-file.")
        )
    order = np.random.RandomState(seed).permutation(len(rows))[:number]
    for example in (rows[i] for i in order):
        if not example.candidates and not example.answers:
            raise UsageError(
                f"{example.place}: a row without an answer cannot be a demonstration. Leave --num-demonstrations out."
            )
    return tuple(solved_text(rows[i], end) for i in order)


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
    return tuple(_after(some, e) for e, some in zip(examples, shown, strict=True)), counts


def _after(demonstrations: Sequence[str], example: Example) -> Example:
    """Return an example whose prompt starts with demonstrations."""
    text = ""
    controls: list[Span] = []
    for demonstration in demonstrations:
        # A span may reach beyond its text, which nothing follows there.
        inside = [(lo, min(hi, len(demonstration))) for lo, hi in getattr(demonstration, "controls", ())]
        controls += shifted(inside, len(text))
        text += demonstration + SEPARATOR
    own = example.prompt.lstrip()
    controls += shifted(example.controls, len(text) + len(own) - len(example.prompt))
    return replace(example, prompt=text + own, controls=tuple(controls))
