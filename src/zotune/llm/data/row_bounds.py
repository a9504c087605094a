"""Bounds on the rows of a file, which are checked before a row's values are made: length and values, of one and of all.

A compressed file of kilobytes may hold rows of gigabytes, and a row of many tiny values takes a hundred times its text.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from zotune.errors import UsageError
from zotune.system.bounds import DATA_BYTES, DATA_VALUES, ROW_LENGTH, ROW_VALUES, ROWS

_ARE_KEPT = ContextVar("are_kept", default=True)


@contextmanager
def one_row_at_a_time() -> Iterator[None]:
    """Within this context rows are let go once they are used, so that only each of them is bounded, not all together.

    >>> with one_row_at_a_time():
    ...     rows_are_kept()
    False
    """
    token = _ARE_KEPT.set(False)
    try:
        yield
    finally:
        _ARE_KEPT.reset(token)


def rows_are_kept() -> bool:
    """Return whether whoever reads rows keeps all of them in memory."""
    return _ARE_KEPT.get()


class RowBounds:
    """What has been read of a file, against the bounds that held when reading began.

    Attributes:
        row_length: the most characters of a row.
    """

    def __init__(self, source: str) -> None:
        """Begin with a file of this name, which is for errors."""
        self._source = source
        self.row_length = ROW_LENGTH.value
        self._row_values = ROW_VALUES.value
        self._left = {bound: bound.value for bound in (ROWS, DATA_BYTES, DATA_VALUES) if rows_are_kept()}

    def check_row(self, place: str, length: int, num_values: int) -> None:
        """Count a row before its values are made.

        Args:
            place: the row's place, for errors.
            length: its characters.
            num_values: the number of its values, or more.

        Raises:
            UsageError: the row, or all rows so far, are above a bound.
        """
        if length > self.row_length:
            raise UsageError(ROW_LENGTH.refusal(place))
        if num_values > self._row_values:
            raise UsageError(ROW_VALUES.refusal(place))
        self.check_rows(1, length, num_values)

    def check_rows(self, num_rows: int, num_bytes: int, num_values: int) -> None:
        """Count several rows at once.

        Raises:
            UsageError: all rows so far are above a bound.
        """
        for bound, count in ((ROWS, num_rows), (DATA_BYTES, num_bytes), (DATA_VALUES, num_values)):
            if bound not in self._left:
                continue
            self._left[bound] -= count
            if self._left[bound] < 0:
                raise UsageError(bound.refusal(self._source))


class BoundedLines:
    """The lines of a text file, of which no row is longer than a bound; a row of CSV may have several lines."""

    def __init__(self, file: io.TextIOBase, path: str, bounds: RowBounds) -> None:
        """Read from the position of an open file."""
        self._file, self._path, self._bounds = file, path, bounds
        self._number, self._row = 0, 0

    def __iter__(self) -> BoundedLines:
        return self

    def __next__(self) -> str:
        """Return the next line with its end.

        Raises:
            UsageError: the row that it belongs to is too long; no more of it than the bound was read.
        """
        line = self._file.readline(self._bounds.row_length + 1)
        if not line:
            raise StopIteration
        self._number += 1
        self._row += len(line)
        if self._row > self._bounds.row_length:
            raise UsageError(ROW_LENGTH.refusal(f"{self._path}, line {self._number}"))
        return line

    def end_row(self) -> int:
        """Return the length of the row that ends here; the next line begins another one."""
        length, self._row = self._row, 0
        return length
