"""Ledger files: written so that nothing but the last step can be lost, read so that nothing wrong is believed.

A record is one write of some bytes at the end of the file, so a killed process leaves whole records, and
perhaps a torn one at the end. The file is synced at most a second after a record, whether or not another one follows.

What follows the last intact record is a torn tail unless there is a good record in it. Then the file was damaged in the
middle: it is refused, because cutting it would lose the good ones.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from zotune.errors import NotWrittenError, UsageError
from zotune.ledger.format import MAGIC, Header, LedgerError, parse_header
from zotune.ledger.sync import LateSync
from zotune.optim.record import StepRecord
from zotune.system.atomic_write import atomic_write, sync
from zotune.system.bounds import LEDGER_BYTES, read_bytes

_SECONDS_BETWEEN_SYNCS = 1.0
_ROWS_AT_ONCE = 1 << 12


@dataclass(frozen=True)
class Ledger:
    """A ledger read from a file: its header and its intact records.

    Attributes:
        rows: the bytes of each record, as its layout reads them.
        cut_bytes: how many bytes after the last good record were left out: a torn or damaged tail.
        end: where in the file the last good record ends.
        content: the whole file.
    """

    name: str
    header: Header
    rows: Any
    cut_bytes: int
    end: int
    content: bytes

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, step: int) -> StepRecord:
        step = range(len(self))[step]
        return next(self.header.layout.from_rows(self.rows[step : step + 1], step))

    def __iter__(self) -> Iterator[StepRecord]:
        starts = range(0, len(self), _ROWS_AT_ONCE)
        return (r for i in starts for r in self.header.layout.from_rows(self.rows[i : i + _ROWS_AT_ONCE], i))

    def first(self, num_steps: int | None) -> Ledger:
        """The ledger of the first steps only; of all steps for None.

        Raises:
            LedgerError: it has fewer.
        """
        if num_steps is None:
            return self
        if not 0 <= num_steps <= len(self):
            raise LedgerError(f"{self.name} holds {len(self)} steps; the first {num_steps} of them do not exist.")
        end = self.end - _nbytes(self.rows[num_steps:])
        return Ledger(self.name, self.header, self.rows[:num_steps], 0, end, self.content)

    def to_bytes(self) -> bytes:
        """The file's bytes without the damaged tail."""
        return self.content[: self.end]

    @property
    def mark(self) -> int:
        """A number that identifies the header and the last record: the last checksum."""
        return _u32(self.rows[-1].tobytes()) if len(self) else _header_crc(self.content)

    @property
    def bytes_a_step(self) -> int:
        """Bytes of a record, on average; of the smallest one if there is none."""
        return round(_nbytes(self.rows) / len(self)) if len(self) else self.header.layout.smallest


class DamagedLedgerError(LedgerError):
    """A ledger is damaged in the middle: good records follow a bad one.

    Attributes:
        intact: the ledger of the steps before the damage.
    """

    def __init__(self, intact: Ledger) -> None:
        """`intact` is the ledger of the steps before the damage."""
        steps = len(intact)
        super().__init__(
            f"{intact.name} is damaged in the middle: behind step {steps} there is no good record at byte {intact.end} "
            "of the file, but there are some after it. Restore the file from a copy. Without one, return to the last "
            f"step before the damage, zotune ledger undo FOLDER --to-step {steps}, which keeps the damaged file under "
            "another name, and resume the run."
        )
        self.intact = intact


def read(path: Path | str) -> Ledger:
    """Read the ledger in a file. A torn or damaged tail is skipped and counted; the file is not changed.

    Raises:
        LedgerError: it cannot be read, is no ledger, is of another version, its header is damaged, or good records
            follow a bad one or another ledger follows.
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
    layout, crc = header.layout, _header_crc(content)
    rows: Any = layout.split(content, start, crc)
    end = start + _nbytes(rows)
    ledger = Ledger(name, header, rows, len(content) - end, end, content)
    if (wrong := layout.first_wrong(rows)) is not None:
        raise LedgerError(f"step {wrong[0] + 1} of {name} was not written by zotune: {wrong[1]}.")
    if (second := content.find(MAGIC, end)) >= 0:
        raise LedgerError(
            f"{name} holds {len(rows)} steps, and at byte {second} another ledger begins: files were put one after the "
            "other, and a file is one run. Cut it there. To apply runs one after the other, use zotune ledger merge."
        )
    if layout.has_good_record(memoryview(content)[end:], len(rows), crc):
        raise DamagedLedgerError(ledger)
    return ledger


def with_about(ledger: Ledger, about: dict[str, Any]) -> bytes:
    """The bytes of a ledger that says something else to people and other layers, and replays to the same weights.

    Args:
        ledger: the ledger.
        about: what its header says instead.
    """
    header = replace(ledger.header, about=about).to_bytes()
    return header + ledger.header.layout.reseal(ledger.rows, _header_crc(header))


def _header_crc(content: bytes) -> int:
    return _u32(content[16:20])


def _u32(content: bytes) -> int:
    return int.from_bytes(content[:4], "little")


def _nbytes(rows: Any) -> int:
    """Bytes of some records: of an array of rows of one size, or of a list of rows."""
    return int(rows.nbytes) if isinstance(rows, np.ndarray) else sum(row.nbytes for row in rows)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes from writing a ledger file within this context.

    Raises:
        LedgerError: another one is writing it, or it cannot be opened.
    """
    file = _open(path)
    try:
        _lock(file, path)
        yield
    finally:
        os.close(file)


class LedgerWriter:
    """Appends records to a ledger file; one writer at a time.

    Attributes:
        num_steps: records in the file.
        mark: as `Ledger.mark`.
    """

    def __init__(self, path: Path, file: int, ledger: Ledger) -> None:
        """See `create` and `resume`."""
        self.path, self.header, self.num_steps, self.mark = path, ledger.header, len(ledger), ledger.mark
        self._file, self._end, self._crc = file, ledger.end, _header_crc(ledger.content)
        self._has_tail = ledger.cut_bytes > 0
        self._late = LateSync(file, _SECONDS_BETWEEN_SYNCS)

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
        return cls(path, file, parse(content, str(path)))

    @classmethod
    def resume(cls, path: Path | str) -> tuple[Self, Ledger]:
        """Open a ledger to append after its last intact record; returns the writer and the present ledger.

        The file is not changed before the first `append` or `cut_tail`.

        Raises:
            LedgerError: as `read`, or another process writes the file.
        """
        path = Path(path)
        file = _open(path)
        try:
            _lock(file, path)
            ledger = read(path)
        except BaseException:
            os.close(file)
            raise
        return cls(path, file, ledger), ledger

    def cut_tail(self) -> None:
        """Cut the torn or damaged bytes after the last intact record, if there are any."""
        if self._has_tail:
            os.ftruncate(self._file, self._end)
            os.fsync(self._file)
            self._has_tail = False

    def append(self, record: StepRecord) -> None:
        """Append the record of a step.

        Raises:
            LedgerError: it is not the next step, or does not fit the header.
            NotWrittenError: the disk is full or gone. The file ends with the last whole record.
        """
        if record.step != self.num_steps:
            raise LedgerError(f"the ledger's next step is number {self.num_steps}, got number {record.step}.")
        row = self.header.layout.pack(record, self._crc)
        try:
            self.cut_tail()
            os.lseek(self._file, self._end, os.SEEK_SET)
            _write_all(self._file, row)
            self._late.note()
        except OSError as error:
            os.ftruncate(self._file, self._end)
            raise NotWrittenError(
                f"step {record.step + 1} could not be written to {self.path}: {error.strerror}. The ledger holds the "
                f"{self.num_steps} steps before it."
            ) from None
        self._end += len(row)
        self.num_steps += 1
        self.mark = _u32(row)

    def sync(self) -> None:
        """Sync all records to the disk."""
        self._late.sync()

    def close(self) -> None:
        """Sync and release the lock."""
        if self._file >= 0:
            file, self._file = self._file, -1
            try:
                self._late.close()
            finally:
                os.close(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR)
    except OSError as error:
        raise LedgerError(f"the ledger {str(path)!r} cannot be opened for writing: {error.strerror}.") from None


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
    except OSError as error:
        raise LedgerError(
            f"{path} cannot be locked, so that two processes could write it at once: {error.strerror}. Choose a folder "
            "on a file system with locks."
        ) from None
