"""A user's own data: rows of one shape, told from their columns, as splits of examples.

Rows are drawn as a task's are: one permutation, named by `data_seed`, gives the training rows and, at its end,
the held-out ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from zotune.errors import UsageError, did_you_mean
from zotune.llm.config.run import DataOptions
from zotune.llm.data.examples import Example, Splits
from zotune.llm.data.readers import Located, located_rows
from zotune.llm.scoring.accuracy import Measure
from zotune.llm.scoring.objectives import Objective
from zotune.llm.scoring.rewards import Generated
from zotune.llm.tasks.row_formats import FORMATS, PROMPT_ALONE, Format, column_of, measure_of, text_of

# Options that the rows fill in.
RESOLVED = ("data_format", "template", "verbalizer")

# Options that not every shape of rows has a use for.
_OF_SHAPES = ("template", "verbalizer", "exact_match", "scored_turns")


@dataclass(frozen=True)
class Data:
    """Examples, what is minimised on them, and what is reported.

    Attributes:
        options: of one's own files with the shape, the template and the verbalizer that were taken, so that they can
            be saved.
        notes: what was taken for what, and what looks odd; a line each.
        generated: what is minimised in place of `objective`, where each evaluation generates text.
    """

    splits: Splits
    objective: Objective
    measure: Measure
    options: DataOptions
    notes: tuple[str, ...]
    generated: Generated | None = None


def own_data(options: DataOptions, tokenizer: Any, *, masked: bool = False) -> Data:
    """Examples from a user's own files.

    Args:
        options: which files, and how their rows become examples.
        tokenizer: the model's, whose chat template and end-of-text token enter.
        masked: whether the model fills in masks, which only the words of labels can be.

    Raises:
        UsageError: a file or a row cannot be used; the message says which and why.
    """
    if options.train_file is None:
        assert options.eval_file is not None
        rows = _evaluation_rows(options)
        options = resolved(options, rows, options.eval_file, masked=masked)
        form = FORMATS[options.data_format or ""]
        splits = Splits((), (), _examples(rows, form, options, tokenizer))
    else:
        rows = list(located_rows(options.train_file))
        options = resolved(options, rows, options.train_file, masked=masked)
        form = FORMATS[options.data_format or ""]
        splits = _drawn(_examples(rows, form, options, tokenizer), form, options, tokenizer)
    notes = (_taken(form, options), *_same_rows(splits))
    return Data(splits, form.objective, measure_of(form, options), options, notes)


def resolved(options: DataOptions, rows: Sequence[Located], source: Path, *, masked: bool) -> DataOptions:
    """The options with the rows' shape, template and verbalizer filled in.

    Raises:
        UsageError: the shape cannot be told, or an option has no effect on it.
    """
    if not rows:
        raise UsageError(f"{source} holds no row.")
    name = options.data_format or _told(rows, options, source)
    form = FORMATS[name]
    for option in _OF_SHAPES:
        if option not in form.uses and getattr(options, option) != type(options).model_fields[option].get_default(
            call_default_factory=True
        ):
            users = " or ".join(other for other, f in FORMATS.items() if option in f.uses)
            raise UsageError(f"{option} has no effect on rows of {form.description} ({name}); it is for {users}.")
    if name == PROMPT_ALONE and not options.is_function:
        raise UsageError(
            f"rows of {form.description} ({name}) say nothing of what is right: give --objective MODULE:FUNCTION, "
            "a function that judges what is generated, or another --data-format."
        )
    if masked and name != "classification":
        raise UsageError(
            f"a masked language model fills in one word, so it cannot learn from {form.description} ({name}). "
            "Use a causal language model, or rows of a text and a label."
        )
    filled = {"data_format": name, "template": options.template or _own_template(name, rows, options)}
    if name == "classification":
        filled["verbalizer"] = options.verbalizer or _labels_as_words(rows, options, source)  # type: ignore[assignment]
        _check_words(filled["verbalizer"])
    return options.model_copy(update=filled)


def _own_template(name: str, rows: Sequence[Located], options: DataOptions) -> str | None:
    """The template of a shape; text is generated from the prompt, or from the text as it is."""
    if name == PROMPT_ALONE and column_of("prompt", options) not in _present(rows):
        return "{text}"
    return FORMATS[name].template


def _present(rows: Sequence[Located]) -> set[str]:
    """The columns that hold anything."""
    return {name for row in rows for name, value in row.columns.items() if value is not None}


def _told(rows: Sequence[Located], options: DataOptions, source: Path) -> str:
    """The shape that the columns make, where they make one; a function judges what is generated from any of them."""
    present = _present(rows)
    if options.is_function:
        return "chat" if column_of("messages", options) in present else PROMPT_ALONE
    forms = {name: f for name, f in FORMATS.items() if name != PROMPT_ALONE}
    missing = {name: [c for c in f.columns(options) if c not in present] for name, f in forms.items()}
    found = [name for name, columns in missing.items() if not columns]
    if len(found) == 1:
        return found[0]
    shapes = "; ".join(f"{name} ({', '.join(f.columns(options))})" for name, f in forms.items())
    if found:
        raise UsageError(
            f"{source}: the columns {', '.join(sorted(present))} make rows of several shapes: {', '.join(found)}. "
            f"Say which: --data-format {found[0]}."
        )
    nearest = min(missing.values(), key=len)[0]
    raise UsageError(
        f"{source}: there is no column {nearest!r}.{did_you_mean(nearest, present)} Rows are of one of these shapes: "
        f"{shapes}. Name columns of other names: --text-column, --label-column, --columns prompt NAME."
    )


def _evaluation_rows(options: DataOptions) -> list[Located]:
    assert options.eval_file is not None
    return list(islice(located_rows(options.eval_file, split="validation"), options.num_eval))


def _examples(rows: Sequence[Located], form: Format, options: DataOptions, tokenizer: Any) -> tuple[Example, ...]:
    return tuple(form.to_example(row, options, tokenizer) for row in rows)


def _drawn(examples: Sequence[Example], form: Format, options: DataOptions, tokenizer: Any) -> Splits:
    """Training and held-out rows, and those to report on: of their own file, else the held-out ones."""
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
    rows = _evaluation_rows(options)
    if not rows:
        raise UsageError(f"{options.eval_file} holds no row.")
    return Splits(train, dev, _examples(rows, form, options, tokenizer))


def _labels_as_words(rows: Sequence[Located], options: DataOptions, source: Path) -> dict[str, str]:
    labels = sorted({text_of(row, options.label_column) for row in rows})
    if len(labels) < 2:
        raise UsageError(
            f"{source}: column {options.label_column!r} holds {len(labels)} different labels; at least two are needed."
        )
    if len(labels) > 100:
        raise UsageError(
            f"{source}: column {options.label_column!r} holds {len(labels)} different labels, too many to choose "
            "among. Is it the label's column?"
        )
    return {label: label for label in labels}


def _check_words(words: Any) -> None:
    empty = [label for label, word in words.items() if not word.strip()]
    if empty:
        raise UsageError(f"the label {empty[0]!r} has no word that the model could say; give one with --verbalizer.")
    if len({word.strip() for word in words.values()}) < 2:
        raise UsageError(f"the verbalizer has one word for all labels ({words}); at least two are needed.")


def _taken(form: Format, options: DataOptions) -> str:
    """What the files were taken for."""
    files = " and ".join(str(f) for f in (options.train_file, options.eval_file) if f is not None)
    said = f"{files}: rows of {form.description} (data_format: {options.data_format})"
    if options.verbalizer:
        shown = [f"{label!r} → {word.strip()!r}" for label, word in options.verbalizer.items()]
        said += f"; labels {', '.join(shown[:5])}{f' and {len(shown) - 5} more' if len(shown) > 5 else ''}"
    return said


def _same_rows(splits: Splits) -> list[str]:
    """Rows that are both trained on and measured on flatter the measurement."""
    trained = {(e.prompt, e.candidates) for e in splits.train}
    notes = []
    for name, examples in (("held-out", splits.dev), ("evaluation", splits.test if splits.test != splits.dev else ())):
        same = sum((e.prompt, e.candidates) in trained for e in examples)
        if same:
            notes.append(
                f"{same} of {len(examples)} {name} rows are training rows too, which flatters what is measured"
            )
    return notes
