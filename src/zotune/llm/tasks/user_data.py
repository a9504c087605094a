"""Loading the user's own rows: inferring their format from their columns, and splitting them into examples.

As for a task, a random permutation with `data_seed` starts with the training rows and ends with the held-out rows; if
only some of the evaluation rows are asked for, another one with the same seed chooses them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from zotune.errors import UsageError, did_you_mean
from zotune.llm.config.data import IN_MEMORY, DataOptions
from zotune.llm.data.chat_template import reads_clock
from zotune.llm.data.examples import Example, Splits
from zotune.llm.data.readers import LocatedRow, read_located_rows
from zotune.llm.scoring.accuracy import Measure
from zotune.llm.scoring.objectives import Objective
from zotune.llm.scoring.rewards import GeneratedObjective
from zotune.llm.tasks.row_formats import FORMATS, PROMPT_ALONE, Format, cell_text, column_of, measure_of
from zotune.llm.tasks.row_notes import control_token_notes, ended_rows_note, label_notes, likeness

# Options whose defaults are inferred from the rows.
RESOLVED_OPTIONS = ("data_format", "template", "verbalizer", "chat_date")

# Options that only some formats use.
_FORMAT_OPTIONS = ("template", "verbalizer", "exact_match", "scored_turns", "chat_date")


@dataclass(frozen=True)
class Data:
    """Examples with their objective and their metric.

    Attributes:
        options: for the user's own files with the inferred format, template and verbalizer, so that these are saved.
        notes: the inferred format, and warnings about the rows; one line each.
        generated: the objective in place of `objective`, if each evaluation generates text.
    """

    splits: Splits
    objective: Objective
    measure: Measure
    options: DataOptions
    notes: tuple[str, ...]
    generated: GeneratedObjective | None = None


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
        """The rows that tell the format: the training rows if there are any."""
        first = self.train or self.eval
        assert first is not None
        return first


def read_files(options: DataOptions) -> UserRows:
    """Read the rows of the files that `options` name.

    Raises:
        UsageError: a file cannot be read; the message says which and why.
    """
    train, evaluation = options.train_file, options.eval_file
    return UserRows(
        None if train is None else Rows(train, list(read_located_rows(train))),
        None if evaluation is None else Rows(evaluation, list(read_located_rows(evaluation, split="validation"))),
    )


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
    rows = given.first.rows
    options = _with_date(resolve_format(options, rows, given.first.source, masked=masked), tokenizer)
    form = FORMATS[options.data_format or ""]
    splits, chosen_notes = _split(given, form, options, tokenizer)
    notes = (
        *(_format_note(form, options, given), *chosen_notes, *label_notes(options)),
        *_end_notes(rows, options, tokenizer),
        *(*control_token_notes(splits, options, tokenizer), *_overlap_notes(splits)),
    )
    return Data(splits, form.objective, measure_of(form, options), options, notes)


def _with_date(options: DataOptions, tokenizer: Any) -> DataOptions:
    """Return the options with the date of chats, if the chat template writes one: today's unless it is given."""
    if options.data_format != "chat" or not reads_clock(tokenizer):
        return options.model_copy(update={"chat_date": None})
    return options.model_copy(update={"chat_date": options.chat_date or date.today().isoformat()})


def _end_notes(rows: Sequence[LocatedRow], options: DataOptions, tokenizer: Any) -> list[str]:
    if options.data_format != "completion":
        return []
    return ended_rows_note((row.columns.get(column_of("completion", options)) for row in rows), tokenizer.eos_token)


def resolve_format(
    options: DataOptions, rows: Sequence[LocatedRow], source: str | Path, *, masked: bool
) -> DataOptions:
    """Return the options with the rows' format, template and verbalizer filled in.

    Raises:
        UsageError: the format cannot be inferred, or an option has no effect on it.
    """
    if not rows:
        raise UsageError(f"{source} contains no row.")
    name = options.data_format or _infer_format(rows, options, source)
    form = FORMATS[name]
    for option in _FORMAT_OPTIONS:
        if option not in form.uses and getattr(options, option) != type(options).model_fields[option].get_default(
            call_default_factory=True
        ):
            users = " or ".join(other for other, f in FORMATS.items() if option in f.uses)
            raise UsageError(f"{option} has no effect on rows of {form.description} ({name}); it is for {users}.")
    if name == PROMPT_ALONE and not options.is_function:
        raise UsageError(
            f"rows of {form.description} ({name}) contain no right answer: give --objective MODULE:FUNCTION, "
            "a reward function of generated text, or another --data-format."
        )
    if masked and name != "classification":
        raise UsageError(
            f"a masked language model fills in one word, so it cannot learn from {form.description} ({name}). "
            "Use a causal language model, or rows with a text and a label."
        )
    filled = {"data_format": name, "template": options.template or _default_template(name, rows, options)}
    if name == "classification":
        filled["verbalizer"] = options.verbalizer or _labels_as_words(rows, options, source)  # type: ignore[assignment]
        _check_words(filled["verbalizer"])
    return options.model_copy(update=filled)


def _default_template(name: str, rows: Sequence[LocatedRow], options: DataOptions) -> str | None:
    """Return the default template of a format; for a prompt alone it is the prompt column or the text column."""
    if name == PROMPT_ALONE and column_of("prompt", options) not in _columns_with_values(rows):
        return "{text}"
    return FORMATS[name].template


def _columns_with_values(rows: Sequence[LocatedRow]) -> set[str]:
    """Return the columns that have a value in some row."""
    return {name for row in rows for name, value in row.columns.items() if value is not None}


def _infer_format(rows: Sequence[LocatedRow], options: DataOptions, source: str | Path) -> str:
    """Infer the format from the columns; for a reward function it is a chat or a prompt alone.

    Raises:
        UsageError: the columns fit no format, or several.
    """
    present = _columns_with_values(rows)
    if options.is_function:
        return "chat" if column_of("messages", options) in present else PROMPT_ALONE
    forms = {name: f for name, f in FORMATS.items() if name != PROMPT_ALONE}
    missing = {name: [c for c in f.columns(options) if c not in present] for name, f in forms.items()}
    matches = [name for name, columns in missing.items() if not columns]
    if len(matches) == 1:
        return matches[0]
    formats = "; ".join(f"{name} ({', '.join(f.columns(options))})" for name, f in forms.items())
    if matches:
        raise UsageError(
            f"{source}: the columns {', '.join(sorted(present))} fit several formats: {', '.join(matches)}. "
            f"Choose one, for instance with --data-format {matches[0]}."
        )
    if {"instruction", "output"} <= present:
        prompt = r"{instruction}\n{input}\n" if "input" in present else r"{instruction}\n"
        raise UsageError(
            f"{source}: rows of an instruction and its output, as Alpaca's, need a template of the prompt: give "
            f"--template $'{prompt}' --columns completion output, or another template."
        )
    nearest = min(missing.values(), key=len)[0]
    raise UsageError(
        f"{source}: there is no column {nearest!r}.{did_you_mean(nearest, present)} The formats of rows are: "
        f"{formats}. For columns of other names give --text-column, --label-column or --columns prompt NAME."
    )


def _chosen(rows: Sequence[Any], options: DataOptions) -> tuple[Sequence[Any], list[str]]:
    """Return `num_eval` of the evaluation rows, drawn with `data_seed` and in their order, and a note that says so.

    Files are often sorted, by label for instance, so the first rows would not stand for all.
    """
    if options.num_eval is None or options.num_eval >= len(rows):
        return rows, []
    order = np.random.RandomState(options.data_seed).permutation(len(rows))
    note = f"{options.num_eval} of {len(rows)} evaluation rows, drawn at random with data_seed {options.data_seed}"
    return [rows[i] for i in sorted(order[: options.num_eval])], [note] if options.num_eval else []


def _examples(rows: Sequence[LocatedRow], form: Format, options: DataOptions, tokenizer: Any) -> tuple[Example, ...]:
    return tuple(form.to_example(row, options, tokenizer) for row in rows)


def _split(given: UserRows, form: Format, options: DataOptions, tokenizer: Any) -> tuple[Splits, list[str]]:
    """Split rows into examples for training, held out and for evaluation; without evaluation rows the latter two agree.

    Without training rows all examples are for evaluation.
    """
    train, dev = _split_training(given.train, form, options, tokenizer)
    if given.eval is None:
        test, notes = _chosen(dev, options)
        return Splits(train, dev, tuple(test)), notes
    if not given.eval.rows:
        raise UsageError(f"{given.eval.source} contains no row.")
    rows, notes = _chosen(given.eval.rows, options)
    return Splits(train, dev, _examples(rows, form, options, tokenizer)), notes


def _split_training(
    given: Rows | None, form: Format, options: DataOptions, tokenizer: Any
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Split the rows for training into those to train on and those held out."""
    if given is None:
        return (), ()
    examples = _examples(given.rows, form, options, tokenizer)
    order = np.random.RandomState(options.data_seed).permutation(len(examples))
    num_dev = len(examples) // 5 if options.num_dev is None else options.num_dev
    num_train = options.num_train or len(examples) - num_dev
    if num_train < 1 or num_train + num_dev > len(examples):
        raise UsageError(
            f"{given.source} has {len(examples)} rows, too few for {max(num_train, 1)} to train on and {num_dev} "
            "held out. Lower --num-train or --num-dev."
        )
    train = tuple(examples[i] for i in order[:num_train])
    return train, tuple(examples[i] for i in order[len(order) - num_dev :]) if num_dev else ()


def _labels_as_words(rows: Sequence[LocatedRow], options: DataOptions, source: str | Path) -> dict[str, str]:
    places: dict[str, str] = {}
    for row in rows:
        places.setdefault(cell_text(row, options.label_column), row.place)
    labels = sorted(places)
    empty = next((label for label in labels if not likeness(label)), None)
    if empty is not None:
        raise UsageError(
            f"{places[empty]}: the column {options.label_column!r} is empty, so the label {empty!r} has an empty "
            "word. Leave the row out, or give the label a word with --verbalizer."
        )
    if len(labels) < 2:
        raise UsageError(
            f"{source}: column {options.label_column!r} holds {len(labels)} different labels; at least two are needed."
        )
    if len(labels) > 100:
        raise UsageError(
            f"{source}: column {options.label_column!r} holds {len(labels)} different labels, too many to choose "
            "among. Give the column of the labels with --label-column."
        )
    return {label: label for label in labels}


def _check_words(words: Any) -> None:
    empty = [label for label, word in words.items() if not word.strip()]
    if empty:
        raise UsageError(f"the label {empty[0]!r} has an empty word; give one with --verbalizer.")
    if len({word.strip() for word in words.values()}) < 2:
        raise UsageError(f"the verbalizer has the same word for all labels ({words}); at least two are needed.")


def _format_note(form: Format, options: DataOptions, given: UserRows) -> str:
    """Describe the sources and the format of their rows."""
    files = " and ".join(str(rows.source) for rows in (given.train, given.eval) if rows is not None)
    note = f"{files}: rows of {form.description} (data_format: {options.data_format})"
    if options.verbalizer:
        shown = [f"{label!r} → {word.strip()!r}" for label, word in options.verbalizer.items()]
        note += f"; labels {', '.join(shown[:5])}{f' and {len(shown) - 5} more' if len(shown) > 5 else ''}"
    return note


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
