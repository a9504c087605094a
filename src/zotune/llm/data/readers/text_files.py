"""Opening text files, gzipped or not, and reporting bytes that are no text."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from zotune.errors import UsageError
from zotune.llm.data.readers.located import LocatedRow
from zotune.llm.data.row_bounds import RowBounds

# An open file, its path for messages, and the bounds on its rows → the rows.
Parse = Callable[[io.TextIOBase, Path, RowBounds], Iterator[LocatedRow]]


def read_text_file(path: Path, parse: Parse) -> Iterator[LocatedRow]:
    """Yield the rows that `parse` finds in a text file.

    Raises:
        UsageError: the file is not UTF-8, or not a complete gzip file; or as `parse`.
    """
    try:
        try:
            with open_text(path) as file:
                yield from parse(file, path, RowBounds(str(path)))
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{path}, line {_undecodable_line(path)}: not UTF-8 text ({error.reason}). Save the file as UTF-8."
            ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f"{path} is not a complete gzip file: {error}") from None


def open_text(path: Path) -> io.TextIOWrapper:
    """Open a text file; a byte-order mark at its start is skipped, and line ends stay as they are."""
    return io.TextIOWrapper(_open_bytes(path), encoding="utf-8-sig", newline="")


def _open_bytes(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _undecodable_line(path: Path) -> int:
    """Return the first line that is not UTF-8; a decoder reports only the position in its buffer."""
    decoder, number = codecs.getincrementaldecoder("utf-8")(), 1
    with _open_bytes(path) as file:
        while part := file.read(1 << 16):
            try:
                decoder.decode(part)
            except UnicodeDecodeError as error:
                return number + error.object[: error.start].count(b"\n")
            number += part.count(b"\n")
    return number
