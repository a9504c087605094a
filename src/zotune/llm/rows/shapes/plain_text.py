"""A text alone, for language modelling: the model learns every token of it."""

from __future__ import annotations

from zotune.llm.config.data import DataOptions
from zotune.llm.data.control_tokens import EVERYWHERE
from zotune.llm.data.readers.located import LocatedRow
from zotune.llm.rows.cells import column_of, not_empty
from zotune.llm.rows.records import PlainText, Prompt
from zotune.llm.rows.shape import Shape
from zotune.llm.rows.templates import prompt_of


def to_record(row: LocatedRow, options: DataOptions) -> PlainText:
    """Return the text of a row as it is written, or several columns as a template writes them."""
    if options.template != TEXT.template:
        return PlainText(place=row.place, columns=row.columns, text=prompt_of(row, options))
    # As long as the file allows: a document may be a book.
    text = not_empty(row, column_of("text", options))
    controls = EVERYWHERE if options.read_control_tokens else ()
    return PlainText(place=row.place, columns=row.columns, text=Prompt(text, controls))


TEXT = Shape("plain text", "{text}", (), to_record, frozenset({"template", "packing"}))
