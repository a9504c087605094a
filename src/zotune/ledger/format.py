"""The ledger's bytes: a header that says what a run is, then one record of fixed size a step.

The specification is docs/reference/ledger-format.md.

    "ZOLEDGER"  u32 version  u32 n  u32 CRC-32  n bytes: JSON, deflated     the header
    u32 CRC-32  u24 passes  E × i8 scales, zeros to a multiple of 4         a record: E estimates,
    loss  G × learning rate  T × coefficient                                G groups, T terms

All numbers are little endian. Loss, rates and coefficients are float32 (float64 if the run tunes float64
weights), and it is these rounded numbers that the run itself applied. A record's checksum covers its place
and the header, so a record that was moved, or comes from another ledger, is no good one.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zotune.errors import UsageError
from zotune.noise.spec import NOISE_VERSION, NOISE_VERSIONS
from zotune.optim.record import StepRecord
from zotune.system.bounds import JSON_BYTES, parse_json

FORMAT_VERSION = 1
MAGIC = b"ZOLEDGER"
PREFIX_SIZE = 20
_LEFT_OUT = 2
_MAX_PASSES = (1 << 24) - 1


class LedgerError(UsageError):
    """The file is no ledger, is damaged, or does not belong to the model or run it is used with."""


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
            LedgerError: it does not have the numbers that this layout has room for.
        """
        given = len(record.scales), len(record.learning_rates), len(record.coefficients)
        if given != (self.num_estimates, self.num_groups, self.num_coefficients):
            raise LedgerError(
                f"the step has {given[0]} estimates, {given[1]} parameter groups and {given[2]} coefficients, but the "
                f"ledger's header says {self.num_estimates}, {self.num_groups} and {self.num_coefficients}."
            )
        codes = [_LEFT_OUT if math.isnan(scale) else scale for scale in record.scales]
        if any(code not in (-1, 0, 1, _LEFT_OUT) for code in codes):
            raise LedgerError(f"a ledger holds steps taken once, not at all or backwards, not {codes} times.")
        row = np.zeros(1, self.record)
        row["passes"][0] = list(min(record.num_forwards, _MAX_PASSES).to_bytes(3, "little"))
        row["scales"][0, : len(codes)] = codes
        with np.errstate(over="ignore"):
            row["numbers"][0] = [record.loss, *record.learning_rates, *record.coefficients]
        return row

    def from_row(self, row: Any, step: int) -> StepRecord:
        """The record of a row."""
        numbers, codes = row["numbers"].tolist(), row["scales"][: self.num_estimates].tolist()
        return StepRecord(
            step,
            numbers[0],
            tuple(numbers[1 : 1 + self.num_groups]),
            tuple(math.nan if code == _LEFT_OUT else float(code) for code in codes),
            tuple(numbers[1 + self.num_groups :]),
            int.from_bytes(bytes(row["passes"].tolist()), "little"),
        )


@dataclass(frozen=True)
class Header:
    """The description of a run: all that its weights depend on besides the base model and the records.

    Attributes:
        layout: of its records.
        method: every constant of the update, as `zotune.ledger.replay.describe` gives them.
        tensors: the tuned tensors in order: name, id, dtype, shape and digest of the base's numbers.
        about: what concerns people and other layers: model, configuration, data, versions.
        noise_version: of the noise specification.
    """

    layout: Layout
    method: dict[str, Any]
    tensors: Sequence[dict[str, Any]]
    about: dict[str, Any] = field(default_factory=dict)
    noise_version: int = NOISE_VERSION

    def to_bytes(self) -> bytes:
        """The header as it is stored."""
        body = zlib.compress(json.dumps(asdict(self), separators=(",", ":")).encode(), 9)
        start = MAGIC + _u32(FORMAT_VERSION) + _u32(len(body))
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
    if len(content) >= 12 and version != FORMAT_VERSION:
        raise LedgerError(
            f"{name} has format version {version}; this zotune reads version {FORMAT_VERSION}. Use the zotune that "
            "wrote it, or one that is newer."
        )
    if len(content) < PREFIX_SIZE + size or len(content) < PREFIX_SIZE:
        raise LedgerError(f"{name} ends within its header, so nothing of it can be used. Start the run again.")
    body = content[PREFIX_SIZE : PREFIX_SIZE + size]
    if zlib.crc32(body, zlib.crc32(content[:16])) != crc:
        raise LedgerError(f"{name} is damaged: its header does not have the checksum it was written with.")
    return _from_body(body, name), PREFIX_SIZE + size


def _from_body(body: bytes, name: str) -> Header:
    try:
        what = f"the header of {name}"
        fields = parse_json(zlib.decompressobj().decompress(body, JSON_BYTES.value + 1), what)
        layout = Layout(**fields.pop("layout"))
        counts = (layout.num_estimates, layout.num_groups, layout.num_coefficients)
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
    """Check the types of a header: a checksum shows that nothing was changed, not that the content has a meaning."""
    if not (isinstance(header.method, dict) and isinstance(header.about, dict) and isinstance(header.tensors, list)):
        raise ValueError("method and about are no objects, or tensors no list")
    if type(header.method.get("seed")) is not int:
        raise ValueError("method has no seed")
    for tensor in header.tensors:
        if not isinstance(tensor, dict) or not {"name", "id", "dtype", "shape", "digest"} <= tensor.keys():
            raise ValueError(f"{str(tensor)[:80]} is no tensor")


def checksum(row: bytes, index: int, header_crc: int) -> int:
    """CRC-32 of a record without its first four bytes, seeded with its position and the header's checksum."""
    return zlib.crc32(row[4:], zlib.crc32(index.to_bytes(8, "little"), header_crc))
