"""The labels of rows, and the words that a model says for them."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from zotune.errors import UsageError
from zotune.llm.config.data import DataOptions
from zotune.llm.data.readers import ClassNumber, LocatedRow
from zotune.llm.rows.cells import cell_text


def likeness(label: str) -> str:
    r"""Return what near-equal labels have in common: no case, spaces, invisible characters or forms of numbers.

    >>> [likeness(label) for label in ("good", " GOOD", "go\u200bod", "1", "1.0", "true", "True")]
    ['good', 'good', 'good', '1', '1', 'true', 'true']
    """
    visible = "".join(c for c in unicodedata.normalize("NFKC", label) if unicodedata.category(c) not in ("Cf", "Cc"))
    same = " ".join(visible.split()).casefold()
    with suppress(ValueError, OverflowError):
        number = float(same)
        return str(int(number)) if number.is_integer() else str(number)
    return same


def labels_as_words(rows: Sequence[LocatedRow], options: DataOptions, source: str | Path) -> dict[str, str]:
    """Return the word of each label: the name of its class if that is known, else the label itself.

    Raises:
        UsageError: a label is missing, or there are too few or too many.
    """
    places: dict[str, str] = {}
    names: dict[str, str | None] = {}
    for row in rows:
        label, value = cell_text(row, options.label_column), row.columns[options.label_column]
        places.setdefault(label, row.place)
        names.setdefault(label, value.name if isinstance(value, ClassNumber) else label)
    labels = sorted(places)
    unnamed = next((label for label in labels if names[label] is None), None)
    if unnamed is not None:
        raise UsageError(
            f"{places[unnamed]}: the column {options.label_column!r} is {unnamed}, which stands for no class. Leave "
            "the row out."
        )
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
    return {label: str(names[label]) for label in labels}


def check_words(words: Mapping[str, str]) -> None:
    """Check that labels have words of which a model can choose one.

    Raises:
        UsageError: a word is empty, or all are the same.
    """
    empty = [label for label, word in words.items() if not word.strip()]
    if empty:
        raise UsageError(f"the label {empty[0]!r} has an empty word; give one with --verbalizer.")
    if len({word.strip() for word in words.values()}) < 2:
        raise UsageError(f"the verbalizer has the same word for all labels ({words}); at least two are needed.")
