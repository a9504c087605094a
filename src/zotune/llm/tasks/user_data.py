"""Loading the user's own rows: finding their shape from their columns, and splitting them into examples.

As for a task, a random permutation with `data_seed` starts with the training rows and ends with the held-out rows; if
only some of the evaluation rows are asked for, another one with the same seed chooses them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np

from zotune.errors import UsageError
from zotune.llm.config.data import IN_MEMORY, DataOptions
from zotune.llm.data.chat_template import reads_clock
from zotune.llm.data.examples import Example, Splits
from zotune.llm.data.mixing import mixed
from zotune.llm.data.readers import LocatedRow
from zotune.llm.rows.chat_notes import check_chat_options, template_notes
from zotune.llm.rows.infer import check_masked, resolve_shape
from zotune.llm.rows.notes import (
    chat_notes,
    control_token_notes,
    ended_rows_notes,
    label_notes,
    shape_note,
    unread_notes,
)
from zotune.llm.rows.records import Record
from zotune.llm.rows.rendering import example_of, is_written_as_chat
from zotune.llm.rows.shapes import SHAPES
from zotune.llm.rows.sources import Rows, UserRows, read_files
from zotune.llm.scoring.accuracy import Measure
from zotune.llm.scoring.objectives import Objective
from zotune.llm.scoring.rewards import GeneratedObjective
from zotune.llm.tasks.row_scoring import SCORING, measure_of

# Options whose defaults are inferred from the rows.
RESOLVED_OPTIONS = ("data_format", "template", "verbalizer", "chat_template", "chat_date")

# A row → its example.
ToExample = Callable[[LocatedRow], Example]


@dataclass(frozen=True)
class Data:
    """Examples with their objective and their metric.

    Attributes:
        options: for the user's own files with the inferred shape, template and verbalizer, so that these are saved.
        notes: the inferred shape, and warnings about the rows; one line each.
        generated: the objective in place of `objective`, if each evaluation generates text.
        to_example: the function from further rows of the user to examples.
    """

    splits: Splits
    objective: Objective
    measure: Measure
    options: DataOptions
    notes: tuple[str, ...]
    generated: GeneratedObjective | None = None
    to_example: ToExample | None = None


def load_user_data(
    options: DataOptions, tokenizer: Any, *, masked: bool = False, given: UserRows | None = None
) -> Data:
    """Load examples from the user's own files, or from rows that are given.

    Args:
        options: the files, and the conversion of their rows.
        tokenizer: the model's tokenizer, with its chat template and end-of-text token; rows with labels need none.
        masked: whether the model fills in masks; it then needs rows with labels.
        given: the rows in place of files.

    Raises:
        UsageError: a file or a row cannot be used; the message says which and why.
    """
    if given is None and options.data_source == IN_MEMORY:
        raise UsageError(
            "these options are those of a run from Python, whose rows were in memory: give --train-file or --eval-file "
            "with the rows, and --data-source sample."
        )
    given = read_files(options) if given is None else given
    options = resolve_shape(options, given.first.rows, given.first.source)
    if masked:
        check_masked(options)
    to_record = SHAPES[options.data_format or ""].to_record
    options = _with_date(options, (to_record(row, options) for row in given.first.rows), tokenizer)

    def to_example(row: LocatedRow) -> Example:
        return example_of(to_record(row, options), options, tokenizer)

    splits, chosen_notes = _split(given, options, to_example)
    check_chat_options(options, [*splits.train, *splits.dev, *splits.test], tokenizer)
    notes = (
        *(shape_note(options, given, tokenizer), *unread_notes(options, given)),
        *(*chosen_notes, *label_notes(options), *ended_rows_notes(options, given, tokenizer)),
        *chat_notes(options, given, tokenizer),
        *template_notes(options, (to_record(row, options) for row in given.first.rows), tokenizer),
        *(*control_token_notes(splits, options, tokenizer), *_overlap_notes(splits)),
    )
    objective, _ = SCORING[options.data_format or ""]
    return Data(splits, objective, measure_of(options), options, notes, to_example=to_example)


def _with_date(options: DataOptions, records: Iterable[Record], tokenizer: Any) -> DataOptions:
    """Return the options with the date of chats, if the chat template writes one: today's unless it is given."""
    if not reads_clock(tokenizer) or not any(is_written_as_chat(record, options, tokenizer) for record in records):
        return options.model_copy(update={"chat_date": None})
    return options.model_copy(update={"chat_date": options.chat_date or date.today().isoformat()})


def _chosen(rows: Sequence[Any], options: DataOptions) -> tuple[Sequence[Any], list[str]]:
    """Return `num_eval` of the evaluation rows, drawn with `data_seed` and in their order, and a note that says so.

    Files are often sorted, by label for instance, so the first rows would not stand for all.
    """
    if options.num_eval is None or options.num_eval >= len(rows):
        return rows, []
    order = np.random.RandomState(options.data_seed).permutation(len(rows))
    note = f"{options.num_eval} of {len(rows)} evaluation rows, drawn at random with data_seed {options.data_seed}"
    return [rows[i] for i in sorted(order[: options.num_eval])], [note] if options.num_eval else []


def _split(given: UserRows, options: DataOptions, to_example: ToExample) -> tuple[Splits, list[str]]:
    """Split rows into examples for training, held out and for evaluation; without evaluation rows the latter two agree.

    Without training rows all examples are for evaluation.
    """
    train, dev = _split_training(given.train, options, to_example)
    if given.eval is None:
        test, notes = _chosen(dev, options)
        return Splits(train, dev, tuple(test)), notes
    if not given.eval.rows:
        raise UsageError(f"{given.eval.source} contains no row.")
    rows, notes = _chosen(given.eval.rows, options)
    return Splits(train, dev, tuple(map(to_example, rows))), notes


def _split_training(
    given: Rows | None, options: DataOptions, to_example: ToExample
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Split the rows for training into those to train on and those held out."""
    if given is None:
        return (), ()
    examples = tuple(map(to_example, given.rows))
    order = np.random.RandomState(options.data_seed).permutation(len(examples))
    num_dev = len(examples) // 5 if options.num_dev is None else options.num_dev
    num_train = options.num_train or len(examples) - num_dev
    if num_train < 1 or num_train + num_dev > len(examples):
        raise UsageError(
            f"{given.source} has {len(examples)} rows, too few for {max(num_train, 1)} to train on and {num_dev} "
            "held out. Lower --num-train or --num-dev."
        )
    chosen = _mixed(order[:num_train].tolist(), given.sizes, options)
    train = tuple(examples[i] for i in chosen)
    return train, tuple(examples[i] for i in order[len(order) - num_dev :]) if num_dev else ()


def _mixed(chosen: list[int], sizes: Sequence[int], options: DataOptions) -> list[int]:
    """Return the rows of one pass: those that are chosen, repeated as the weights of their files ask for."""
    if not options.train_file_weights:
        return chosen
    ends = np.cumsum(sizes)
    files = np.searchsorted(ends, chosen, side="right").tolist()
    by_file = [[i for i, file in zip(chosen, files, strict=True) if file == n] for n in range(len(sizes))]
    rows = [i for part in by_file for i in part]
    return [rows[i] for i in mixed([len(part) for part in by_file], options.train_file_weights, options.data_seed)]


def _overlap_notes(splits: Splits) -> list[str]:
    """Warn about held-out and evaluation rows that are training rows too."""
    train_rows = {(e.prompt, e.candidates) for e in splits.train}
    notes = []
    for name, examples in (("held-out", splits.dev), ("evaluation", splits.test if splits.test != splits.dev else ())):
        overlap = sum((e.prompt, e.candidates) in train_rows for e in examples)
        if overlap:
            notes.append(
                f"{overlap} of {len(examples)} {name} rows are training rows too, so the result on them is biased"
            )
    return notes
