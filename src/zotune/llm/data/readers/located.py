"""A row and its place, so that a message about a row names its file and line."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from zotune.errors import UsageError

Row = dict[str, Any]


class LocatedRow(NamedTuple):
    """A row and its place, such as `reviews.csv, line 7`."""

    place: str
    columns: Row


class ClassNumber(int):
    """The number of a class whose name is known.

    Attributes:
        name: the name; None for a number that stands for no label, such as -1.

    >>> label = ClassNumber(1, "good")
    >>> label == 1, label.name
    (True, 'good')
    """

    name: str | None

    def __new__(cls, number: int, name: str | None) -> ClassNumber:
        """Return the number with its name."""
        made = super().__new__(cls, number)
        made.name = name
        return made


def with_class_names(row: Row, names: Mapping[str, Sequence[str]]) -> Row:
    """Return a row whose class numbers know their names.

    Args:
        row: the row.
        names: the names of the classes in order, by column; a number without one, such as -1, has the name None.

    >>> with_class_names({"text": "fine", "label": 1}, {"label": ["bad", "good"]})["label"].name
    'good'
    """
    numbers = {column: row.get(column) for column in names}
    named = {
        column: ClassNumber(number, names[column][number] if 0 <= number < len(names[column]) else None)
        for column, number in numbers.items()
        if isinstance(number, int)
    }
    return {**row, **named}


def without_nan(row: Row) -> Row:
    """Return a row with None in place of NaN, which columns of numbers hold for missing values."""
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}


def check_names(names: Sequence[str], place: str) -> None:
    """Check the names of a table's columns.

    Raises:
        UsageError: two columns have one name.
    """
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise UsageError(f"{place}: two columns are named {twice!r}; rename one.")


def first_line(error: Exception) -> str:
    """Return the first line of an error of a library, or its kind if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
