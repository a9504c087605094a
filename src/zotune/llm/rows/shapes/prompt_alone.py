"""A prompt alone, text or messages, for a reward function of what the model generates."""

from __future__ import annotations

from typing import Any

from zotune.llm.config.data import DataOptions
from zotune.llm.data.readers.located import LocatedRow
from zotune.llm.rows.cells import cell_text, column_of
from zotune.llm.rows.messages import holds_messages, messages_of, tools_of
from zotune.llm.rows.records import Chat, OpenPrompt
from zotune.llm.rows.shape import Shape
from zotune.llm.rows.templates import PROMPT_COLUMN, prompt_of


def to_record(row: LocatedRow, options: DataOptions) -> OpenPrompt | Chat:
    """Return the template's prompt; a label or completion becomes the reference, or a list of accepted ones."""
    if options.template in (None, PROMPT_COLUMN) and holds_messages(row, column_of("prompt", options)):
        return _chat(row, options)
    return OpenPrompt(
        place=row.place, columns=row.columns, prompt=prompt_of(row, options), references=_references(row, options)
    )


def _chat(row: LocatedRow, options: DataOptions) -> Chat:
    messages, answer = messages_of(row, column_of("prompt", options)), column_of("completion", options)
    is_answered = holds_messages(row, answer)
    return Chat(
        place=row.place,
        columns=row.columns,
        messages=(*messages, *(messages_of(row, answer) if is_answered else ())),
        tools=tools_of(row, column_of("tools", options)),
        references=() if is_answered else _references(row, options),
    )


def _references(row: LocatedRow, options: DataOptions) -> tuple[str, ...]:
    for column in (options.label_column, column_of("completion", options)):
        value: Any = row.columns.get(column)
        if value is not None:
            accepted = value if isinstance(value, list) else [value]
            return tuple(cell_text(LocatedRow(row.place, {column: one}), column) for one in accepted)
    return ()


PROMPT = Shape(
    "a prompt alone",
    PROMPT_COLUMN,
    (),
    to_record,
    frozenset({"template", "chat_date"}),
    ("label", "completion", "tools"),
)
