"""Examples: a prompt, the candidates that may follow it, and the right one; and a user's own rows made into them.

Reads JSON lines and CSV (also gzipped); an unusable row is named by file and line.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zotune.errors import UsageError, did_you_mean
from zotune.llm.config import DataOptions

Row = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One example of a task.

    Attributes:
        prompt: what the model reads.
        candidates: texts that may follow it, with their leading space; the labels' names for a classification head;
            none where text is generated for a function to judge.
        label: index of the right candidate; of the one that is trained on, where several are right.
        suffix: what follows the candidate in a masked language model's sentence; causal models never see it.
        also_right: indices of other candidates that count as right.
        answers: where the answer is generated rather than chosen, every accepted one; the one candidate is the first.
        text_limit: (n, k): of the prompt's first n characters a masked language model reads at most k tokens.
        second: the second text of a classification head's pair, read as `<s> prompt </s></s> second </s>`.
    """

    prompt: str
    candidates: tuple[str, ...]
    label: int
    suffix: str = ""
    also_right: tuple[int, ...] = ()
    answers: tuple[str, ...] = ()
    text_limit: tuple[int, int] | None = None
    second: str | None = None


@dataclass(frozen=True)
class Splits:
    """Rows to train on, rows held out of them to choose hyper-parameters on, and rows to report on."""

    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    test: tuple[Example, ...]


def user_splits(options: DataOptions) -> Splits:
    """Examples from a user's own files of texts and labels."""
    if options.train_file is None:
        assert options.eval_file is not None
        rows = list(read_rows(options.eval_file))[: options.num_eval]
        words = _words(rows, options, options.eval_file)
        return Splits((), (), tuple(_user_examples(rows, options, words, options.eval_file)))
    rows = list(read_rows(options.train_file))
    words = _words(rows, options, options.train_file)
    examples = list(_user_examples(rows, options, words, options.train_file))
    order = np.random.RandomState(options.data_seed).permutation(len(examples))
    num_dev = len(examples) // 5 if options.num_dev is None else options.num_dev
    num_train = options.num_train or len(examples) - num_dev
    if num_train < 1 or num_train + num_dev > len(examples):
        raise UsageError(
            f"{options.train_file} has {len(examples)} rows, too few for {max(num_train, 1)} to train on and {num_dev} "
            "held out. Lower --num-train or --num-dev."
        )
    train = tuple(examples[i] for i in order[:num_train])
    dev = tuple(examples[i] for i in order[len(order) - num_dev :]) if num_dev else ()
    if options.eval_file is None:
        return Splits(train, dev, dev[: options.num_eval])
    test_rows = list(read_rows(options.eval_file))[: options.num_eval]
    return Splits(train, dev, tuple(_user_examples(test_rows, options, words, options.eval_file)))


def _user_examples(rows: Sequence[Row], options: DataOptions, words: dict[str, str], path: Path) -> Iterator[Example]:
    if options.is_function:
        yield from _prompts(rows, options, path)
        return
    labels = list(words)
    candidates = tuple(f" {words[label].strip()}" for label in labels)
    fields = _fields(options.template)
    for number, row in enumerate(rows, start=1):
        columns = {**row, "text": _column(row, options.text_column, path, number)}
        label = str(_column(row, options.label_column, path, number))
        for name in fields:
            _column(columns, name, path, number)
        if label not in words:
            raise UsageError(
                f"{path}, row {number}: the label {label!r} is not in the verbalizer.{did_you_mean(label, labels)}"
            )
        yield Example(options.template.format(**columns), candidates, labels.index(label))


def _prompts(rows: Sequence[Row], options: DataOptions, path: Path) -> Iterator[Example]:
    """Rows that text is generated from; a label, where there is one, is the reference (or a list of them)."""
    fields = _fields(options.template)
    for number, row in enumerate(rows, start=1):
        columns = {**row, **({"text": _column(row, options.text_column, path, number)} if "text" in fields else {})}
        for name in fields:
            _column(columns, name, path, number)
        label = row.get(options.label_column)
        references = label if isinstance(label, list) else [] if label is None else [label]
        yield Example(options.template.format(**columns), (), 0, answers=tuple(map(str, references)))


def _words(rows: Sequence[Row], options: DataOptions, path: Path) -> dict[str, str]:
    """The word of each label; none where text is generated."""
    return {} if options.is_function else options.verbalizer or _labels_as_words(rows, options, path)


def _fields(template: str) -> list[str]:
    """The columns that a template names."""
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        template.format_map(dict.fromkeys(fields, ""))
    except (ValueError, IndexError, KeyError, AttributeError, TypeError) as error:
        raise UsageError(
            f"the template {template!r} is not valid: {error}. {{column}} stands for a row's column; "
            "for a brace itself write two: {{ or }}."
        ) from None
    return fields


def _labels_as_words(rows: Sequence[Row], options: DataOptions, path: Path) -> dict[str, str]:
    labels = sorted({str(_column(row, options.label_column, path, i)) for i, row in enumerate(rows, start=1)})
    if len(labels) < 2:
        raise UsageError(
            f"{path}: column {options.label_column!r} holds {len(labels)} different labels; at least two are needed."
        )
    if len(labels) > 100:
        raise UsageError(
            f"{path}: column {options.label_column!r} holds {len(labels)} different labels, too many to choose among. "
            "Is it the label's column?"
        )
    return {label: label for label in labels}


def _column(row: Row, name: str, path: Path, number: int) -> Any:
    if row.get(name) is None:
        raise UsageError(f"{path}, row {number}: there is no column {name!r}.{did_you_mean(name, row)}")
    return row[name]


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a JSON lines or CSV file, gzipped or not, as dicts.

    Raises:
        UsageError: no such file, an ending that is not known, or a broken line, named by its number.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {str(path)!r}.")
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if kind not in (".jsonl", ".json", ".csv"):
        raise UsageError(
            f"{path}: files end in .jsonl, .json (a line an object) or .csv, each also with .gz; got {kind!r}."
        )
    try:
        with _open_text(path) as file:
            yield from csv.DictReader(file) if kind == ".csv" else _json_lines(file, path)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from None


def _json_lines(file: io.TextIOBase, path: Path) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}, line {number}: broken JSON ({error.msg} at column {error.colno}).") from None
        if not isinstance(row, dict):
            raise UsageError(
                f'{path}, line {number}: a row must be an object {{"column": value, …}}, got {line.strip()[:40]}'
            )
        yield row


def _open_text(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")
