"""Reading the rows of a Parquet file, whose counts and values are bounded before they become objects of Python."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from zotune.errors import UsageError
from zotune.llm.data.readers.located import LocatedRow, Row, check_names, first_line, with_class_names, without_nan
from zotune.llm.data.row_bounds import RowBounds, rows_are_kept
from zotune.system.bounds import DATA_BYTES, DATA_VALUES, ROWS, address_space, memory_below, parse_json

# Under this key `datasets` writes the features of a data set.
_FEATURES = b"huggingface"


def read_parquet(path: Path) -> Iterator[LocatedRow]:
    """Yield the rows of a Parquet file.

    Raises:
        UsageError: the file is damaged, or above a bound.
    """
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            check_names(file.schema_arrow.names, str(path))
            _check_declared(file.metadata, str(path))
            names = _class_names(file.schema_arrow.metadata, str(path))
            for rows in _parquet_batches(file, str(path)):
                for row in rows:
                    number += 1
                    yield LocatedRow(f"{path}, row {number}", with_class_names(without_nan(row), names))
    except UsageError:
        raise
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}, after row {number}: not a valid Parquet file ({first_line(error)}).") from None


def _class_names(metadata: Mapping[bytes, bytes] | None, path: str) -> dict[str, list[str]]:
    """Return the names of classes by column, where `datasets` has written them into a file's metadata.

    Raises:
        UsageError: the metadata are above a bound.
    """
    try:
        features = parse_json((metadata or {})[_FEATURES], path)["info"]["features"].items()
        labels = {column: feature["names"] for column, feature in features if feature.get("_type") == "ClassLabel"}
        return {column: names for column, names in labels.items() if all(isinstance(name, str) for name in names)}
    except UsageError:
        raise
    except (LookupError, AttributeError, TypeError, ValueError, RecursionError):
        return {}


def _check_declared(metadata: Any, path: str) -> None:
    """Check the counts that a Parquet file states, before anything of such a size is read.

    Of rows that are let go once they are used, only each is bounded.

    Raises:
        UsageError: one of them is above its bound.
    """
    if not rows_are_kept():
        return
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
                bounds.check_rows(batch.num_rows, batch.nbytes, sum(map(num_values, batch.columns)))
                rows = batch.to_pylist()
        except MemoryError:
            raise UsageError(DATA_BYTES.refusal(path)) from None
        yield rows


def num_values(array: Any) -> int:
    """Return the number of values in a column of arrow, with those in its lists and structs."""
    from pyarrow import types

    parts: list[Any] = []
    if types.is_struct(array.type):
        parts = array.flatten()
    elif types.is_nested(array.type) and hasattr(array, "flatten"):
        parts = [array.flatten()]
    return len(array) + sum(map(num_values, parts))
