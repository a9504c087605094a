"""Columns by their roles, and cells of a row as texts and lists. Error messages name the row's place."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from zotune.errors import UsageError, did_you_mean
from zotune.llm.config.data import DataOptions
from zotune.llm.data.readers.located import LocatedRow
from zotune.system.bounds import MAX_DEPTH, ROW_VALUES, count_values, is_deep


def column_of(role: str, options: DataOptions) -> str:
    """Return the column of a role, such as text, label, prompt or messages; other names are columns."""
    renamed = {"text": options.text_column, "label": options.label_column}
    return renamed.get(role) or options.columns.get(role, role)


def cell_text(row: LocatedRow, column: str) -> str:
    """Return a cell as text; the numbers 1 and 1.0 are both "1".

    >>> cell_text(LocatedRow("a.jsonl, line 1", {"n": 1.0}), "n")
    '1'
    """
    if column not in row.columns:
        raise UsageError(f"{row.place}: there is no column {column!r}.{did_you_mean(column, row.columns)}")
    if row.columns[column] is None:
        raise UsageError(f"{row.place}: the column {column!r} is null. Leave the row out.")
    value = row.columns[column]
    if isinstance(value, str):
        check_characters(value, row, column)
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    raise UsageError(f"{row.place}: the column {column!r} holds {short(value)}, which is not text.")


def not_empty(row: LocatedRow, column: str) -> str:
    """Return a cell as text that is not white space alone."""
    text = cell_text(row, column)
    if not text.strip():
        raise UsageError(f"{row.place}: the column {column!r} is empty. Leave the row out.")
    return text


def optional_text(row: LocatedRow, column: str) -> str:
    """Return a cell as text; nothing if there is no such column, or null in it."""
    return "" if row.columns.get(column) is None else cell_text(row, column)


def check_characters(text: str, row: LocatedRow, column: str) -> None:
    """Check that a text can be written as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{row.place}: the column {column!r} holds half a character (a lone surrogate) at character {error.start}."
        ) from None


def list_of(row: LocatedRow, column: str, like: str) -> list[Any]:
    """Return the list in a column, which may be JSON text (in CSV); `like` says what it must hold."""
    value = row.columns.get(column)
    if value is None or isinstance(value, str):
        value = from_json(cell_text(row, column), row.place)
    if not isinstance(value, list):
        raise UsageError(f"{row.place}: the column {column!r} must hold a list of {like}; got {short(value)}.")
    return value


def from_json(text: str, place: str) -> Any:
    """Return the value of a JSON text, or the text itself if it is none.

    Raises:
        UsageError: the value is above a bound.
    """
    ROW_VALUES.check(count_values(text), place)
    value: Any = text
    with suppress(ValueError, RecursionError):
        value = json.loads(text)
    if is_deep(value):
        raise UsageError(f"{place}: values are nested more than {MAX_DEPTH} deep; flatten them.")
    return value


def short(value: Any) -> str:
    """Return a value as it is shown in a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
