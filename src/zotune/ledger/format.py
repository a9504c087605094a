"""The ledger's bytes: a header that says what a run is, then one record a step.

The specification is docs/reference/ledger-format.md.

    "ZOLEDGER"  u32 version  u32 n  u32 CRC-32  n bytes: JSON, deflated     the header
    u32 CRC-32  u24 passes  E × i8 scales, zeros to a multiple of 4         a record: E estimates,
    loss  G × learning rate  T × coefficient                                G groups, T terms

This is version 1, whose records are of one size. Those of version 2 are in `zotune.ledger.free_layout`: a run's records
have it where their numbers of terms differ or where they hold more than coefficients.

All numbers are little endian. Loss, rates and coefficients are float32 (float64 if the run tunes float64
weights), and it is these rounded numbers that the run itself applied. A record's checksum covers its place
and the header, so a record that was moved, or comes from another ledger, is no good one.

A checksum shows that nothing was changed, not that the content has a meaning: that is checked as well, of the header
and of each record.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from zotune.errors import UsageError
from zotune.ledger.damage import has_good_record
from zotune.ledger.errors import LedgerError as LedgerError
from zotune.ledger.free_layout import FreeLayout
from zotune.ledger.scales import LEFT_OUT, MAX_PASSES, SCALES, codes_of
from zotune.noise.spec import NOISE_VERSION, NOISE_VERSIONS
from zotune.optim.record import StepRecord
from zotune.system.bounds import JSON_BYTES, parse_json

FORMAT_VERSION = 1
MAGIC = b"ZOLEDGER"
PREFIX_SIZE = 20
# The keys of a tensor in the header, and the types of their values.
_TENSOR = {"name": str, "id": int, "dtype": str, "shape": list, "digest": str}


@dataclass(frozen=True)
class Layout:
    """How many numbers a record holds, and their precision: "f4" or "f8".

    >>> Layout(num_estimates=1, num_groups=1, num_coefficients=1).record.itemsize
    20
    """

    num_estimates: int
    num_groups: int
    num_coefficients: int
    precision: str = "f4"

    version: ClassVar[int] = 1

    @property
    def smallest(self) -> int:
        """Bytes of a record."""
        return self.record.itemsize

    @property
    def record(self) -> np.dtype[Any]:
        """A record as NumPy reads it."""
        scales = -(-(3 + self.num_estimates) // 4) * 4 - 3
        numbers = 1 + self.num_groups + self.num_coefficients
        return np.dtype(
            [("crc", "<u4"), ("passes", "u1", 3), ("scales", "i1", scales), ("numbers", f"<{self.precision}", numbers)]
        )

    def to_row(self, record: StepRecord) -> NDArray[Any]:
        """A record as an array of one row; its checksum is not set.

        Raises:
            LedgerError: it does not have the numbers that this layout has room for, or some of them cannot have been
                applied.
        """
        given = len(record.scales), len(record.learning_rates), len(record.coefficients)
        if record.scalars:
            raise LedgerError(f"the step has {len(record.scalars)} scalars, but records of version 1 hold none.")
        if given != (self.num_estimates, self.num_groups, self.num_coefficients):
            raise LedgerError(
                f"the step has {given[0]} estimates, {given[1]} parameter groups and {given[2]} coefficients, but the "
                f"ledger's header says {self.num_estimates}, {self.num_groups} and {self.num_coefficients}."
            )
        codes = codes_of(record.scales)
        row = np.zeros(1, self.record)
        row["passes"][0] = list(min(record.num_forwards, MAX_PASSES).to_bytes(3, "little"))
        row["scales"][0, : len(codes)] = codes
        with np.errstate(over="ignore"):
            row["numbers"][0] = [record.loss, *record.learning_rates, *record.coefficients]
        if (wrong := self.first_wrong(row)) is not None:
            raise LedgerError(f"step {record.step + 1} cannot be recorded: {wrong[1]}.")
        return row

    def pack(self, record: StepRecord, header_crc: int) -> bytes:
        """A record's bytes. Errors are those of `to_row`."""
        row = self.to_row(record)
        row["crc"] = checksum(row.tobytes(), record.step, header_crc)
        return row.tobytes()

    def split(self, content: bytes, start: int, header_crc: int) -> NDArray[Any]:
        """The good records of a file, from byte `start` up to the first that is none."""
        size, view = self.record.itemsize, memoryview(content)
        count = (len(content) - start) // size
        rows = np.frombuffer(content, self.record, count, start)
        stored = rows["crc"].tolist()
        places = range(start, start + count * size, size)
        good = (stored[i] == checksum(view[at : at + size], i, header_crc) for i, at in enumerate(places))
        return rows[: next((i for i, is_good in enumerate(good) if not is_good), count)]

    def reseal(self, rows: NDArray[Any], header_crc: int) -> bytes:
        """The records' bytes, with the checksums that they have behind another header."""
        rows, size = rows.copy(), self.record.itemsize
        view = memoryview(rows.tobytes())
        rows["crc"] = [checksum(view[i * size : (i + 1) * size], i, header_crc) for i in range(len(rows))]
        return rows.tobytes()

    def has_good_record(self, rest: memoryview, num_good: int, header_crc: int) -> bool:
        """As `zotune.ledger.damage.has_good_record`."""
        return has_good_record(rest, self.record.itemsize, num_good, header_crc)

    def first_wrong(self, rows: NDArray[Any]) -> tuple[int, str] | None:
        """The index of the first row that no step can have, and what is wrong with it; None if all rows are sound.

        Every step's learning rates are finite, and so are the coefficients of every estimate that was not left out.
        """
        codes, padding = np.split(rows["scales"], [self.num_estimates], axis=1)
        rates, coefficients = np.split(rows["numbers"][:, 1:], [self.num_groups], axis=1)
        unknown = ~np.isin(codes, SCALES).all(axis=1) | padding.any(axis=1)
        # Each estimate has as many coefficients as the others. Of a layout that no method has, all have all of them.
        each, rest = divmod(self.num_coefficients, self.num_estimates)
        shape = (len(rows), 1, self.num_coefficients) if rest else (len(rows), self.num_estimates, each)
        infinite = ~np.isfinite(coefficients).reshape(shape).all(axis=2) & (codes != LEFT_OUT)
        found = (
            (unknown, f"a scale is none of {SCALES}"),
            (~np.isfinite(rates).all(axis=1), "a learning rate is not finite"),
            (infinite.any(axis=1), "a coefficient is not finite, but its estimate was not left out"),
        )
        wrong = [(int(bad.argmax()), what) for bad, what in found if bad.any()]
        return min(wrong, default=None)

    def from_rows(self, rows: NDArray[Any], first: int) -> Iterator[StepRecord]:
        """The records of some rows, of which the first is of step `first`."""
        passes = rows["passes"] @ np.array([1, 1 << 8, 1 << 16])
        columns = (rows["numbers"].tolist(), rows["scales"][:, : self.num_estimates].tolist(), passes.tolist())
        for step, (numbers, codes, num_forwards) in enumerate(zip(*columns, strict=True), start=first):
            yield StepRecord(
                step,
                numbers[0],
                tuple(numbers[1 : 1 + self.num_groups]),
                tuple(math.nan if code == LEFT_OUT else float(code) for code in codes),
                tuple(numbers[1 + self.num_groups :]),
                num_forwards,
            )


AnyLayout = Layout | FreeLayout
_LAYOUTS: dict[int, type[AnyLayout]] = {layout.version: layout for layout in (Layout, FreeLayout)}


@dataclass(frozen=True)
class Header:
    """The description of a run: all that its weights depend on besides the base model and the records.

    Attributes:
        layout: of its records; its kind decides the version of the format.
        method: every constant of the update, as `zotune.ledger.replay.describe` gives them.
        tensors: the tuned tensors in order: name, id, dtype, shape and digest of the base's numbers.
        about: what concerns people and other layers: model, configuration, data, versions.
        noise_version: of the noise specification.
    """

    layout: AnyLayout
    method: dict[str, Any]
    tensors: Sequence[dict[str, Any]]
    about: dict[str, Any] = field(default_factory=dict)
    noise_version: int = NOISE_VERSION

    def to_bytes(self) -> bytes:
        """The header as it is stored."""
        body = zlib.compress(json.dumps(asdict(self), separators=(",", ":")).encode(), 9)
        start = MAGIC + _u32(self.layout.version) + _u32(len(body))
        return start + _u32(zlib.crc32(body, zlib.crc32(start))) + body


def _u32(value: int) -> bytes:
    return value.to_bytes(4, "little")


def parse_header(content: bytes, name: str) -> tuple[Header, int]:
    """The header at the beginning of `content`, and how many bytes it takes. `name` is for messages.

    Raises:
        LedgerError: it is no ledger, truncated, damaged, or of another version.
    """
    version, size, crc = (int.from_bytes(content[8 + 4 * i : 12 + 4 * i], "little") for i in range(3))
    if not content.startswith(MAGIC[: len(content)]) or not content:
        raise LedgerError(f"{name} is no ledger: it does not begin with {MAGIC.decode()}.")
    if len(content) >= 12 and version not in _LAYOUTS:
        raise LedgerError(
            f"{name} has format version {version}; this zotune reads versions {' and '.join(map(str, _LAYOUTS))}. Use "
            "the zotune that wrote it, or one that is newer."
        )
    if len(content) < PREFIX_SIZE + size or len(content) < PREFIX_SIZE:
        raise LedgerError(f"{name} ends within its header, so nothing of it can be used. Start the run again.")
    body = content[PREFIX_SIZE : PREFIX_SIZE + size]
    if zlib.crc32(body, zlib.crc32(content[:16])) != crc:
        raise LedgerError(f"{name} is damaged: its header does not have the checksum it was written with.")
    return _from_body(body, name, _LAYOUTS[version]), PREFIX_SIZE + size


def _from_body(body: bytes, name: str, kind: type[AnyLayout]) -> Header:
    try:
        what = f"the header of {name}"
        fields = parse_json(zlib.decompressobj().decompress(body, JSON_BYTES.value + 1), what)
        layout = kind(**fields.pop("layout"))
        counts = [value for key, value in asdict(layout).items() if key != "precision"]
        if layout.precision not in ("f4", "f8") or not all(type(n) is int and 0 < n < 1 << 24 for n in counts):
            raise ValueError(f"its records would be {layout}")
        header = Header(layout, **fields)
        _check_types(header)
    except UsageError as error:
        raise LedgerError(str(error)) from None
    except (zlib.error, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise LedgerError(f"the header of {name} cannot be understood: {error}") from None
    if header.noise_version not in NOISE_VERSIONS:
        raise LedgerError(
            f"{name} was written with version {header.noise_version} of the noise specification; this zotune makes "
            f"versions {' and '.join(map(str, NOISE_VERSIONS))}, which are other directions. Use the zotune that wrote "
            "it."
        )
    return header


def _check_types(header: Header) -> None:
    """Check that the fields of a header are of their types, and that its counts agree with each other."""
    if not (isinstance(header.method, dict) and isinstance(header.about, dict) and isinstance(header.tensors, list)):
        raise ValueError("method and about are no objects, or tensors no list")
    seed = header.method.get("seed")
    if type(seed) is not int or not 0 <= seed < 1 << 64:
        raise ValueError("method has no seed")
    for tensor in header.tensors:
        if not isinstance(tensor, dict) or any(type(tensor.get(key)) is not kind for key, kind in _TENSOR.items()):
            raise ValueError(f"{str(tensor)[:80]} is no tensor")
        if not all(type(n) is int and n >= 0 for n in tensor["shape"]):
            raise ValueError(f"{str(tensor['shape'])[:80]} is no shape")
    _check_counts(header.layout, header.method)


def _check_counts(layout: AnyLayout, method: dict[str, Any]) -> None:
    """Check that records have the numbers that the method needs: they could not be applied otherwise.

    What a record of variable length holds is checked when it is replayed. A header that does not say what its method is
    made of is refused when it is compared with an optimizer.
    """
    blocks, groups, queries = (method.get(key) for key in ("blocks", "groups", "num_queries"))
    if not (isinstance(blocks, list) and isinstance(groups, list) and type(queries) is int):
        return
    # Of blocks of which each step chooses one, a record holds one.
    active = 1 if method.get("block_choice") else len(blocks)
    num_estimates = active if method.get("block_order") == "sequential" else 1
    num_coefficients = layout.num_coefficients if isinstance(layout, Layout) else active * queries
    given = layout.num_estimates, layout.num_groups, num_coefficients
    if given != (num_estimates, len(groups), active * queries):
        raise ValueError(
            f"its records hold {given[0]} estimates, {given[1]} groups and {given[2]} coefficients, but its method "
            f"has {num_estimates}, {len(groups)} and {active * queries}"
        )


def checksum(row: bytes | memoryview, index: int, header_crc: int) -> int:
    """CRC-32 of a record without its first four bytes, seeded with its position and the header's checksum."""
    return zlib.crc32(row[4:], zlib.crc32(index.to_bytes(8, "little"), header_crc))
