"""The rows of a run: read from the files that its options name, and checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from zotune.errors import UsageError
from zotune.llm.config.data import IN_MEMORY, DataOptions
from zotune.llm.data.readers import HUB, TABLES, LocatedRow, kind_of, read_located_rows
from zotune.llm.data.row_bounds import one_row_at_a_time
from zotune.llm.rows.infer import resolve_shape
from zotune.llm.rows.shapes import SHAPES
from zotune.messages import say

# Rows for evaluation that are read of a stream, beside one of training rows, if no number is given.
MAX_STREAMED_EVALUATION = 1000


@dataclass(frozen=True)
class Rows:
    """Rows as they were read, before they become examples.

    Attributes:
        source: a file, or the name of an argument; several files by their names.
        rows: the rows of all files.
        sizes: the number of rows of each file, if there are several.
    """

    source: str | Path
    rows: Sequence[LocatedRow]
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class RowStreams:
    """Rows that are read one at a time, and once.

    Attributes:
        source: as of `Rows`.
        streams: the rows of each file.
    """

    source: str | Path
    streams: tuple[Iterator[LocatedRow], ...]


@dataclass(frozen=True)
class UserRows:
    """The training rows and the evaluation rows of a user; either may be missing, but not both.

    Attributes:
        stream: the training rows, if they are not held in memory.
    """

    train: Rows | None = None
    eval: Rows | None = None
    stream: RowStreams | None = None

    @property
    def first(self) -> Rows:
        """The rows that tell the shape: the training rows if there are any."""
        first = self.train or self.eval
        assert first is not None
        return first


def stream_files(options: DataOptions) -> UserRows:
    """Open the files of training rows, to read a row at a time, and read the rows for evaluation, which are kept."""
    _check_delimiter(options)
    streams = tuple(read_located_rows(file, "train", options.delimiter) for file in options.train_files)
    source = options.train_files[0] if len(streams) == 1 else options.named_files
    evaluation = None if options.eval_file is None else _evaluation_rows(options.eval_file, options)
    return UserRows(eval=evaluation, stream=RowStreams(source, streams))


def _evaluation_rows(source: Path, options: DataOptions) -> Rows:
    """Read the rows for evaluation beside a stream: all of a file, of which a run draws as many as it is asked for.

    Of a data set of the Hub, which may be far larger than memory, the first ones are read.
    """
    rows = read_located_rows(source, "validation", options.delimiter)
    if not str(source).startswith(HUB):
        return Rows(source, list(rows))
    most = options.num_eval or MAX_STREAMED_EVALUATION
    with one_row_at_a_time():
        first = list(islice(rows, most + 1))
    if len(first) > most:
        say(f"{source} has more than {most} rows, of which a stream (streaming) gives the first {most} for evaluation")
    return Rows(source, first[:most])


def read_files(options: DataOptions) -> UserRows:
    """Read the rows of the files that `options` name.

    Raises:
        UsageError: a file cannot be read; the message says which and why.
    """
    _check_delimiter(options)
    evaluation, delimiter = options.eval_file, options.delimiter
    parts = [list(read_located_rows(file, "train", delimiter)) for file in options.train_files]
    train = None
    if parts:
        source = options.train_files[0] if len(parts) == 1 else options.named_files
        train = Rows(source, [row for part in parts for row in part], tuple(map(len, parts)))
    return UserRows(
        train,
        None if evaluation is None else Rows(evaluation, list(read_located_rows(evaluation, "validation", delimiter))),
    )


def _check_delimiter(options: DataOptions) -> None:
    """Check that a given delimiter has an effect.

    Raises:
        UsageError: no file is a table of text.
    """
    files = [file for file in (*options.train_files, options.eval_file) if file is not None]
    if options.delimiter is not None and files and not any(kind_of(file) in TABLES for file in files):
        raise UsageError(f"delimiter has no effect on {' and '.join(map(str, files))}; it is for .csv and .tsv files.")


def read_checked_files(options: DataOptions) -> UserRows | None:
    """Read the rows of the files that `options` name, and check each; None if they name a task, or rows in memory.

    It is quick: neither torch nor a model is needed to say which row is broken. Rows of a stream are checked as they
    are read.

    Raises:
        UsageError: a file or a row cannot be used; the message names file and line.
    """
    if options.task is not None or options.data_source == IN_MEMORY or options.streaming:
        return None
    given = read_files(options)
    resolved = resolve_shape(options, given.first.rows, given.first.source)
    to_record = SHAPES[resolved.data_format or ""].to_record
    for rows in (given.train, given.eval):
        for row in rows.rows if rows is not None else ():
            to_record(row, resolved)
    return given
