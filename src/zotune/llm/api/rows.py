"""Rows in memory: a list of dicts, a data set of `datasets`, or any iterable of dicts, as the rows of a file are read.

A run holds its rows, because each pass over them is in a new random order. So a stream without a length is read to its
end, up to a bound, or up to the number of rows that is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sized
from itertools import islice
from pathlib import Path
from typing import Any

from zotune.errors import UsageError
from zotune.llm.data.readers import LocatedRow, class_names, read_located_rows
from zotune.llm.rows.sources import Rows, RowStreams
from zotune.messages import say

# Rows of a stream that are held at most without a number from the caller.
MAX_STREAMED_ROWS = 100_000

_TOKENISED = frozenset({"input_ids", "attention_mask", "token_type_ids", "labels", "position_ids"})


def rows_of(
    dataset: Any, name: str, most: int | None = None, split: str = "train", delimiter: str | None = None
) -> Rows:
    """Return rows in memory with the place of each, or the rows of a file that is named.

    Args:
        dataset: a sequence or another iterable of dicts, or the path of a file (or `hub:ORG/NAME`).
        name: the argument's name, for messages; a row's place is `name[index]`.
        most: the rows to read of a stream without a length; None for all of them, up to `MAX_STREAMED_ROWS`.
        split: the split to read of a data set of the Hub whose name contains none.
        delimiter: the delimiter of a CSV file; None: it is found.

    Raises:
        UsageError: it holds something else than rows, or is a longer stream.

    >>> rows_of([{"text": "good", "label": 1}], "train_dataset").rows
    [LocatedRow(place='train_dataset[0]', columns={'text': 'good', 'label': 1})]
    """
    if isinstance(dataset, str | Path):
        return Rows(dataset, list(read_located_rows(Path(dataset), split, delimiter)))
    _check_is_rows(dataset, name)
    rows: Iterator[tuple[int, Any]] = enumerate(_raw_rows(dataset))
    if not isinstance(dataset, Sized):
        rows = _bounded(rows, name, most)
    return Rows(name, [LocatedRow(f"{name}[{i}]", _columns(row, f"{name}[{i}]")) for i, row in rows])


def stream_of(dataset: Any, name: str, split: str = "train", delimiter: str | None = None) -> RowStreams:
    """Return rows to read one at a time, each with its place; arguments and errors are those of `rows_of`.

    >>> rows = stream_of(({"text": f"row {i}"} for i in range(3)), "train_dataset")
    >>> next(rows.streams[0]).columns
    {'text': 'row 0'}
    """
    if isinstance(dataset, str | Path):
        return RowStreams(dataset, (read_located_rows(Path(dataset), split, delimiter),))
    _check_is_rows(dataset, name)
    every = enumerate(_raw_rows(dataset))
    rows = (LocatedRow(f"{name}[{i}]", _columns(row, f"{name}[{i}]")) for i, row in every)
    return RowStreams(name, (rows,))


def _check_is_rows(dataset: Any, name: str) -> None:
    """Refuse what could be iterated over, but not row by row."""
    kind = type(dataset).__name__
    if isinstance(dataset, Mapping):
        names = ", ".join(list(map(repr, dataset))[:5])
        raise UsageError(
            f"{name} is a {kind} with the keys {names}, not rows. Pass one split of a DatasetDict, such as "
            f'dataset["train"]; of columns make a data set, datasets.Dataset.from_dict(columns).'
        )
    if hasattr(dataset, "to_dict") and hasattr(dataset, "iloc"):
        raise UsageError(f'{name} is a {kind}, not rows: pass frame.to_dict("records").')
    if hasattr(dataset, "collate_fn"):
        raise UsageError(f"{name} is a {kind}, which yields batches, not rows: pass its dataset.")
    if not isinstance(dataset, Iterable) and not hasattr(dataset, "__getitem__"):
        raise UsageError(
            f"{name} is a {kind}; it must be a list of dicts, a datasets.Dataset, another iterable of dicts, or the "
            "path of a file."
        )


def _raw_rows(dataset: Any) -> Iterator[Any]:
    """Yield the rows of any data set, of one of `datasets` as plain Python values and with the names of classes."""
    if type(dataset).__module__.startswith("datasets."):
        features = dataset.features or {}
        return (class_names(row, features) for row in dataset.with_format(None))
    if isinstance(dataset, Iterable):
        return iter(dataset)
    return (dataset[i] for i in range(len(dataset)))  # a map-style data set of torch


def _bounded(rows: Iterator[tuple[int, Any]], name: str, most: int | None) -> Iterator[tuple[int, Any]]:
    """Yield the first `most` rows of a stream, or all.

    Raises:
        UsageError: the stream has more than `MAX_STREAMED_ROWS` rows, and no number is given.
    """
    if most is not None:
        say(f"{name} is a stream: its first {most} rows are read, and held in memory")
        yield from islice(rows, most)
        return
    for i, row in rows:
        if i >= MAX_STREAMED_ROWS:
            number = "num_train" if name == "train_dataset" else "num_eval"
            raise UsageError(
                f"{name} is a stream of more than {MAX_STREAMED_ROWS:,} rows, and a run holds all its rows in memory. "
                f"Say how many to read with {number}, pass dataset.take(N), or give streaming=True to train()."
            )
        yield i, row


def _columns(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        hint = ' For texts alone pass [{"text": text} for text in texts].' if isinstance(row, str) else ""
        raise UsageError(f'{place} is a {type(row).__name__}; a row must be a dict, {{"column": value, …}}.{hint}')
    columns = dict(row)
    odd = next((key for key in columns if not isinstance(key, str)), None)
    if odd is not None:
        raise UsageError(f"{place}: the column {odd!r} has a name that is no text.")
    if "input_ids" in columns and columns.keys() <= _TOKENISED:
        raise UsageError(
            f"{place} is tokenised already ({', '.join(columns)}). Pass the rows before tokenisation: zotune tokenises "
            "prompt and answer together, and scores the answer's tokens."
        )
    return plain_row(columns)


def plain_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of Python's own values: numbers and lists in place of those of NumPy and torch, None for NaN.

    >>> import numpy as np
    >>> plain_row({"label": np.int64(1), "choices": ("a", "b"), "score": float("nan")})
    {'label': 1, 'choices': ['a', 'b'], 'score': None}
    """
    return {key: _plain(value) for key, value in row.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    # NumPy's scalars and arrays, and the tensors of torch.
    plain = value.tolist() if hasattr(value, "tolist") and hasattr(value, "dtype") else value
    return None if isinstance(plain, float) and math.isnan(plain) else plain
