"""A prompt and its completion: two texts, or the messages of a chat and those that follow."""

from __future__ import annotations

from zotune.errors import UsageError
from zotune.llm.config.data import DataOptions
from zotune.llm.data.readers.located import LocatedRow
from zotune.llm.rows.cells import column_of, not_empty
from zotune.llm.rows.messages import holds_messages, messages_of, tools_of
from zotune.llm.rows.records import Chat, Completion
from zotune.llm.rows.shape import Shape
from zotune.llm.rows.templates import PROMPT_COLUMN, prompt_of


def to_record(row: LocatedRow, options: DataOptions) -> Completion | Chat:
    """Return the template's prompt and the completion exactly as written; of messages, a chat of both."""
    if options.template in (None, PROMPT_COLUMN) and holds_messages(row, column_of("prompt", options)):
        return _chat(row, options)
    completion = not_empty(row, column_of("completion", options))
    return Completion(place=row.place, columns=row.columns, prompt=prompt_of(row, options), completion=completion)


def _chat(row: LocatedRow, options: DataOptions) -> Chat:
    column = column_of("completion", options)
    prompt = messages_of(row, column_of("prompt", options))
    if holds_messages(row, column):
        answer = messages_of(row, column)
    else:
        answer = ({"role": "assistant", "content": not_empty(row, column)},)
    if not answer or answer[-1]["role"] != "assistant":
        raise UsageError(
            f"{row.place}: the column {column!r} holds the messages that the model learns, so the last of them must "
            "have the role 'assistant'."
        )
    return Chat(
        place=row.place,
        columns=row.columns,
        messages=(*prompt, *answer),
        tools=tools_of(row, column_of("tools", options)),
        first=len(prompt),
    )


COMPLETION = Shape(
    "a prompt and its completion",
    PROMPT_COLUMN,
    ("completion",),
    to_record,
    frozenset({"template", "exact_match", "chat_date"}),
    ("tools",),
)
