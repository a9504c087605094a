"""Writing a prompt and its candidates as a chat: the prompt is the user's message, a candidate begins the answer.

What a template writes before an answer is found by rendering, as the turns of a chat are. Candidates are compared as
they are written, without the token that ends a turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from zotune.errors import UsageError
from zotune.llm.data.chat_template import ChatTemplate, Message
from zotune.llm.data.examples import Example

# Stands for an answer that no template changes: characters of a script for private use.
_ANSWER = chr(0xE000) * 3


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    """Return the messages with a message of the system at their start, if they have none and a text is given.

    >>> with_system([{"role": "user", "content": "Hi"}], "Be brief.")[0]
    {'role': 'system', 'content': 'Be brief.'}
    """
    has_one = any(message.get("role") in ("system", "developer") for message in messages)
    return list(messages) if system is None or has_one else [{"role": "system", "content": system}, *messages]


def in_chat(example: Example, template: ChatTemplate, system: str | None = None) -> Example:
    """Return an example whose prompt and candidates a chat template has written.

    Args:
        example: the example, with its candidates as text; without any, a text is generated.
        template: the chat template.
        system: the message of the system before the user's; None for none.

    Raises:
        UsageError: the template rejects the messages, or changes an answer so that it cannot be located.
    """
    question: list[Message] = with_system([{"role": "user", "content": example.prompt.strip()}], system)
    if not example.candidates:
        opened = template.opening_answer(question)
        return replace(example, prompt=opened.text, controls=opened.controls, rendered=True)
    return _with_words(example, template, question)


def _with_words(example: Example, template: ChatTemplate, question: list[Message]) -> Example:
    """Return a prompt with several answers, each as the template begins it, without the end of its turn."""
    opened = template.with_turns([*question, _turn(_ANSWER)], only_last=True)
    before = opened.text[: opened.text.find(_ANSWER)]
    if not before or _ANSWER not in opened.text:
        raise UsageError("the chat template does not write the assistant's message as it is. Use another template.")
    lead = before[opened.turns[-1][0] :]
    space = lead[len(lead.rstrip(" ")) :]
    prompt = before.removesuffix(space)
    within = tuple((lo, min(hi, len(prompt))) for lo, hi in opened.controls if lo < len(prompt))
    return replace(
        example,
        prompt=prompt,
        candidates=tuple(space + candidate.strip() for candidate in example.candidates),
        controls=opened.controls if template.reads_control_tokens else within,
        rendered=True,
    )


def _turn(content: str) -> Message:
    return {"role": "assistant", "content": content}


def system_message(template: ChatTemplate) -> str:
    """Return what a template does with a message of the system: "written", "left out", or the words of its refusal."""
    probe: list[dict[str, Any]] = [{"role": "system", "content": _ANSWER}, {"role": "user", "content": "a"}]
    try:
        return "written" if _ANSWER in template.opening_answer(probe).text else "left out"
    except UsageError as error:
        return str(error)
