"""Rows as they come: JSON lines, CSV and Parquet files, gzipped or not, and data sets of the Hub.

Each row knows its place, so that whatever is wrong with it is said by file and line.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from zotune.errors import UsageError

Row = dict[str, Any]

HUB = "hub:"


class Located(NamedTuple):
    """A row and where it stands: `reviews.csv, line 7`."""

    place: str
    columns: Row


def located_rows(source: Path, split: str = "train") -> Iterator[Located]:
    """The rows of a file, or of a data set of the Hub: `hub:ORG/NAME`, `hub:ORG/NAME/CONFIGURATION:SPLIT`.

    Args:
        source: the file, or the data set's name.
        split: the split of a data set that names none.

    Raises:
        UsageError: there is no such source, its ending is not known, or it is broken, by file and line.
    """
    if str(source).startswith(HUB):
        return _hub(str(source).removeprefix(HUB), split)
    if not source.is_file():
        raise UsageError(f"there is no file {str(source)!r}.")
    kind = source.with_suffix("").suffix if source.suffix == ".gz" else source.suffix
    if kind in (".jsonl", ".json"):
        return _text(source, _json_lines)
    if kind == ".csv":
        return _text(source, _csv)
    if source.suffix == ".parquet":
        return _parquet(source)
    raise UsageError(
        f"{source}: files end in .jsonl, .json (a line an object) or .csv, each also with .gz, or in .parquet; "
        f"got {kind!r}."
    )


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of `located_rows` without their places."""
    return (row.columns for row in located_rows(path))


def _text(path: Path, lines: Any) -> Iterator[Located]:
    """The rows of a text file; what is wrong with its bytes is said here."""
    try:
        try:
            with _open(path) as file:
                yield from lines(file, path)
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}, line {_undecodable_line(path)}: not UTF-8 text ({error.reason}).") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f"{path} is not a whole gzip file: {error}") from None


def _open(path: Path) -> Any:
    """Its text; a byte-order mark at its beginning is none of it, and ends of lines stay as they are."""
    opened = _bytes_of(path)
    return io.TextIOWrapper(opened, encoding="utf-8-sig", newline="")


def _bytes_of(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _undecodable_line(path: Path) -> int:
    """The first line that is not UTF-8: a decoder knows only the place in its buffer."""
    with _bytes_of(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1


def _json_lines(file: io.TextIOBase, path: Path) -> Iterator[Located]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            # NaN and the infinities, which Python writes though JSON has none, are missing values.
            row = json.loads(line, parse_constant=lambda _: None, object_pairs_hook=_object)
        except json.JSONDecodeError as error:
            raise UsageError(f"{place}: broken JSON ({error.msg} at column {error.colno}).") from None
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{place}: unusable JSON ({str(error).splitlines()[0]}).") from None
        if not isinstance(row, dict):
            raise UsageError(f'{place}: a row must be an object {{"column": value, …}}, got {line.strip()[:40]}')
        yield Located(place, row)


def _object(pairs: list[tuple[str, Any]]) -> Row:
    """A JSON object; which of two values of one key is meant, nobody can tell."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} is there twice")
    return row


def _csv(file: io.TextIOBase, path: Path) -> Iterator[Located]:
    with _long_fields():
        yield from _csv_rows(file, path)


def _csv_rows(file: io.TextIOBase, path: Path) -> Iterator[Located]:
    reader = csv.reader(file, strict=True)
    header: list[str] | None = None
    while True:
        place = f"{path}, line {reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UsageError(f"{place}: broken CSV ({error}).") from None
        if cells is None:
            return
        if not cells:  # an empty line
            continue
        if header is None:
            header = cells
            _check_names(header, place)
        elif len(cells) != len(header):
            raise UsageError(
                f"{place}: {len(cells)} cells, but the header names {len(header)} columns. "
                'A cell with a comma or a newline in it stands in quotes: "one, two".'
            )
        else:
            yield Located(place, dict(zip(header, cells, strict=True)))


@contextmanager
def _long_fields() -> Iterator[None]:
    """Within this context a cell may be as long as memory allows, not 131,072 characters."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _check_names(names: Sequence[str], place: str) -> None:
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise UsageError(f"{place}: two columns are called {twice[0]!r}; rename one.")


def _parquet(path: Path) -> Iterator[Located]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            _check_names(file.schema_arrow.names, str(path))
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield Located(f"{path}, row {number}", _without_nan(row))
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{path}, after row {number}: not a sound Parquet file ({_first_line(error)}).") from None


def _hub(name: str, split: str) -> Iterator[Located]:
    path, _, named = name.partition(":")
    parts = path.split("/")
    if not 1 <= len(parts) <= 3 or not all(parts):
        raise UsageError(
            f"{HUB}{name} names no data set: hub:ORG/NAME, with :SPLIT or /CONFIGURATION:SPLIT behind it if need be."
        )
    split = named or split
    rows = hub_rows("/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split)
    for number, row in enumerate(rows, start=1):
        yield Located(f"{HUB}{path}:{split}, row {number}", _without_nan(row))


def hub_rows(name: str, configuration: str | None, split: str) -> Iterator[Row]:
    """The rows of a split; beside each class number, `COLUMN_name` is its name, for numbers differ between releases.

    Raises:
        UsageError: the data set cannot be had; the message says why.
    """
    from datasets import ClassLabel, load_dataset

    try:
        data = load_dataset(name, configuration, split=split)
    except (OSError, ValueError, ConnectionError, RuntimeError) as error:
        raise UsageError(f"the data set {name} could not be loaded from the Hub: {_first_line(error)}") from None
    classes = {column: feature for column, feature in data.features.items() if isinstance(feature, ClassLabel)}
    for row in data:
        yield {**row, **{f"{column}_name": _class_name(feature, row[column]) for column, feature in classes.items()}}


def _class_name(feature: object, number: int | None) -> str | None:
    return None if number is None or number < 0 else feature.int2str(number)  # type: ignore[attr-defined]


def _without_nan(row: Row) -> Row:
    """Columns of numbers hold NaN where a value is missing."""
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
