"""A prompt and choices, of which one is right."""

from __future__ import annotations

from collections import Counter
from typing import Any

from zotune.errors import UsageError
from zotune.llm.config.data import DataOptions
from zotune.llm.data.readers.located import LocatedRow
from zotune.llm.rows.cells import cell_text, column_of, list_of, short
from zotune.llm.rows.records import Choice
from zotune.llm.rows.shape import Shape
from zotune.llm.rows.templates import PROMPT_COLUMN, prompt_of


def to_record(row: LocatedRow, options: DataOptions) -> Choice:
    """Return the template's prompt with the row's choices as candidates; the label is the right one or its index."""
    column = column_of("choices", options)
    values = list_of(row, column, 'choices, ["one", "two", …]')
    choices = tuple(cell_text(LocatedRow(row.place, {column: c}), column).strip() for c in values)
    if len(choices) < 2 or not all(choices):
        raise UsageError(
            f"{row.place}: the column {column!r} holds {short(values)}; give at least two choices, none of them empty."
        )
    if len(set(choices)) < len(choices):
        twice = Counter(choices).most_common(1)[0][0]
        raise UsageError(f"{row.place}: the choice {twice!r} appears twice; give each choice once.")
    return Choice(
        place=row.place,
        columns=row.columns,
        prompt=prompt_of(row, options),
        candidates=choices,
        label=_right_choice(row, options, values),
    )


def _right_choice(row: LocatedRow, options: DataOptions, choices: list[Any]) -> int:
    """Return the index of the right choice."""
    value, text = row.columns.get(options.label_column), cell_text(row, options.label_column).strip()
    texts = [cell_text(LocatedRow(row.place, {"": c}), "").strip() for c in choices]
    by_text = texts.index(text) if text in texts else None
    by_index = int(text) if text.isascii() and text.isdigit() and int(text) < len(choices) else None
    if not isinstance(value, str) and all(isinstance(c, str) for c in choices):
        by_text = None  # a number is an index if all choices are texts
    if by_text is None and by_index is None:
        raise UsageError(
            f"{row.place}: the column {options.label_column!r} is {short(value)}, but must be the right choice itself "
            f"or its index, 0 to {len(choices) - 1}."
        )
    if by_text is not None and by_index is not None and by_text != by_index:
        raise UsageError(
            f"{row.place}: the column {options.label_column!r} is {short(value)}, which is the text of one choice and "
            "the index of another. In JSON, write the index as a number and the choices as texts."
        )
    index = by_index if by_text is None else by_text
    assert index is not None
    return index


CHOICE = Shape(
    "a prompt, choices, and the right one's index or itself",
    PROMPT_COLUMN,
    ("choices", "label"),
    to_record,
    frozenset({"template"}),
)
