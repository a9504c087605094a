"""The messages of a chat: the model learns the assistant's turns."""

from __future__ import annotations

from zotune.errors import UsageError
from zotune.llm.config.data import DataOptions
from zotune.llm.data.readers.located import LocatedRow
from zotune.llm.rows.cells import column_of
from zotune.llm.rows.messages import messages_of, tools_of
from zotune.llm.rows.records import Chat
from zotune.llm.rows.shape import Shape


def to_record(row: LocatedRow, options: DataOptions) -> Chat:
    """Return the messages of a row; the last one must be the assistant's, unless a reward function judges an answer."""
    messages = messages_of(row, column_of("messages", options))
    if not messages or not (options.is_function or messages[-1]["role"] == "assistant"):
        last = repr(messages[-1]["role"]) if messages else "missing"
        raise UsageError(f"{row.place}: the last message must have the role 'assistant', but its role is {last}.")
    return Chat(
        place=row.place,
        columns=row.columns,
        messages=messages,
        tools=tools_of(row, column_of("tools", options)),
    )


CHAT = Shape("messages of a chat", None, ("messages",), to_record, frozenset({"scored_turns", "chat_date"}), ("tools",))
