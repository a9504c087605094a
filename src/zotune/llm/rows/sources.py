"""The rows of a run: read from the files that its options name, and checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zotune.llm.config.data import IN_MEMORY, DataOptions
from zotune.llm.data.readers import LocatedRow, read_located_rows
from zotune.llm.rows.infer import resolve_shape
from zotune.llm.rows.shapes import SHAPES


@dataclass(frozen=True)
class Rows:
    """Rows as they were read, before they become examples, and their source: a file, or the name of an argument."""

    source: str | Path
    rows: Sequence[LocatedRow]


@dataclass(frozen=True)
class UserRows:
    """The training rows and the evaluation rows of a user; either may be missing, but not both."""

    train: Rows | None = None
    eval: Rows | None = None

    @property
    def first(self) -> Rows:
        """The rows that tell the shape: the training rows if there are any."""
        first = self.train or self.eval
        assert first is not None
        return first


def read_files(options: DataOptions) -> UserRows:
    """Read the rows of the files that `options` name.

    Raises:
        UsageError: a file cannot be read; the message says which and why.
    """
    train, evaluation, delimiter = options.train_file, options.eval_file, options.delimiter
    return UserRows(
        None if train is None else Rows(train, list(read_located_rows(train, "train", delimiter))),
        None if evaluation is None else Rows(evaluation, list(read_located_rows(evaluation, "validation", delimiter))),
    )


def read_checked_files(options: DataOptions) -> UserRows | None:
    """Read the rows of the files that `options` name, and check each; None if they name a task, or rows in memory.

    It is quick: neither torch nor a model is needed to say which row is broken.

    Raises:
        UsageError: a file or a row cannot be used; the message names file and line.
    """
    if options.task is not None or options.data_source == IN_MEMORY:
        return None
    given = read_files(options)
    resolved = resolve_shape(options, given.first.rows, given.first.source)
    to_record = SHAPES[resolved.data_format or ""].to_record
    for rows in (given.train, given.eval):
        for row in rows.rows if rows is not None else ():
            to_record(row, resolved)
    return given
