"""Rows as tokens on the disk: a sequence of examples whose memory does not grow with their number.

The rows lie in a file without a name in the cache folder, which vanishes with the process. In memory are only their
places in the file, eight bytes a row, so any row can be read in any order.
"""

from __future__ import annotations

import pickle
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

from zotune.errors import UsageError
from zotune.llm.data.tokenization import Encoded
from zotune.system.cache_dir import cache_folder


class StoredRows(Sequence[Encoded]):
    """Rows in a file; each access makes a row anew.

    Args:
        rows: the rows, which are read once, one at a time.

    Raises:
        UsageError: there is no room on the disk.

    >>> rows = StoredRows(Encoded(((i, i + 1),), (), 0) for i in range(3))
    >>> len(rows), rows[2].sequences, [row.length for row in rows[:2]]
    (3, ((2, 3),), [2, 2])
    """

    def __init__(self, rows: Iterable[Encoded]) -> None:
        folder = cache_folder()
        self._ends = array("Q", [0])
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it lives as long as the rows
            weakref.finalize(self, self._file.close)
            for row in rows:
                self._file.write(pickle.dumps(row, pickle.HIGHEST_PROTOCOL))
                self._ends.append(self._file.tell())
            self._file.flush()
        except OSError as error:
            raise UsageError(
                f"the rows cannot be stored in {folder} ({error.strerror}). Make room there, name another folder with "
                "ZOTUNE_CACHE, or read fewer rows with --num-train."
            ) from None

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> Encoded: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Encoded, ...]: ...

    def __getitem__(self, index: int | slice) -> Encoded | tuple[Encoded, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        i = range(len(self))[index]
        self._file.seek(self._ends[i])
        row: Any = pickle.loads(self._file.read(self._ends[i + 1] - self._ends[i]))
        assert isinstance(row, Encoded)
        return row


class SelectedRows(Sequence[Encoded]):
    """Some of the rows of a sequence, in an order of their own and some perhaps several times.

    >>> SelectedRows(["a", "b", "c"], [2, 0, 2])[1:]
    ('a', 'c')
    """

    def __init__(self, rows: Sequence[Encoded], indices: Iterable[int]) -> None:
        self._rows, self._indices = rows, array("Q", indices)

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Encoded, ...]: ...

    def __getitem__(self, index: int | slice) -> Encoded | tuple[Encoded, ...]:
        if isinstance(index, slice):
            return tuple(self._rows[i] for i in self._indices[index])
        return self._rows[self._indices[index]]

    def __iter__(self) -> Iterator[Encoded]:
        return (self._rows[i] for i in self._indices)
