"""Reading rows from data sets of the library `datasets`: of the Hub, or of a folder of `save_to_disk`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from zotune.errors import UsageError
from zotune.llm.data.readers.located import LocatedRow, Row, check_names, first_line, with_class_names, without_nan
from zotune.llm.data.readers.parquet import num_values
from zotune.llm.data.row_bounds import RowBounds, rows_are_kept
from zotune.system.bounds import ROWS

HUB = "hub:"


def read_hub(name: str, split: str) -> Iterator[LocatedRow]:
    """Yield the rows of a data set of the Hub: `ORG/NAME`, `ORG/NAME:SPLIT` or `ORG/NAME/CONFIGURATION:SPLIT`.

    Raises:
        UsageError: it cannot be loaded, or has too many rows.
    """
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
        if number > most and rows_are_kept():
            raise UsageError(ROWS.refusal(f"{HUB}{path}:{split}"))
        yield LocatedRow(f"{HUB}{path}:{split}, row {number}", without_nan(row))


def hub_rows(name: str, configuration: str | None, split: str) -> Iterator[Row]:
    """Yield the rows of a split; for each class number, `COLUMN_name` holds its name, because numbers vary by release.

    Raises:
        UsageError: the data set cannot be loaded; the message says why.
    """
    from datasets import load_dataset

    streamed = {} if rows_are_kept() else {"streaming": True}
    try:
        data = load_dataset(name, configuration, split=split, **streamed)
        for row in data:
            yield class_names(row, data.features or {})
    except UsageError:
        raise
    except (OSError, ValueError, ConnectionError, RuntimeError) as error:
        raise UsageError(f"the data set {name} could not be loaded from the Hub: {first_line(error)}") from None


def class_names(row: Row, features: Mapping[str, Any]) -> Row:
    """Return a row of `datasets` whose class numbers know their names, which `COLUMN_name` holds too."""
    from datasets import ClassLabel

    names = {column: feature.names for column, feature in features.items() if isinstance(feature, ClassLabel)}
    named = with_class_names(row, names)
    return {**named, **{f"{column}_name": getattr(named[column], "name", None) for column in names}}


def is_saved(folder: Path) -> bool:
    """Return whether a folder is one of `save_to_disk`, of a data set or of its splits."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def read_saved(folder: Path, split: str) -> Iterator[LocatedRow]:
    """Yield the rows of a folder of `save_to_disk`; of one with splits, those of a split.

    Raises:
        UsageError: the folder cannot be read, lacks the split, or is above a bound.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.name for path in folder.iterdir() if (path / "state.json").is_file())
        if split not in splits:
            raise UsageError(
                f"{folder} holds the splits {', '.join(splits) or '(none)'}, and none named {split}; name the folder "
                f"of one: {folder / (splits or ['SPLIT'])[0]}."
            )
        folder = folder / split
    number, bounds = 0, RowBounds(str(folder))
    try:
        for rows, features in _saved_batches(folder, bounds):
            for row in rows:
                number += 1
                yield LocatedRow(f"{folder}, row {number}", without_nan(class_names(row, features)))
    except UsageError:
        raise
    except _damage() as error:
        raise UsageError(
            f"{folder}, after row {number}: not a valid folder of save_to_disk ({first_line(error)})."
        ) from None


def _saved_batches(folder: Path, bounds: RowBounds) -> Iterator[tuple[list[Row], Mapping[str, Any]]]:
    """Yield the rows of a folder, some at a time, and their features; values are counted before they are made."""
    from datasets import load_from_disk

    data = load_from_disk(str(folder))
    check_names(data.column_names, str(folder))
    for table in data.with_format("arrow").iter(256):
        for batch in table.to_batches():
            batch.validate(full=True)  # what a damaged file states may lie outside of it
            bounds.check_rows(batch.num_rows, batch.nbytes, sum(map(num_values, batch.columns)))
            yield batch.to_pylist(), data.features


def _damage() -> tuple[type[Exception], ...]:
    """Return what reading a damaged folder may raise."""
    import pyarrow

    return (pyarrow.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError)
