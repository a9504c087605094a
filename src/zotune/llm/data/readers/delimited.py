"""Reading rows from CSV and TSV files, and finding their delimiter."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from zotune.errors import UsageError
from zotune.llm.data.readers.located import LocatedRow, check_names
from zotune.llm.data.readers.text_files import open_text
from zotune.llm.data.row_bounds import BoundedLines, RowBounds

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
"""The delimiters that are tried, in this order, and their names."""

_PART = 1 << 16
_ROWS_LOOKED_AT = 20
_LONGEST_CELL = 2**31 - 1


def delimiter_of(path: Path, told: str | None = None) -> str:
    """Return the delimiter of a file: the given one, else a tab for `.tsv`, else the one of `find_delimiter`."""
    if told is not None:
        return told
    if ".tsv" in path.suffixes[-2:]:
        return "\t"
    # Wrong bytes are reported when the rows are read.
    with suppress(OSError, EOFError, ValueError), open_text(path) as file:
        text = file.read(_PART)
        return find_delimiter(text, is_whole=len(text) < _PART)
    return ","


def find_delimiter(text: str, *, is_whole: bool) -> str:
    r"""Return the delimiter of a table of this text.

    A header with a comma outside quotes is one of a plain CSV file. Something else counts only if it splits the header
    into names, and at least half of the rows into as many cells. The first line `sep=;`, which Excel writes and reads,
    names it.

    Args:
        text: the beginning of a file.
        is_whole: whether it is the whole file; else its last row may be cut.

    >>> find_delimiter("text;label\ngood, and cheap;1\n", is_whole=True)
    ';'
    >>> find_delimiter("text\nfine; fast\n", is_whole=True), find_delimiter("a;b,c\n", is_whole=True)
    (',', ',')
    """
    if (named := _named_delimiter(text.partition("\n")[0])) is not None:
        return named
    for delimiter in DELIMITERS:
        rows, is_sound = _first_rows(text, delimiter, is_whole)
        names = rows[0] if rows else []
        # A broken row among them is refused when its turn comes.
        is_table = is_sound and all(names) and 2 * sum(len(row) == len(names) for row in rows[1:]) >= len(rows[1:])
        if len(names) > 1 and (delimiter == "," or (is_table and len(set(names)) == len(names))):
            return delimiter
    return ","


def _named_delimiter(line: str) -> str | None:
    """Return the delimiter that Excel's line `sep=;` names."""
    line = line.strip("\r\n")
    return line[-1] if len(line) == 5 and line.startswith("sep=") and line[-1] in DELIMITERS else None


def _first_rows(text: str, delimiter: str, is_whole: bool) -> tuple[list[list[str]], bool]:
    """Return some whole rows of a table, and whether they are well-formed with this delimiter."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[list[str]] = []
    _allow_long_cells()
    try:
        for row in reader:
            if len(rows) > _ROWS_LOOKED_AT:
                return rows, True
            rows += [row] if row else []
    except csv.Error as error:
        # The end of what was read may lie within quotes.
        return rows, not is_whole and "unexpected end" in str(error)
    # The end of what was read may lie within a row.
    return (rows if is_whole else rows[:-1]), True


def read_delimited(
    file: io.TextIOBase, path: Path, bounds: RowBounds, delimiter: str | None = None
) -> Iterator[LocatedRow]:
    """Yield the rows of a table whose first line names the columns.

    Args:
        file: the open file.
        path: its path, also for messages.
        bounds: the bounds on its rows.
        delimiter: the delimiter; None: it is found.

    Raises:
        UsageError: the file is malformed, or above a bound; the message names file and line.
    """
    chosen = delimiter_of(path, delimiter)
    _allow_long_cells()
    yield from _rows(BoundedLines(file, str(path), bounds), path, bounds, chosen)


def _rows(lines: BoundedLines, path: Path, bounds: RowBounds, delimiter: str) -> Iterator[LocatedRow]:
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        place = f"{path}, line {reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UsageError(
                f"{place}: malformed CSV ({error}). Put a cell that contains quotes in quotes, and double those within."
            ) from None
        size = lines.end_row()
        if cells is None:
            return
        # An empty line, or Excel's line that names the delimiter.
        if not cells or (header is None and _named_delimiter(delimiter.join(cells)) == delimiter):
            continue
        bounds.check_row(place, size, len(cells))
        if header is None:
            header = cells
            check_names(header, place)
        elif len(cells) != len(header):
            raise UsageError(
                f"{place}: {len(cells)} cells, but the header names {len(header)} columns. {_advice(delimiter, header)}"
            )
        else:
            yield LocatedRow(place, dict(zip(header, cells, strict=True)))


def _advice(delimiter: str, header: list[str]) -> str:
    """Return advice about a row of too few or too many cells."""
    name = "comma" if delimiter == "," else repr(delimiter)
    advice = f'Put a cell that contains a {name} or a newline in quotes: "one{delimiter} two".'
    others = [other for other in DELIMITERS if other != delimiter and any(other in cell for cell in header)]
    if others:
        advice += f" If {DELIMITERS[others[0]]} separate the cells, give --delimiter {others[0]!r}."
    return advice


def _allow_long_cells() -> None:
    """Let a cell be as long as its row, not at most 131,072 characters as by default.

    The limit is one of the whole process, and several files may be read by turns, so it stays.
    """
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_CELL))
