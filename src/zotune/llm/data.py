"""Rows to examples: a prompt, the candidates that may follow it, and the right one.

Reads JSON lines and CSV (also gzipped); an unusable row is named by file and line.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zotune.errors import UsageError, did_you_mean
from zotune.llm.config import DataOptions

Row = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One example of a classification or multiple-choice task.

    Attributes:
        prompt: what the model reads.
        candidates: texts that may follow it, with their leading space.
        label: index of the right candidate.
        suffix: what follows the candidate in a masked language model's sentence; causal models never see it.
    """

    prompt: str
    candidates: tuple[str, ...]
    label: int
    suffix: str = ""


@dataclass(frozen=True)
class Splits:
    """Rows to train on, rows held out of them to choose hyper-parameters on, and rows to report on."""

    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    test: tuple[Example, ...]


@dataclass(frozen=True)
class Task:
    """A public task: where its rows come from and how a row becomes an example.

    Attributes:
        to_example: row and whether the model is a masked language model → example.
        hub: data set and configuration on the Hugging Face Hub.
        test_split: the public split that is reported on.
        num_train, num_dev: rows used by default, as in the paper.
    """

    name: str
    description: str
    to_example: Callable[[Row, bool], Example]
    hub: tuple[str, str]
    licence: str
    test_split: str = "validation"
    num_train: int = 1000
    num_dev: int = 500

    def splits(self, options: DataOptions, masked: bool) -> Splits:
        """The task's rows as examples, chosen by `data_seed` as in the paper's protocol."""
        num_train = options.num_train or self.num_train
        num_dev = self.num_dev if options.num_dev is None else options.num_dev
        rows, test_rows = self._rows(options, num_train, num_dev)
        if num_train + num_dev > len(rows):
            raise UsageError(
                f"{self.name}: {num_train} training and {num_dev} held-out rows were asked for, but the source "
                f"{options.data_source!r} has {len(rows)}. Lower --num-train or --num-dev, or use --data-source hub."
            )
        test_rows = test_rows[: options.num_eval]
        examples = [self.to_example(row, masked) for row in rows]
        return Splits(
            tuple(examples[:num_train]),
            tuple(examples[len(examples) - num_dev :]),
            tuple(self.to_example(row, masked) for row in test_rows),
        )

    def _rows(self, options: DataOptions, num_train: int, num_dev: int) -> tuple[list[Row], list[Row]]:
        if options.data_source == "sample":
            if options.data_seed:
                raise UsageError(
                    "the sample's rows are fixed, so data_seed has no effect; use --data-source hub or a folder."
                )
            folder = _sample_folder() / self.name
            return [row for name in ("train", "heldout") for row in read_rows(folder / f"{name}.jsonl")], list(
                read_rows(folder / f"{self.test_split}.jsonl")
            )
        if options.data_source == "hub":
            train, test = _hub_rows(self.hub, "train"), _hub_rows(self.hub, self.test_split)
        else:
            folder = Path(options.data_source)
            train, test = (list(read_rows(_any_file(folder, name))) for name in ("train", self.test_split))
        chosen = np.random.RandomState(options.data_seed).permutation(len(train))[: num_train + num_dev]
        return [train[i] for i in chosen], test


def user_splits(options: DataOptions) -> Splits:
    """Examples from a user's own files of texts and labels."""
    if options.train_file is None:
        assert options.eval_file is not None
        rows = list(read_rows(options.eval_file))[: options.num_eval]
        words = options.verbalizer or _labels_as_words(rows, options, options.eval_file)
        return Splits((), (), tuple(_user_examples(rows, options, words, options.eval_file)))
    rows = list(read_rows(options.train_file))
    words = options.verbalizer or _labels_as_words(rows, options, options.train_file)
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


def _any_file(folder: Path, name: str) -> Path:
    known = [folder / f"{name}{ending}" for ending in (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".json")]
    found = next((path for path in known if path.is_file()), None)
    if found is None:
        raise UsageError(f"the folder {str(folder)!r} holds no {name}.jsonl or {name}.csv (also with .gz).")
    return found


def _sample_folder() -> Path:
    """The repository's `data/`: not part of an installed wheel."""
    folder = Path(__file__).parents[3] / "data"
    if not folder.is_dir():
        raise UsageError(
            "the sample rows are part of zotune's repository, not of the installed package. "
            "Use --data-source hub, or --data-source FOLDER with the task's files."
        )
    return folder


def _hub_rows(hub: tuple[str, str], split: str) -> list[Row]:
    from datasets import load_dataset

    try:
        return list(load_dataset(*hub, split=split))
    except (OSError, ValueError, ConnectionError) as error:
        raise UsageError(
            f"the data set {hub[0]}/{hub[1]} could not be loaded from the Hub: {str(error).splitlines()[0]} "
            "Without a network use --data-source sample, or a folder of the task's files."
        ) from None
