"""Conversations as ShareGPT's: `{"from": "human", "value": "…"}` in place of a role and a content."""

from __future__ import annotations

from zotune.errors import UsageError
from zotune.llm.config.data import DataOptions
from zotune.llm.data.readers.located import LocatedRow
from zotune.llm.rows.cells import column_of, optional_text
from zotune.llm.rows.messages import messages_of, tools_of
from zotune.llm.rows.records import Chat
from zotune.llm.rows.shape import Shape


def to_record(row: LocatedRow, options: DataOptions) -> Chat:
    """Return the chat of a row up to the assistant's last turn; nothing is learnt from what comes after it."""
    column = column_of("conversations", options)
    messages = messages_of(row, column)
    if not options.is_function:
        turns = [i for i, message in enumerate(messages, start=1) if message["role"] == "assistant"]
        if not turns:
            raise UsageError(f"{row.place}: the column {column!r} holds no turn of the assistant (from 'gpt').")
        messages = messages[: turns[-1]]
    elif not messages:
        raise UsageError(f"{row.place}: the column {column!r} holds no message. Leave the row out.")
    system = optional_text(row, column_of("system", options))
    if system.strip() and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": system}, *messages)
    return Chat(
        place=row.place,
        columns=row.columns,
        messages=messages,
        tools=tools_of(row, column_of("tools", options)),
    )


def ends_open(row: LocatedRow, options: DataOptions) -> bool:
    """Return whether a conversation goes on after the assistant's last turn."""
    return bool(messages_of(row, column_of("conversations", options))[-1]["role"] != "assistant")


SHAREGPT = Shape(
    "a conversation, as ShareGPT's",
    None,
    ("conversations",),
    to_record,
    frozenset({"scored_turns", "chat_date"}),
    ("system", "tools"),
)
