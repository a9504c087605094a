"""Reading a text file as one document, which is one row with the column `text`."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

from zotune.errors import UsageError
from zotune.llm.data.readers.located import LocatedRow
from zotune.llm.data.row_bounds import RowBounds

_PART = 1 << 20


def read_document(file: io.TextIOBase, path: Path, bounds: RowBounds) -> Iterator[LocatedRow]:
    """Yield the whole text of a file as one row; line ends become newlines.

    Raises:
        UsageError: the file is empty, or larger than all rows of a file may be.
    """
    parts = []
    while part := file.read(_PART):
        bounds.check_rows(0, len(part), 0)
        parts.append(part)
    text = "".join(parts).replace("\r\n", "\n")
    if not text.strip():
        raise UsageError(f"{path} is empty; leave it out.")
    yield LocatedRow(str(path), {"text": text})
