"""Records of variable length, format version 2: each says how many coefficients and further numbers it holds.

The specification is docs/reference/ledger-format.md.

    u32 CRC-32  u32 step  u32 T  u32 S  u24 passes  E × i8 scales, zeros to a multiple of 4
    loss  G × learning rate  T × coefficient  S × scalar

A record carries its own number, so that its place needs no part in the checksum.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from zotune.ledger.damage import MAX_MISSING, MAX_PLACES
from zotune.ledger.errors import LedgerError
from zotune.ledger.scales import LEFT_OUT, MAX_PASSES, codes_of, is_scale
from zotune.optim.record import StepRecord

_COUNTS = 16
# Bytes that a search for a good record checks at most; a file that is to make it slow is refused as damaged.
_MAX_SEARCHED = 1 << 28


@dataclass(frozen=True)
class FreeLayout:
    """How many estimates and parameter groups a record has; its coefficients and scalars it counts itself.

    >>> FreeLayout(num_estimates=1, num_groups=1).size(num_coefficients=1, num_scalars=0)
    32
    """

    num_estimates: int
    num_groups: int
    precision: str = "f4"

    version: ClassVar[int] = 2

    def size(self, num_coefficients: int, num_scalars: int) -> int:
        """Bytes of a record."""
        numbers = 1 + self.num_groups + num_coefficients + num_scalars
        return self._numbers_at + numbers * int(self.precision[1])

    @property
    def _numbers_at(self) -> int:
        """Where the numbers of a record begin: behind the counts, the passes and the scales."""
        return _COUNTS + -(-(3 + self.num_estimates) // 4) * 4

    @property
    def smallest(self) -> int:
        """Bytes of the smallest record."""
        return self.size(0, 0)

    def pack(self, record: StepRecord, header_crc: int) -> bytes:
        """A record's bytes.

        Raises:
            LedgerError: it has another number of estimates or groups, or numbers that cannot have been applied.
        """
        given = len(record.scales), len(record.learning_rates)
        if given != (self.num_estimates, self.num_groups):
            raise LedgerError(
                f"the step has {given[0]} estimates and {given[1]} parameter groups, but the ledger's header says "
                f"{self.num_estimates} and {self.num_groups}."
            )
        passes = min(record.num_forwards, MAX_PASSES).to_bytes(3, "little")
        scales = np.array(codes_of(record.scales), np.int8).tobytes()
        counts = (record.step, len(record.coefficients), len(record.scalars))
        with np.errstate(over="ignore"):
            numbers = np.array(
                [record.loss, *record.learning_rates, *record.coefficients, *record.scalars], f"<{self.precision}"
            )
        head = b"".join(n.to_bytes(4, "little") for n in counts) + passes + scales
        body = head.ljust(self._numbers_at - 4, b"\0") + numbers.tobytes()
        row = zlib.crc32(body, header_crc).to_bytes(4, "little") + body
        if (wrong := self.first_wrong([memoryview(row)])) is not None:
            raise LedgerError(f"step {record.step + 1} cannot be recorded: {wrong[1]}.")
        return row

    def split(self, content: bytes, start: int, header_crc: int) -> Sequence[memoryview]:
        """The good records of a file, from byte `start` up to the first that is none."""
        view, rows = memoryview(content)[start:], list[memoryview]()
        while (row := self._good_at(view, header_crc)) is not None and _number(row) == len(rows):
            rows.append(row)
            view = view[len(row) :]
        return rows

    def _good_at(self, view: memoryview, header_crc: int) -> memoryview | None:
        """The record at the beginning of some bytes; None if there is no good one."""
        if len(view) < self.smallest:
            return None
        size = self.size(_u32(view, 8), _u32(view, 12))
        if size > len(view) or _u32(view, 0) != zlib.crc32(view[4:size], header_crc):
            return None
        return view[:size]

    def reseal(self, rows: Iterable[memoryview], header_crc: int) -> bytes:
        """The records' bytes, with the checksums that they have behind another header."""
        return b"".join(zlib.crc32(row[4:], header_crc).to_bytes(4, "little") + row[4:] for row in rows)

    def first_wrong(self, rows: Iterable[memoryview]) -> tuple[int, str] | None:
        """As `zotune.ledger.format.Layout.first_wrong`."""
        found = ((index, what) for index, row in enumerate(rows) if (what := self._wrong_with(row)) is not None)
        return next(found, None)

    def _wrong_with(self, row: memoryview) -> str | None:
        codes, padding = np.split(self._scales(row), [self.num_estimates])
        rates, coefficients, scalars = self._numbers(row)
        if not all(map(is_scale, codes)) or padding.any():
            return "a scale is none of -1, 0, 1, 2"
        if len(coefficients) % self.num_estimates or len(scalars) % self.num_estimates:
            return f"its numbers are no equal shares of {self.num_estimates} estimates"
        if not np.isfinite(rates).all():
            return "a learning rate is not finite"
        for name, numbers in (("coefficient", coefficients), ("scalar", scalars)):
            infinite = ~np.isfinite(numbers.reshape(self.num_estimates, -1)).all(axis=1)
            if (infinite & (codes != LEFT_OUT)).any():
                return f"a {name} is not finite, but its estimate was not left out"
        return None

    def from_rows(self, rows: Iterable[memoryview], first: int) -> Iterator[StepRecord]:
        """As `zotune.ledger.format.Layout.from_rows`."""
        for step, row in enumerate(rows, start=first):
            codes = self._scales(row)[: self.num_estimates].tolist()
            rates, coefficients, scalars = self._numbers(row)
            yield StepRecord(
                step,
                float(np.frombuffer(row, f"<{self.precision}", 1, self._numbers_at)[0]),
                tuple(rates.tolist()),
                tuple(math.nan if code == LEFT_OUT else float(code) for code in codes),
                tuple(coefficients.tolist()),
                int.from_bytes(row[_COUNTS : _COUNTS + 3], "little"),
                tuple(scalars.tolist()),
            )

    def _scales(self, row: memoryview) -> NDArray[np.int8]:
        return np.frombuffer(row[_COUNTS + 3 : self._numbers_at], np.int8)

    def _numbers(self, row: memoryview) -> tuple[NDArray[np.floating], NDArray[np.floating], NDArray[np.floating]]:
        """Learning rates, coefficients and scalars."""
        numbers = np.frombuffer(row[self._numbers_at :], f"<{self.precision}")[1:]
        rates, coefficients, scalars = np.split(numbers, [self.num_groups, self.num_groups + _u32(row, 8)])
        return rates, coefficients, scalars

    def has_good_record(self, rest: memoryview, num_good: int, header_crc: int) -> bool:
        """As `zotune.ledger.damage.has_good_record`; here a record is known by its number and checksum at any place."""
        places = min(len(rest) - self.smallest + 1, MAX_PLACES)
        if places <= 0:
            return False
        content = np.frombuffer(rest, np.uint8)
        numbers = sum(content[4 + i : 4 + i + places].astype(np.int64) << (8 * i) for i in range(4))
        last = num_good + len(rest) // self.smallest + MAX_MISSING
        searched = 0
        for place in np.flatnonzero((numbers >= num_good) & (numbers <= last)).tolist():
            view = rest[place:]
            size = self.size(_u32(view, 8), _u32(view, 12))
            searched += size if size <= len(view) else 0
            if searched > _MAX_SEARCHED or self._good_at(view, header_crc) is not None:
                return True
        return False


def _u32(view: memoryview, at: int) -> int:
    return int.from_bytes(view[at : at + 4], "little")


def _number(row: memoryview) -> int:
    return _u32(row, 4)
