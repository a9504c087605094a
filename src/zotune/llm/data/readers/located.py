"""A row and its place, so that a message about a row names its file and line."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from zotune.errors import UsageError

Row = dict[str, Any]


class LocatedRow(NamedTuple):
    """A row and its place, such as `reviews.csv, line 7`."""

    place: str
    columns: Row


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
