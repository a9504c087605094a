"""Reading rows from JSON lines, CSV and Parquet files, gzipped or not, and from data sets of the Hub.

Each row carries its place, so that error messages name file and line.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import math
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from zotune.errors import UsageError
from zotune.llm.data.row_bounds import BoundedLines, RowBounds
from zotune.system.bounds import (
    DATA_BYTES,
    DATA_VALUES,
    MAX_DEPTH,
    ROWS,
    address_space,
    count_values,
    is_deep,
    memory_below,
)

Row = dict[str, Any]

HUB = "hub:"


class LocatedRow(NamedTuple):
    """A row and its place, such as `reviews.csv, line 7`."""

    place: str
    columns: Row


def read_located_rows(source: Path, split: str = "train") -> Iterator[LocatedRow]:
    """Yield the rows of a file, or of a data set of the Hub: `hub:ORG/NAME`, `hub:ORG/NAME/CONFIGURATION:SPLIT`.

    Args:
        source: the file, or the name of the data set.
        split: the split to read if the name of the data set contains none.

    Raises:
        UsageError: the source does not exist, has an unknown extension, or is malformed; the message names file and
            line.
    """
    if str(source).startswith(HUB):
        return _hub(str(source).removeprefix(HUB), split)
    if not source.is_file():
        raise UsageError(f"there is no file {str(source)!r}; check the path.")
    check_fetched(source)
    kind = source.with_suffix("").suffix if source.suffix == ".gz" else source.suffix
    if kind in (".jsonl", ".json"):
        return _text(source, _json_lines)
    if kind == ".csv":
        return _text(source, _csv)
    if source.suffix == ".parquet":
        return _parquet(source)
    raise UsageError(
        f"{source}: the extension must be .jsonl, .json (one object per line) or .csv, each also with .gz, or "
        f".parquet; "
        f"got {kind!r}."
    )


def check_fetched(path: Path) -> None:
    """Check that a file is itself there, and not the pointer that git-lfs leaves in its place.

    Raises:
        UsageError: it is a pointer.
    """
    with suppress(OSError), path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise UsageError(
                f"{path} is a pointer of git-lfs and not the file itself. Fetch the file with `git lfs pull`."
            )


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of `read_located_rows` without their places."""
    return (row.columns for row in read_located_rows(path))


def _text(path: Path, lines: Any) -> Iterator[LocatedRow]:
    """Yield the rows of a text file; errors of decoding and decompression are reported here."""
    try:
        try:
            with _open(path) as file:
                bounds = RowBounds(str(path))
                yield from lines(BoundedLines(file, str(path), bounds), path, bounds)
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{path}, line {_undecodable_line(path)}: not UTF-8 text ({error.reason}). Save the file as UTF-8."
            ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f"{path} is not a complete gzip file: {error}") from None


def _open(path: Path) -> Any:
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


def _json_lines(lines: BoundedLines, path: Path, bounds: RowBounds) -> Iterator[LocatedRow]:
    for number, line in enumerate(lines, start=1):
        size = lines.end_row()
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        bounds.check_row(place, size, count_values(line))
        try:
            # NaN and infinities, which Python writes although JSON has no such values, count as missing.
            row = json.loads(line, parse_constant=lambda _: None, object_pairs_hook=_object)
        except json.JSONDecodeError as error:
            raise UsageError(f"{place}: malformed JSON ({error.msg} at column {error.colno}).") from None
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{place}: unusable JSON ({str(error).splitlines()[0]}).") from None
        if not isinstance(row, dict):
            raise UsageError(f'{place}: a row must be an object {{"column": value, …}}, got {line.strip()[:40]}')
        if is_deep(row):
            raise UsageError(f"{place}: values are nested more than {MAX_DEPTH} deep; flatten them.")
        yield LocatedRow(place, row)


def _object(pairs: list[tuple[str, Any]]) -> Row:
    """Return a JSON object; a repeated key is an error, because its value would be ambiguous."""
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} appears twice")
    return row


def _csv(lines: BoundedLines, path: Path, bounds: RowBounds) -> Iterator[LocatedRow]:
    with _long_fields():
        yield from _csv_rows(lines, path, bounds)


def _csv_rows(lines: BoundedLines, path: Path, bounds: RowBounds) -> Iterator[LocatedRow]:
    reader = csv.reader(lines, strict=True)
    header: list[str] | None = None
    while True:
        place = f"{path}, line {reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UsageError(f"{place}: malformed CSV ({error}).") from None
        size = lines.end_row()
        if cells is None:
            return
        if not cells:  # an empty line
            continue
        bounds.check_row(place, size, len(cells))
        if header is None:
            header = cells
            _check_names(header, place)
        elif len(cells) != len(header):
            raise UsageError(
                f"{place}: {len(cells)} cells, but the header names {len(header)} columns. "
                'Put a cell that contains a comma or a newline in quotes: "one, two".'
            )
        else:
            yield LocatedRow(place, dict(zip(header, cells, strict=True)))


@contextmanager
def _long_fields() -> Iterator[None]:
    """Within this context a cell may be longer than 131,072 characters, the default limit: as long as its row."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _check_names(names: Sequence[str], place: str) -> None:
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise UsageError(f"{place}: two columns are named {twice!r}; rename one.")


def _parquet(path: Path) -> Iterator[LocatedRow]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            _check_names(file.schema_arrow.names, str(path))
            _check_declared(file.metadata, str(path))
            for rows in _parquet_batches(file, str(path)):
                for row in rows:
                    number += 1
                    yield LocatedRow(f"{path}, row {number}", _without_nan(row))
    except UsageError:
        raise
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}, after row {number}: not a valid Parquet file ({_first_line(error)}).") from None


def _check_declared(metadata: Any, path: str) -> None:
    """Check the counts that a Parquet file states, before anything of such a size is read.

    Raises:
        UsageError: one of them is above its bound.
    """
    ROWS.check(metadata.num_rows, path)
    # A row has a value in each column at least. pyarrow ends the process if one asks for a column of a damaged file.
    DATA_VALUES.check(metadata.num_rows * metadata.num_columns, path)


def _parquet_batches(file: Any, path: str) -> Iterator[list[Row]]:
    """Yield the rows of a Parquet file, some at a time.

    What a file states may be false, a page of zeros is compressed to nothing, and a long text may stand for many. So
    values are counted before they become objects of Python, and the process's memory is limited while they are read.

    Raises:
        UsageError: the rows are above a bound.
    """
    bounds, batches = RowBounds(path), file.iter_batches(batch_size=256)
    limit = address_space() + 2 * DATA_BYTES.value  # for the file's values and for those of Python
    while True:
        try:
            with memory_below(limit):
                batch = next(batches, None)
                if batch is None:
                    return
                bounds.check_rows(batch.num_rows, batch.nbytes, sum(map(_num_values, batch.columns)))
                rows = batch.to_pylist()
        except MemoryError:
            raise UsageError(DATA_BYTES.refusal(path)) from None
        yield rows


def _num_values(array: Any) -> int:
    """Return the number of values in a column of arrow, with those in its lists and structs."""
    from pyarrow import types

    parts: list[Any] = []
    if types.is_struct(array.type):
        parts = array.flatten()
    elif types.is_nested(array.type) and hasattr(array, "flatten"):
        parts = [array.flatten()]
    return len(array) + sum(map(_num_values, parts))


def _hub(name: str, split: str) -> Iterator[LocatedRow]:
    path, _, named = name.partition(":")
    parts = path.split("/")
    if not 1 <= len(parts) <= 3 or not all(parts):
        raise UsageError(
            f"{HUB}{name} is not the name of a data set; write hub:ORG/NAME, if needed with :SPLIT or "
            f"/CONFIGURATION:SPLIT."
        )
    split = named or split
    rows, most = hub_rows("/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split), ROWS.value
    for number, row in enumerate(rows, start=1):
        if number > most:
            raise UsageError(ROWS.refusal(f"{HUB}{path}:{split}"))
        yield LocatedRow(f"{HUB}{path}:{split}, row {number}", _without_nan(row))


def hub_rows(name: str, configuration: str | None, split: str) -> Iterator[Row]:
    """Yield the rows of a split; for each class number, `COLUMN_name` holds its name, because numbers vary by release.

    Raises:
        UsageError: the data set cannot be loaded; the message says why.
    """
    from datasets import load_dataset

    try:
        data = load_dataset(name, configuration, split=split)
    except (OSError, ValueError, ConnectionError, RuntimeError) as error:
        raise UsageError(f"the data set {name} could not be loaded from the Hub: {_first_line(error)}") from None
    for row in data:
        yield class_names(row, data.features)


def class_names(row: Row, features: Mapping[str, Any]) -> Row:
    """Return a row of `datasets` with `COLUMN_name`, the name of the class, for each column of class numbers."""
    from datasets import ClassLabel

    classes = {column: feature for column, feature in features.items() if isinstance(feature, ClassLabel)}
    return {**row, **{f"{column}_name": _class_name(feature, row[column]) for column, feature in classes.items()}}


def _class_name(feature: object, number: int | None) -> str | None:
    return None if number is None or number < 0 else feature.int2str(number)  # type: ignore[attr-defined]


def _without_nan(row: Row) -> Row:
    """Replace NaN, which columns of numbers hold for missing values, by None."""
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
