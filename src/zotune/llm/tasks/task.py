"""A public task: where its rows come from, how they are chosen, and how one becomes an example.

Sizes, order and splits follow the protocol of Malladi et al. (2023), which the paper keeps (section 4.1): one
permutation of the training split, named by `data_seed`, gives the training rows and, at its end, the held-out
ones; the same seed's permutation of the public evaluation split gives the rows to report on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zotune.errors import UsageError
from zotune.llm.config.run import DataOptions
from zotune.llm.data.examples import Example, Splits
from zotune.llm.data.readers import Row, hub_rows, read_rows
from zotune.llm.scoring.accuracy import Measure, evaluate
from zotune.llm.scoring.objectives import CLASSIFICATION, Objective

# A row to an example, or the reason why there is no such form.
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
        causal, masked: the prompt that makes the task a completion, for either kind of language model.
        plain: the causal form without task alignment: inputs, separators and the label word, nothing else.
        head: the masked model's form without task alignment: the texts alone, for a classification head.
        objective, measure: what is minimised in training, and what is reported.
        labels: the names of a classification head's labels.
        hub: data set and configuration on the Hugging Face Hub; hub_test_split: its split to report on.
        num_train, num_dev, num_eval: rows used by default, as in the paper; num_eval at most.
        size: rows of the public training and evaluation splits.
        note: what else one must know of its rows.
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
    measure: Measure = evaluate
    labels: tuple[str, ...] = ()
    hub_test_split: str = "validation"
    num_train: int = 1000
    num_dev: int = 500
    num_eval: int = 1000
    note: str = ""

    def form(self, masked: bool, prompt: str) -> Callable[[Row], Example]:
        """How a row becomes an example for a kind of model, with the prompt `aligned` or `none`.

        Raises:
            UsageError: there is no such form; the message says why.
        """
        found = {
            (False, "aligned"): self.causal,
            (True, "aligned"): self.masked,
            (False, "none"): self.plain,
            (True, "none"): self.head,
        }[masked, prompt]
        if isinstance(found, str):
            raise UsageError(f"the task {self.name} {found}")
        return found

    def splits(self, options: DataOptions, masked: bool) -> Splits:
        """The task's rows as examples, chosen by `data_seed` as in the protocol.

        Raises:
            UsageError: more rows are asked for than there are, or the task has no such form.
        """
        to_example = self.form(masked, options.prompt)
        if options.data_source == "sample":
            train, dev, test = self._sample(options)
        else:
            train, dev, test = self._drawn(options)
        return Splits(*(tuple(to_example(row) for row in rows) for rows in (train, dev, test)))

    def _drawn(self, options: DataOptions) -> tuple[list[Row], list[Row], list[Row]]:
        """Training, held-out and evaluation rows of the whole splits, from the Hub or a folder."""
        if options.data_source == "hub":
            train, test = (_hub_rows(self.hub, split) for split in ("train", self.hub_test_split))
        else:
            folder = Path(options.data_source)
            train, test = (_gold(read_rows(_any_file(folder, name))) for name in ("train", "validation"))
        num_train = self.num_train if options.num_train is None else options.num_train
        num_dev = self.num_dev if options.num_dev is None else options.num_dev
        if num_train + num_dev > len(train):
            raise self._too_many(options, num_train, num_dev, str(len(train)))
        chosen = _permuted(train, options.data_seed)[: num_train + num_dev]
        return chosen[:num_train], chosen[num_train:], self._to_report(_permuted(test, options.data_seed), options)

    def _sample(self, options: DataOptions) -> tuple[list[Row], list[Row], list[Row]]:
        """The same, of the rows that are shipped; where those are few, the defaults are what there is."""
        if options.data_seed:
            raise UsageError(
                "the sample's rows are fixed, so data_seed has no effect; use --data-source hub or a folder."
            )
        folder = _sample_folder(self.name)
        train, dev, test = (_sample_rows(folder, name) for name in ("train", "heldout", "validation"))
        num_train = min(self.num_train, len(train)) if options.num_train is None else options.num_train
        num_dev = min(self.num_dev, len(dev)) if options.num_dev is None else options.num_dev
        rows = train + dev
        if num_train + num_dev > len(rows):
            raise self._too_many(options, num_train, num_dev, str(len(rows)))
        return rows[:num_train], rows[len(rows) - num_dev :], self._to_report(test, options)

    def _to_report(self, rows: list[Row], options: DataOptions) -> list[Row]:
        return rows[: self.num_eval if options.num_eval is None else options.num_eval]

    def _too_many(self, options: DataOptions, num_train: int, num_dev: int, there_are: str) -> UsageError:
        return UsageError(
            f"{self.name}: {num_train} training and {num_dev} held-out rows were asked for, but the source "
            f"{options.data_source!r} has {there_are}. Lower --num-train or --num-dev"
            + (", or use --data-source hub." if options.data_source == "sample" else ".")
        )


def _permuted(rows: Sequence[Row], seed: int) -> list[Row]:
    return [rows[i] for i in np.random.RandomState(seed).permutation(len(rows))]


def _gold(rows: object) -> list[Row]:
    """The rows that have a label: SNLI marks those without by -1."""
    return [row for row in rows if row.get("label") != -1]  # type: ignore[attr-defined]


def _sample_folder(name: str) -> Path:
    """The shipped rows of a task: in the repository's `data/`, or for some tasks in the package itself."""
    repository, package = Path(__file__).parents[4] / "data", Path(__file__).parent / "data"
    found = next((folder / name for folder in (repository, package) if (folder / name).is_dir()), None)
    if found is None:
        inside = ", ".join(sorted(folder.name for folder in package.iterdir() if folder.is_dir()))
        raise UsageError(
            f"the sample rows of {name} are part of zotune's repository, not of the installed package "
            f"(which has {inside}). Use --data-source hub, or --data-source FOLDER with the task's files."
        )
    return found


def _sample_rows(folder: Path, name: str) -> list[Row]:
    """Of a task without training rows the sample has no file for them."""
    return list(read_rows(_any_file(folder, name))) if any(folder.glob(f"{name}.*")) else []


def _any_file(folder: Path, name: str) -> Path:
    known = [folder / f"{name}{ending}" for ending in (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".json")]
    found = next((path for path in known if path.is_file()), None)
    if found is None:
        raise UsageError(f"the folder {str(folder)!r} holds no {name}.jsonl or {name}.csv (also with .gz).")
    return found


def _hub_rows(hub: tuple[str, str | None], split: str) -> list[Row]:
    try:
        return _gold(hub_rows(*hub, split))
    except UsageError as error:
        raise UsageError(
            f"{error} Without a network use --data-source sample, or a folder of the task's files."
        ) from None
