"""Messages of a chat in the forms in which files hold them, as messages of a role and a text.

A message has `role` and `content`, or `from` and `value` (ShareGPT). Its content is a text, or a list of parts of text.
The assistant's may call tools, and those of the role `tool` hold what a tool gave.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from zotune.errors import UsageError
from zotune.llm.data.readers.located import LocatedRow
from zotune.llm.rows.cells import check_characters, from_json, list_of, short
from zotune.llm.rows.records import Message

# Names of the speakers in files of ShareGPT.
_SHAREGPT_ROLES = {
    **{"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant"},
    **{"bing": "assistant", "bard": "assistant", "model": "assistant", "system": "system"},
    **{"tool": "tool", "observation": "tool", "function_response": "tool"},
}
# A message of ShareGPT that is a call of a tool, as JSON.
_SHAREGPT_CALL = "function_call"
_BEGINS_MESSAGES = re.compile(r'\s*\[\s*\{\s*"')
_LIKE = 'messages, [{"role": "user", "content": "…"}, …]'


def holds_messages(row: LocatedRow, column: str) -> bool:
    """Return whether a cell holds messages and not text; a text is messages only if it is JSON of some with speakers.

    >>> holds_messages(LocatedRow("", {"prompt": [{"role": "user", "content": "hi"}]}), "prompt")
    True
    >>> holds_messages(LocatedRow("", {"prompt": '[{"a": 1}] Which key is there?'}), "prompt")
    False
    """
    value = row.columns.get(column)
    if not isinstance(value, str):
        return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)
    value = from_json(value, row.place) if _BEGINS_MESSAGES.match(value) else None
    return isinstance(value, list) and all(isinstance(m, dict) and m.keys() & {"role", "from"} for m in value)


def messages_of(row: LocatedRow, column: str) -> tuple[Message, ...]:
    """Return the messages in a column.

    Raises:
        UsageError: it holds none, or one that is not understood; the message names file, line and message.
    """
    found = without_nulls(list_of(row, column, _LIKE))
    return tuple(_message(value, number, row, column) for number, value in enumerate(found, start=1))


def _message(value: Any, number: int, row: LocatedRow, column: str) -> Message:
    place = f"{row.place}: message {number}"
    if not isinstance(value, dict):
        raise UsageError(f"{place} must be an object with a role and a content; got {short(value)}.")
    message = _of_sharegpt(value, place) if "from" in value and "role" not in value else dict(value)
    role, calls = message.get("role"), message.get("tool_calls")
    if not (isinstance(role, str) and role.strip()):
        raise UsageError(f"{place} must have a role and a content, both non-empty texts; got {short(value)}.")
    if calls:
        message["tool_calls"] = _calls(calls, place)
    text = _text(message.get("content", ""), place)
    if not text.strip() and not calls and role != "tool":
        raise UsageError(f"{place} must have a role and a content, both non-empty texts; got {short(value)}.")
    check_characters(text, row, column)
    return {**message, "content": text}


def _of_sharegpt(value: Mapping[str, Any], place: str) -> Message:
    """Return a message of ShareGPT with role and content."""
    speaker, said = value["from"], value.get("value", "")
    if speaker == _SHAREGPT_CALL:
        calls = from_json(said, place) if isinstance(said, str) else said
        return {"role": "assistant", "content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
    if speaker not in _SHAREGPT_ROLES:
        known = ", ".join([*_SHAREGPT_ROLES, _SHAREGPT_CALL])
        raise UsageError(f"{place} is from {short(speaker)}; it must be from one of {known}.")
    return {"role": _SHAREGPT_ROLES[speaker], "content": said}


def _text(content: Any, place: str) -> str:
    """Return a content as one text: parts of text follow one another as they are written.

    Raises:
        UsageError: a part is no text.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UsageError(
            f"{place} must have a role and a content, both non-empty texts; its content is {short(content)}."
        )
    return "".join(_part(part, place) for part in content)


def _part(part: Any, place: str) -> str:
    kind = part.get("type", "text") if isinstance(part, dict) else None
    text = part.get("text") if isinstance(part, dict) else part
    if kind in (None, "text") and isinstance(text, str):
        return text
    if isinstance(kind, str) and kind != "text":
        raise UsageError(
            f"{place} holds a part of type {kind!r}, and zotune reads text alone: no images, sounds or videos. Leave "
            "the row out, or write what the part shows as text."
        )
    raise UsageError(f'{place} holds the part {short(part)}; a part must be {{"type": "text", "text": "…"}}.')


def _calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """Return calls of tools in the form that chat templates read, with their arguments as an object."""
    if not isinstance(calls, list):
        raise UsageError(f"{place} must have a list of tool_calls; got {short(calls)}.")
    return [_call(call, place) for call in calls]


def _call(call: Any, place: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UsageError(
            f'{place} holds the tool call {short(call)}; it must be {{"type": "function", "function": {{"name": "…", '
            '"arguments": {…}}}.'
        )
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = from_json(arguments or "{}", place)
    if not isinstance(arguments, dict):
        raise UsageError(
            f"{place}: the arguments of the tool call of {function['name']!r} are {short(arguments)}; they must be an "
            "object, or its JSON text."
        )
    outer = {key: part for key, part in call.items() if key not in ("name", "arguments")} if function is call else call
    return {"type": "function", **outer, "function": {**function, "arguments": arguments}}


def tools_of(row: LocatedRow, column: str) -> tuple[Mapping[str, Any], ...]:
    """Return the tools in a column, a list of JSON schemas or its JSON text; none without such a column.

    Raises:
        UsageError: it holds something else.
    """
    value = row.columns.get(column)
    if value is None or value in ("", "[]", []):
        return ()
    tools: Sequence[Any] = without_nulls(list_of(row, column, 'tools, [{"type": "function", "function": {…}}, …]'))
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UsageError(
                f"{row.place}: the column {column!r} holds the tool {short(tool)}; a tool must be "
                '{"type": "function", "function": {"name": "…", "description": "…", "parameters": {…}}}.'
            )
    return tuple(tools)


def without_nulls(value: Any) -> Any:
    """Return messages without the keys whose value is null, at any depth.

    A table has all keys in all rows, and null where a row has none; JSON lines leave them out. A template should not
    see a difference.

    >>> without_nulls([{"role": "user", "name": None, "tool_calls": [{"function": {"name": "get", "strict": None}}]}])
    [{'role': 'user', 'tool_calls': [{'function': {'name': 'get'}}]}]
    """
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value
