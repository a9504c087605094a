"""Bounds on what is read from a file that somebody else may have made.

A kilobyte can ask for terabytes: as a count, as compressed zeros, as text of many tiny values. Each bound is far above
what honest files hold. It is checked before anything of that size is made, and an environment variable raises it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zotune.errors import UsageError

# Bounds decide whether something is read, never what is read.
COUNTS_FOR_RESULTS = "never"


@dataclass(frozen=True)
class Bound:
    """The most that is read of something.

    Attributes:
        variable: the environment variable that sets another bound.
        default: the bound without it.
        unit: what is counted, in the plural.
    """

    variable: str
    default: int
    unit: str

    @property
    def value(self) -> int:
        """The bound that holds now.

        Raises:
            UsageError: the environment variable is no whole number above 0.
        """
        text = os.environ.get(self.variable, "")
        if not text:
            return self.default
        if not (text.isascii() and text.isdigit() and 0 < len(text) <= 18 and int(text)):
            raise UsageError(f"{self.variable} is {text[:40]!r}; it must be a whole number of {self.unit} above 0.")
        return int(text)

    def check(self, found: int, what: str) -> None:
        """Check a count.

        Args:
            found: the count.
            what: what is counted, for the error.

        Raises:
            UsageError: it is above the bound; the message gives the bound and says how to raise it.

        >>> Bound("ZOTUNE_MAX_ROWS", 3, "rows").check(4, "a.csv")
        Traceback (most recent call last):
        zotune.errors.UsageError: a.csv: more than 3 rows are not read from a file that somebody else may have made. \
If you trust it, set the environment variable ZOTUNE_MAX_ROWS to a larger number.
        """
        if found > self.value:
            raise UsageError(self.refusal(what))

    def refusal(self, what: str) -> str:
        """Return the message that refuses something above the bound."""
        return (
            f"{what}: more than {self.value:,} {self.unit} are not read from a file that somebody else may have made. "
            f"If you trust it, set the environment variable {self.variable} to a larger number."
        )


RECIPE_BYTES = Bound("ZOTUNE_MAX_RECIPE_BYTES", 1 << 20, "bytes")
JSON_BYTES = Bound("ZOTUNE_MAX_JSON_BYTES", 1 << 26, "bytes")
# The header of a ledger of 100,000 tensors has a million values.
JSON_VALUES = Bound("ZOTUNE_MAX_JSON_VALUES", 1 << 22, "values")
# A million steps of a thousand queries take half as much.
LEDGER_BYTES = Bound("ZOTUNE_MAX_LEDGER_BYTES", 1 << 33, "bytes")
ROW_LENGTH = Bound("ZOTUNE_MAX_ROW_LENGTH", 1 << 24, "characters in a row")
ROW_VALUES = Bound("ZOTUNE_MAX_ROW_VALUES", 1 << 20, "values in a row")
ROWS = Bound("ZOTUNE_MAX_ROWS", 1 << 21, "rows")
DATA_BYTES = Bound("ZOTUNE_MAX_DATA_BYTES", 1 << 31, "bytes of rows")
DATA_VALUES = Bound("ZOTUNE_MAX_DATA_VALUES", 1 << 25, "values")
WIDTH = Bound("ZOTUNE_MAX_WIDTH", 10_000, "characters of width")
COUNT = Bound("ZOTUNE_MAX_COUNT", 1 << 16, "queries, ranks or tokens")
LAYERS = Bound("ZOTUNE_MAX_LAYERS", 1 << 12, "layers or experts")
CHAT_MEMORY = Bound("ZOTUNE_MAX_CHAT_MEMORY", 1 << 30, "bytes of memory in one rendering")

# Lists and objects within lists and objects: what reads values by recursion reads this many.
MAX_DEPTH = 64

BOUNDS = (
    *(RECIPE_BYTES, JSON_BYTES, JSON_VALUES, LEDGER_BYTES, ROW_LENGTH, ROW_VALUES, ROWS, DATA_BYTES, DATA_VALUES),
    *(WIDTH, COUNT, LAYERS, CHAT_MEMORY),
)
"""All bounds, for the docs and the tests."""


def count_values(text: str | bytes) -> int:
    """Return at least the number of values in a JSON text; commas and brackets in its strings count too.

    >>> count_values('{"a": [1, 2, []]}')
    6
    """
    if isinstance(text, str):
        return 1 + text.count(",") + text.count("[") + text.count("{")
    return 1 + text.count(b",") + text.count(b"[") + text.count(b"{")


def is_deep(value: Any) -> bool:
    """Return whether lists and objects are nested more than `MAX_DEPTH` deep in a value.

    >>> is_deep({"a": [1, 2]}), is_deep(json.loads("[" * 65 + "]" * 65))
    (False, True)
    """
    level, depth = [value], 0
    while level := [part for part in level if isinstance(part, (list, dict))]:
        depth += 1
        if depth > MAX_DEPTH:
            return True
        level = [inner for part in level for inner in (part.values() if isinstance(part, dict) else part)]
    return False


def parse_json(text: str | bytes, what: str) -> Any:
    """Parse JSON of a bounded size with a bounded number of values.

    Raises:
        UsageError: the text is larger than `JSON_BYTES`, or has more values than `JSON_VALUES`.
        ValueError, RecursionError: it is no JSON, or nested more than `MAX_DEPTH` deep.
    """
    JSON_BYTES.check(len(text), what)
    JSON_VALUES.check(count_values(text), what)
    value = json.loads(text)
    if is_deep(value):
        raise ValueError(f"values are nested more than {MAX_DEPTH} deep")
    return value


def read_json(path: Path) -> Any:
    """Read a JSON file as `parse_json` does.

    Raises:
        UsageError, ValueError, RecursionError: as `parse_json`.
        OSError: the file cannot be read.
    """
    return parse_json(read_bytes(path, JSON_BYTES), str(path))


def read_bytes(path: Path, bound: Bound) -> bytes:
    """Read a file that is not larger than a bound.

    Raises:
        UsageError: it is larger.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size  # 0 for what is no regular file
        bound.check(size, str(path))
        parts, size = [], 0
        while part := file.read(1 << 24):
            size += len(part)
            bound.check(size, str(path))
            parts.append(part)
    return b"".join(parts)


def address_space() -> int:
    """Return the bytes of addresses that this process uses, more than its memory; 0 where the system does not say."""
    with suppress(OSError, ValueError):
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return 0


@contextmanager
def memory_below(limit: int) -> Iterator[None]:
    """Within this context a request that would take the process's `address_space` above a limit raises a MemoryError.

    For libraries that trust the counts of a file. The limit is one of the whole process, other threads included, so it
    is for short stretches. Where the system has no such limits, nothing is limited.
    """
    if not address_space():
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    present = min((one for one in (soft, hard) if one != resource.RLIM_INFINITY), default=limit)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (min(limit, present), hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
