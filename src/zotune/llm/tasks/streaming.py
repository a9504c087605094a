"""Training rows of a stream: read one at a time, kept as tokens on the disk, and drawn in any order from there.

Nothing needs a buffer in which rows are shuffled: a run draws from all rows that were read, in the order that its seed
gives, as from rows in memory. So it resumes to the same bits, as long as the stream begins with the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TypeVar

from zotune.errors import UsageError
from zotune.llm.config.data import DataOptions
from zotune.llm.data.examples import Example
from zotune.llm.data.mixing import mixed
from zotune.llm.data.packing import packed
from zotune.llm.data.readers import LocatedRow
from zotune.llm.data.row_bounds import one_row_at_a_time
from zotune.llm.data.stored_rows import SelectedRows, StoredRows
from zotune.llm.data.tokenization import Encoded, Encoder
from zotune.llm.rows.sources import Rows, RowStreams, UserRows, stream_files
from zotune.llm.tasks.encoding import encode_row, window_length

Row = TypeVar("Row")

# Rows at the beginning of a stream that tell the shape and the labels of all.
HEAD = 1000


@dataclass(frozen=True)
class Head:
    """The beginning of a stream: rows that are held out of training, and those that tell the shape of all."""

    held_out: Sequence[LocatedRow]
    rows: Rows


def split_head(given: RowStreams, options: DataOptions) -> tuple[Head, RowStreams]:
    """Return the beginning of a stream, and the stream of its training rows, among which are those of the beginning.

    Raises:
        UsageError: there is no training row.
    """
    streams, num_dev = given.streams, options.num_dev or 0
    shares = [len(range(i, num_dev, len(streams))) for i in range(len(streams))]
    held_out = [row for rows, n in zip(streams, shares, strict=True) for row in islice(rows, n)]
    heads = [list(islice(rows, max(1, HEAD // len(streams)))) for rows in streams]
    if not all(heads):
        raise UsageError(f"{given.source} contains no row to train on.")
    head = Rows(given.source, [*held_out, *(row for rows in heads for row in rows)])
    again = tuple(chain(rows, rest) for rows, rest in zip(heads, streams, strict=True))
    return Head(held_out, head), RowStreams(given.source, again)


def head_of_files(options: DataOptions) -> tuple[UserRows, RowStreams]:
    """Return the first rows of the files of a stream, which show what a run on it reads, and all its training rows."""
    files = stream_files(options)
    assert files.stream is not None
    with one_row_at_a_time():
        head, stream = split_head(files.stream, options)
        return UserRows(head.rows, files.eval), stream


def store_rows(
    encode: Encoder,
    given: RowStreams,
    to_example: Callable[[LocatedRow], Example],
    reads: Callable[[Encoded], Encoded],
    options: DataOptions,
) -> tuple[Sequence[Encoded], str]:
    """Return the training rows as tokens on the disk, and a note on how many there are.

    Of several files each gives as many rows as its weight asks for, by default all the same number.

    Args:
        encode: the function from examples to tokens.
        given: the rows.
        to_example: the function from rows to examples.
        reads: returns the part of an example that the objective reads.
        options: the options of the run.

    Raises:
        UsageError: a row cannot be used, or there is no room on the disk.
    """
    sizes: list[int] = []
    streams = (_encoded(encode, map(to_example, rows), options) for rows in given.streams)
    stored = StoredRows(map(reads, _shares(streams, len(given.streams), options, sizes)))
    note = f"{given.source}: {len(stored)} rows are kept as tokens on the disk (streaming), and drawn by the seed"
    if not options.train_file_weights:
        return stored, note
    return SelectedRows(stored, mixed(sizes, options.train_file_weights, options.data_seed)), note


def count_rows(
    encode: Encoder, given: RowStreams, to_example: Callable[[LocatedRow], Example], options: DataOptions
) -> int:
    """Return how many rows `store_rows` would give, none of which is kept.

    Raises:
        UsageError: a row cannot be read. What is in it is looked at only if the number depends on it.
    """
    depends = options.packing or options.long_rows == "drop"
    streams = (_encoded(encode, map(to_example, rows), options) if depends else rows for rows in given.streams)
    sizes: list[int] = []
    with one_row_at_a_time():
        number = sum(1 for _ in _shares(streams, len(given.streams), options, sizes))
    return len(mixed(sizes, options.train_file_weights, options.data_seed)) if options.train_file_weights else number


def _shares(streams: Iterable[Iterable[Row]], number: int, options: DataOptions, sizes: list[int]) -> Iterator[Row]:
    """Yield as many rows of each of some streams as a run takes, and add their numbers to `sizes`."""
    weights, most = options.train_file_weights or (1.0,) * number, rows_needed(options)
    for stream, weight in zip(streams, weights, strict=True):
        sizes.append(0)
        for row in islice(stream, None if most is None else math.ceil(most * weight / sum(weights))):
            sizes[-1] += 1
            yield row


def _encoded(encode: Encoder, examples: Iterator[Example], options: DataOptions) -> Iterator[Encoded]:
    if options.packing:
        yield from packed(map(encode.document, examples), window_length(encode, options))
        return
    for example in examples:
        encoded = encode_row(encode, example, options, example.place)
        if encoded is not None:
            yield encoded


def rows_needed(options: DataOptions) -> int | None:
    """Return how many training rows are read: as many as are asked for, else as the steps read; None for all."""
    most, epochs = getattr(options, "rows_of_all_steps", None), getattr(options, "num_train_epochs", None)
    return most if options.num_train is None and epochs is None else options.num_train
