"""A text and its label: the model says the word of the label after the text."""

from __future__ import annotations

from zotune.errors import UsageError, did_you_mean
from zotune.llm.config.data import DataOptions
from zotune.llm.data.readers.located import LocatedRow
from zotune.llm.rows.cells import cell_text
from zotune.llm.rows.records import Choice
from zotune.llm.rows.shape import Shape
from zotune.llm.rows.templates import prompt_of


def to_record(row: LocatedRow, options: DataOptions) -> Choice:
    """Return the template's prompt with the labels' words as candidates; labels that share a word are one class."""
    label = cell_text(row, options.label_column)
    words = options.verbalizer
    if label not in words:
        raise UsageError(f"{row.place}: the label {label!r} is not in the verbalizer.{did_you_mean(label, words)}")
    distinct = tuple(dict.fromkeys(word.strip() for word in words.values()))
    right = distinct.index(words[label].strip())
    return Choice(
        place=row.place, columns=row.columns, prompt=prompt_of(row, options), candidates=distinct, label=right
    )


CLASSIFICATION = Shape(
    "a text and its label", "{text}\nLabel:", ("label",), to_record, frozenset({"template", "verbalizer"})
)
