"""Ledger files: written so that nothing but the last step can be lost, read so that nothing wrong is believed.

A record is one write of some bytes at the end of the file, so a killed process leaves whole records, and
perhaps a torn one at the end. The file is synced at most a second after a record.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from zotune.errors import NotWrittenError, UsageError
from zotune.ledger.format import Header, LedgerError, checksum, parse_header
from zotune.optim.record import StepRecord
from zotune.system.atomic_write import atomic_write, sync
from zotune.system.bounds import LEDGER_BYTES, read_bytes

_SECONDS_BETWEEN_SYNCS = 1.0


@dataclass(frozen=True)
class Ledger:
    """A ledger read from a file: its header and its intact records.

    Attributes:
        cut_bytes: how many bytes after the last good record were left out: a torn or damaged tail.
        end: where in the file the last good record ends.
        content: the whole file.
    """

    name: str
    header: Header
    rows: NDArray[Any]
    cut_bytes: int
    end: int
    content: bytes

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, step: int) -> StepRecord:
        return self.header.layout.from_row(self.rows[step], step)

    def __iter__(self) -> Iterator[StepRecord]:
        return (self[step] for step in range(len(self)))

    def first(self, num_steps: int | None) -> Ledger:
        """The ledger of the first steps only; of all steps for None.

        Raises:
            LedgerError: it has fewer.
        """
        if num_steps is None:
            return self
        if not 0 <= num_steps <= len(self):
            raise LedgerError(f"{self.name} holds {len(self)} steps; the first {num_steps} of them do not exist.")
        end = self.end - (len(self) - num_steps) * self.rows.dtype.itemsize
        return Ledger(self.name, self.header, self.rows[:num_steps], 0, end, self.content)

    def to_bytes(self) -> bytes:
        """The file's bytes without the damaged tail."""
        return self.content[: self.end]


def read(path: Path | str) -> Ledger:
    """Read the ledger in a file. A torn or damaged tail is skipped and counted; the file is not changed.

    Raises:
        LedgerError: it cannot be read, is no ledger, is of another version, its header is damaged, or good records
            follow a bad one.
    """
    try:
        content = read_bytes(Path(path), LEDGER_BYTES)
    except UsageError as error:
        raise LedgerError(str(error)) from None
    except OSError as error:
        raise LedgerError(f"the ledger {str(path)!r} cannot be read: {error.strerror}.") from None
    return parse(content, str(path))


def parse(content: bytes, name: str) -> Ledger:
    """As `read`, of a file's content."""
    header, start = parse_header(content, name)
    dtype = header.layout.record
    size = dtype.itemsize
    count = (len(content) - start) // size
    crc = int.from_bytes(content[16:20], "little")
    rows = np.frombuffer(content, dtype, count, start)
    good = [int(rows["crc"][i]) == checksum(content[start + i * size :][:size], i, crc) for i in range(count)]
    num_good = good.index(False) if False in good else count
    if True in good[num_good:]:
        raise LedgerError(
            f"{name} is damaged in the middle: step {num_good + 1} does not have the checksum it was written "
            "with, though later ones do. Restore the file from a copy, or start the run again."
        )
    end = start + num_good * size
    return Ledger(name, header, rows[:num_good], len(content) - end, end, content)


class LedgerWriter:
    """Appends records to a ledger file; one writer at a time.

    Attributes:
        num_steps: records in the file.
    """

    def __init__(self, path: Path, file: int, header: Header, num_steps: int, end: int, crc: int) -> None:
        """See `create` and `resume`."""
        self.path, self.header, self.num_steps = path, header, num_steps
        self._file, self._end, self._crc = file, end, crc
        self._synced = time.monotonic()

    @classmethod
    def create(cls, path: Path | str, header: Header) -> Self:
        """Create a new ledger; the file appears with its whole header or not at all.

        Raises:
            LedgerError: there is a file of that name already.
            OSError: it cannot be written.
        """
        path = Path(path)
        if path.exists():
            raise LedgerError(f"{path} is there already; choose another name, or go on with LedgerWriter.resume.")
        content, file = header.to_bytes(), -1
        try:
            with atomic_write(path) as temporary:
                file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
                _lock(file, path)
                _write_all(file, content)
                os.fsync(file)
            sync(path.parent)
        except BaseException:
            if file >= 0:
                os.close(file)
            raise
        return cls(path, file, header, 0, len(content), int.from_bytes(content[16:20], "little"))

    @classmethod
    def resume(cls, path: Path | str) -> tuple[Self, Ledger]:
        """Open a ledger to append after its last intact record, cutting the rest; returns the writer and the present
        ledger.

        Raises:
            LedgerError: as `read`, or another process writes the file. It is left as it is.
        """
        path = Path(path)
        try:
            file = os.open(path, os.O_RDWR)
        except OSError as error:
            raise LedgerError(f"the ledger {str(path)!r} cannot be opened for writing: {error.strerror}.") from None
        try:
            _lock(file, path)
            ledger = read(path)
            if ledger.cut_bytes:
                os.ftruncate(file, ledger.end)
                os.fsync(file)
            os.lseek(file, ledger.end, os.SEEK_SET)
        except BaseException:
            os.close(file)
            raise
        return cls(path, file, ledger.header, len(ledger), ledger.end, _stored_crc(file)), ledger

    def append(self, record: StepRecord) -> None:
        """Append the record of a step.

        Raises:
            LedgerError: it is not the next step, or does not fit the header.
            NotWrittenError: the disk is full or gone. The file ends with the last whole record.
        """
        if record.step != self.num_steps:
            raise LedgerError(f"the ledger's next step is number {self.num_steps}, got number {record.step}.")
        row = self.header.layout.to_row(record)
        row["crc"] = checksum(row.tobytes(), record.step, self._crc)
        try:
            _write_all(self._file, row.tobytes())
            if time.monotonic() - self._synced >= _SECONDS_BETWEEN_SYNCS:
                self.sync()
        except OSError as error:
            os.ftruncate(self._file, self._end)
            os.lseek(self._file, self._end, os.SEEK_SET)
            raise NotWrittenError(
                f"step {record.step + 1} could not be written to {self.path}: {error.strerror}. The ledger holds the "
                f"{self.num_steps} steps before it."
            ) from None
        self._end += row.nbytes
        self.num_steps += 1

    def sync(self) -> None:
        """Sync all records to the disk."""
        if not os.fstat(self._file).st_nlink:
            raise FileNotFoundError(2, "the file was removed")
        os.fdatasync(self._file)
        self._synced = time.monotonic()

    def close(self) -> None:
        """Sync and release the lock."""
        if self._file >= 0:
            file, self._file = self._file, -1
            try:
                os.fdatasync(file)
            finally:
                os.close(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _stored_crc(file: int) -> int:
    return int.from_bytes(os.pread(file, 4, 16), "little")


def _write_all(file: int, content: bytes) -> None:
    """Write all bytes; a disk that takes only a part of them raises its error at the next call."""
    done = 0
    while done < len(content):
        done += os.write(file, content[done:])


def _lock(file: int, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LedgerError(f"another process is writing {path}; wait for its end, or choose another folder.") from None
