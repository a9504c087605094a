"""Reading rows from JSON: an object a line, a list of objects, or objects one after the other on any number of lines.

A list may be written on one line or on many, and need not fit into memory: it is read in parts, each row by itself.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zotune.errors import UsageError
from zotune.llm.data.readers.located import LocatedRow, Row
from zotune.llm.data.row_bounds import BoundedLines, RowBounds
from zotune.system.bounds import MAX_DEPTH, ROW_LENGTH, ROW_VALUES, count_values, is_deep

_PART = 1 << 16
# Characters of an escape, a number or a literal of which the end of what has been read may show a beginning.
_MARGIN = 16
_SPACE = re.compile(r"[ \t\r\n]*")


def read_json_file(file: io.TextIOBase, path: Path, bounds: RowBounds) -> Iterator[LocatedRow]:
    """Yield the rows of a file of JSON, in whichever of the three forms it is.

    Raises:
        UsageError: the file is malformed, or above a bound; the message names file and line.
    """
    beginning = file.read(_PART)
    file.seek(0)
    if beginning.lstrip().startswith("[") or (
        path.name.removesuffix(".gz").endswith(".json") and _spans_lines(beginning)
    ):
        return _values(file, path, bounds)
    return _lines(BoundedLines(file, str(path), bounds), path, bounds)


def _spans_lines(text: str) -> bool:
    r"""Return whether the first value of a text is an object that goes on after its line.

    >>> _spans_lines('{\n  "a": 1\n}'), _spans_lines('{"a": 1}\n{"a": 2}'), _spans_lines('{"a": }\n')
    (True, False, False)
    """
    line, has_end, _ = text.lstrip().partition("\n")
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return bool(has_end) and error.pos >= len(line.rstrip())
    except (ValueError, RecursionError):
        pass
    return False


def _lines(lines: BoundedLines, path: Path, bounds: RowBounds) -> Iterator[LocatedRow]:
    for number, line in enumerate(lines, start=1):
        size = lines.end_row()
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        bounds.check_row(place, size, count_values(line))
        try:
            row = json.loads(line, parse_constant=_no_number, object_pairs_hook=_object)
        except json.JSONDecodeError as error:
            raise UsageError(f"{place}: malformed JSON ({error.msg} at column {error.colno}).") from None
        except (ValueError, RecursionError) as error:
            raise _unusable(place, error) from None
        yield LocatedRow(place, _checked(row, place, line.strip()))


def _values(file: io.TextIOBase, path: Path, bounds: RowBounds) -> Iterator[LocatedRow]:
    """Yield the rows of a list, or of objects one after the other."""
    text, number = _Text(file, path, bounds), 0
    is_list = text.take("[")
    while not (text.take("]") if is_list and not number else text.is_at_end()):
        number += 1
        yield text.row(number)
        if is_list and not text.take(","):
            if not text.take("]"):
                raise UsageError(
                    f"{path}, line {text.line}: malformed JSON (after row {number} must come a comma and another row, "
                    "or the list's end)."
                )
            break
    if not text.is_at_end():
        raise UsageError(f"{path}, line {text.line}: malformed JSON (there is text after the end of the list).")


class _Text:
    """A JSON text that is read in parts.

    Attributes:
        line: the line of the next character.
    """

    def __init__(self, file: io.TextIOBase, path: Path, bounds: RowBounds) -> None:
        self._file, self._path, self._bounds = file, path, bounds
        self._decoder = json.JSONDecoder(parse_constant=_no_number, object_pairs_hook=_object)
        self._text, self._at, self._has_more = "", 0, True
        self.line = 1

    def take(self, character: str) -> bool:
        """Pass a character if it is the next one after white space."""
        found = not self.is_at_end() and self._text[self._at] == character
        self._at += found
        return found

    def is_at_end(self) -> bool:
        """Pass white space, and return whether nothing follows."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None
            self._pass_to(space.end())
            if self._at < len(self._text) or not self._has_more:
                return self._at == len(self._text)
            self._read_on()

    def row(self, number: int) -> LocatedRow:
        """Pass one value, and return it as a row.

        Raises:
            UsageError: it is malformed, no object, or above a bound.
        """
        self.is_at_end()
        place = f"{self._path}, line {self.line} (row {number})"
        value, end = self._decode(place)
        text = self._text[self._at : end]
        self._bounds.check_row(place, len(text), count_values(text))
        self._pass_to(end)
        return LocatedRow(place, _checked(value, place, text))

    def _decode(self, place: str) -> tuple[Any, int]:
        """Return the next value and where it ends; read on while what has been read shows only its beginning."""
        while True:
            self._check_values(place)
            try:
                return self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _MARGIN
                if not (is_cut and self._has_more):
                    line = self.line + self._text.count("\n", self._at, error.pos)
                    raise UsageError(f"{place}: malformed JSON ({error.msg} in line {line}).") from None
            except (ValueError, RecursionError) as error:
                raise _unusable(place, error) from None
            if len(self._text) - self._at > self._bounds.row_length:
                raise UsageError(ROW_LENGTH.refusal(place))
            self._read_on()

    def _check_values(self, place: str) -> None:
        """Check the number of values before they are made; behind the row's end there is at most another quarter."""
        if len(self._text) > 2 * _PART and count_values(self._text) > 2 * ROW_VALUES.value:
            raise UsageError(ROW_VALUES.refusal(place))

    def _pass_to(self, end: int) -> None:
        self.line += self._text.count("\n", self._at, end)
        self._at = end

    def _read_on(self) -> None:
        rest = self._text[self._at :]
        part = self._file.read(max(_PART, len(rest) // 4))
        self._text, self._at, self._has_more = rest + part, 0, bool(part)


def _no_number(_: str) -> None:
    """NaN and infinities, which Python writes although JSON has no such values, count as missing."""


def _object(pairs: list[tuple[str, Any]]) -> Row:
    """Return a JSON object; a repeated key is an error, because its value would be ambiguous."""
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} appears twice")
    return row


def _checked(row: Any, place: str, text: str) -> Row:
    if not isinstance(row, dict):
        raise UsageError(f'{place}: a row must be an object {{"column": value, …}}, got {text[:40]}')
    if is_deep(row):
        raise UsageError(f"{place}: values are nested more than {MAX_DEPTH} deep; flatten them.")
    return row


def _unusable(place: str, error: Exception) -> UsageError:
    return UsageError(f"{place}: unusable JSON ({str(error).splitlines()[0]}).")
