"""A public task: the source of its rows, their splits, and the conversion of a row to an example.

Sizes, order and splits follow the protocol of Malladi et al. (2023), which the paper adopts (section 4.1). A random
permutation of the training split with `data_seed` starts with the training rows and ends with the held-out rows; a
permutation of the public evaluation split with the same seed gives the evaluation rows. Where these are too few to tell
methods apart, training rows behind the held-out ones can be evaluated too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zotune.errors import UsageError
from zotune.llm.config.data import DataOptions
from zotune.llm.data.examples import Example, Splits
from zotune.llm.data.readers import Row, hub_rows, read_rows
from zotune.llm.scoring.accuracy import Measure, evaluate_accuracy
from zotune.llm.scoring.objectives import CLASSIFICATION, Objective

# A function from a row to an example, or the reason why the task has no such form.
Form = Callable[[Row], Example] | str

MASKED_IS_NOT_DEFINED = (
    "has no form for masked language models: neither the paper nor Malladi et al. (2023) define one. "
    "Use a causal language model."
)
HEAD_HAS_NO_LABELS = "has choices of its own in each row, so a classification head has no labels. Use a causal model."
HEAD_TAKES_TWO_TEXTS = "has three texts, and a classification head takes two. Use --prompt aligned with a causal model."


@dataclass(frozen=True)
class Task:
    """A public task.

    Attributes:
        causal, masked: the prompt that turns the task into a completion, for either kind of language model.
        plain: the causal form without task alignment: inputs, separators and the label word only.
        head: the form without task alignment for masked models: the texts alone, for a classification head.
        objective, measure: the objective of training, and the reported metric.
        labels: names of a classification head's labels.
        hub: data set and configuration on the Hugging Face Hub; hub_test_split: its split for evaluation.
        num_train, num_dev, num_eval: default numbers of rows, as in the paper; num_eval is a maximum.
        size: numbers of rows of the public training and evaluation splits.
        note: a remark on the shipped rows.
    """

    name: str
    description: str
    causal: Form
    masked: Form
    plain: Form
    head: Form
    hub: tuple[str, str | None]
    source: str
    licence: str
    size: tuple[int, int]
    objective: Objective = CLASSIFICATION
    measure: Measure = evaluate_accuracy
    labels: tuple[str, ...] = ()
    hub_test_split: str = "validation"
    num_train: int = 1000
    num_dev: int = 500
    num_eval: int = 1000
    note: str = ""

    def form(self, masked: bool, prompt: str) -> Callable[[Row], Example]:
        """Return the function from rows to examples for a kind of model, with the prompt `aligned` or `none`.

        Raises:
            UsageError: the task has no such form; the message says why.
        """
        form = {
            (False, "aligned"): self.causal,
            (True, "aligned"): self.masked,
            (False, "none"): self.plain,
            (True, "none"): self.head,
        }[masked, prompt]
        if isinstance(form, str):
            raise UsageError(f"the task {self.name} {form}")
        return form

    def splits(self, options: DataOptions, masked: bool) -> Splits:
        """Return the splits of the task as examples, with rows chosen by `data_seed` as in the protocol.

        Raises:
            UsageError: the source has too few rows, or the task has no such form.
        """
        to_example = self.form(masked, options.prompt)
        if options.data_source == "sample":
            train, dev, test = self._sample(options)
        else:
            train, dev, test = self._permuted_splits(options)
        return Splits(*(tuple(to_example(row) for row in rows) for rows in (train, dev, test)))

    def _permuted_splits(self, options: DataOptions) -> tuple[list[Row], list[Row], list[Row]]:
        """Return training, held-out and evaluation rows of the whole splits, from the Hub or a folder."""
        if options.data_source == "hub":
            train, test = (_hub_rows(self.hub, split) for split in ("train", self.hub_test_split))
        else:
            folder = Path(options.data_source)
            train, test = (_labelled(read_rows(_any_file(folder, name))) for name in ("train", "validation"))
        num_train = self.num_train if options.num_train is None else options.num_train
        num_dev = self.num_dev if options.num_dev is None else options.num_dev
        if num_train + num_dev > len(train):
            raise self._too_few_rows(options, num_train, num_dev, str(len(train)))
        train = _permuted(train, options.data_seed)
        unused = train[max(num_train + num_dev, self.num_train + self.num_dev) :]
        return (
            train[:num_train],
            train[num_train : num_train + num_dev],
            self._evaluation_rows(_permuted(test, options.data_seed), unused, options),
        )

    def _sample(self, options: DataOptions) -> tuple[list[Row], list[Row], list[Row]]:
        """Return training, held-out and evaluation rows of the shipped sample; the defaults are at most its sizes."""
        if options.data_seed:
            raise UsageError(
                "the rows of the sample are fixed, so data_seed has no effect; use --data-source hub or a folder."
            )
        folder = _sample_folder(self.name)
        train, dev, test, unused = (_sample_rows(folder, name) for name in ("train", "heldout", "validation", "unused"))
        num_train = min(self.num_train, len(train)) if options.num_train is None else options.num_train
        num_dev = min(self.num_dev, len(dev)) if options.num_dev is None else options.num_dev
        rows = train + dev
        if num_train + num_dev > len(rows):
            raise self._too_few_rows(options, num_train, num_dev, str(len(rows)))
        return rows[:num_train], rows[len(rows) - num_dev :], self._evaluation_rows(test, unused, options)

    def _evaluation_rows(self, rows: list[Row], unused: Sequence[Row], options: DataOptions) -> list[Row]:
        """Return the task's evaluation rows, and behind them as many unused training rows as the options ask for."""
        more = options.num_more_eval
        if more > len(unused):
            raise UsageError(
                f"{self.name}: {more} further evaluation rows were asked for, but the source {options.data_source!r} "
                f"has {len(unused)} training rows that are not used. Lower --num-more-eval."
            )
        return [*rows[: self.num_eval if options.num_eval is None else options.num_eval], *unused[:more]]

    def _too_few_rows(self, options: DataOptions, num_train: int, num_dev: int, num_rows: str) -> UsageError:
        return UsageError(
            f"{self.name}: {num_train} training and {num_dev} held-out rows were asked for, but the source "
            f"{options.data_source!r} has {num_rows}. Lower --num-train or --num-dev"
            + (", or use --data-source hub." if options.data_source == "sample" else ".")
        )


def _permuted(rows: Sequence[Row], seed: int) -> list[Row]:
    return [rows[i] for i in np.random.RandomState(seed).permutation(len(rows))]


def _labelled(rows: object) -> list[Row]:
    """Return the rows that have a label; SNLI marks rows without one by -1."""
    return [row for row in rows if row.get("label") != -1]  # type: ignore[attr-defined]


def _sample_folder(name: str) -> Path:
    """Return the folder of a task's shipped rows: in the repository's `data/`, or for some tasks in the package."""
    repository, package = Path(__file__).parents[4] / "data", Path(__file__).parent / "data"
    path = next((folder / name for folder in (repository, package) if (folder / name).is_dir()), None)
    if path is None:
        inside = ", ".join(sorted(folder.name for folder in package.iterdir() if folder.is_dir()))
        raise UsageError(
            f"the sample rows of {name} are part of zotune's repository, not of the installed package "
            f"(which has {inside}). Use --data-source hub, or --data-source FOLDER with the task's files."
        )
    return path


def _sample_rows(folder: Path, name: str) -> list[Row]:
    """Return the rows of a split of the sample; a task without such rows has no file for them."""
    return list(read_rows(_any_file(folder, name))) if any(folder.glob(f"{name}.*")) else []


def _any_file(folder: Path, name: str) -> Path:
    known = [folder / f"{name}{ending}" for ending in (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".json")]
    file = next((path for path in known if path.is_file()), None)
    if file is None:
        raise UsageError(f"the folder {str(folder)!r} holds no {name}.jsonl or {name}.csv (also with .gz).")
    return file


def _hub_rows(hub: tuple[str, str | None], split: str) -> list[Row]:
    try:
        return _labelled(hub_rows(*hub, split))
    except UsageError as error:
        raise UsageError(
            f"{error} Without a network use --data-source sample, or a folder of the task's files."
        ) from None
