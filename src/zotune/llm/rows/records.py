"""The meaning of a row, independent of its shape and of a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from zotune.llm.data.control_tokens import Span

Message = dict[str, Any]


class Prompt(NamedTuple):
    """A filled template, and the (start, end) of the template's own text in it, where control tokens are read."""

    text: str
    controls: tuple[Span, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Record:
    """The meaning of a row.

    Attributes:
        place: file and line of the row, for messages.
        columns: the whole row, for rewards and metrics.
    """

    place: str
    columns: Mapping[str, Any] = field(compare=False, repr=False)


@dataclass(frozen=True, kw_only=True)
class Choice(Record):
    """A prompt, and candidates of which one is right.

    Attributes:
        candidates: words or texts without white space around them.
        label: the index of the right one.
    """

    prompt: Prompt
    candidates: tuple[str, ...]
    label: int


@dataclass(frozen=True, kw_only=True)
class Completion(Record):
    """A prompt and the text that follows it, exactly as it is written.

    Attributes:
        user, system: the messages of the user and the system in place of the prompt, for a model with a chat template;
            None: such models read the prompt as it is too.
    """

    prompt: Prompt
    completion: str
    user: str | None = None
    system: str | None = None


@dataclass(frozen=True, kw_only=True)
class PlainText(Record):
    """A text of which every token is learnt."""

    text: Prompt


@dataclass(frozen=True, kw_only=True)
class OpenPrompt(Record):
    """A prompt from which text is generated, and the references to compare it with, if there are any."""

    prompt: Prompt
    references: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Chat(Record):
    """The messages of a chat, of which the assistant's are learnt.

    Attributes:
        messages: `{"role": …, "content": …}`, with `tool_calls` where the assistant calls a tool.
        tools: the tools that the assistant may call, as JSON schemas.
        first: the number of messages before those that may be learnt, all of the assistant's behind them; None: its
            last one is learnt, or all, as `scored_turns` says.
        references: the accepted answers for a reward function, if the chat's last message is not the reference.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    first: int | None = None
    references: tuple[str, ...] = ()
