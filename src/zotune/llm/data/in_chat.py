"""Writing a prompt and its answers as a chat: the prompt is the user's message, an answer the assistant's turn.

What a template writes around an answer is found by rendering, as the turns of a chat are: the answer of a completion
is the whole turn with the token that ends it, so the model learns to stop; words and choices are compared as they are
written, without that end.
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


def in_chat(example: Example, template: ChatTemplate, system: str | None = None, end: str = "") -> Example:
    """Return an example whose prompt and candidates a chat template has written; one of a chat stays as it is.

    Args:
        example: the example, with its candidates as text.
        template: the chat template.
        system: the message of the system before the user's; None for none.
        end: the end-of-text token that a completion ends in, which the template's own end takes the place of.

    Raises:
        UsageError: the template rejects the messages, or changes an answer so that it cannot be located.
    """
    if example.spans:
        return example
    question: list[Message] = with_system([{"role": "user", "content": example.prompt.strip()}], system)
    if not example.candidates:
        opened = template.opening_answer(question)
        return replace(example, prompt=opened.text, controls=opened.controls, rendered=True)
    if len(example.candidates) == 1:
        return _with_turn(example, template, question, end)
    return _with_words(example, template, question)


def _with_turn(example: Example, template: ChatTemplate, question: list[Message], end: str) -> Example:
    """Return a prompt with the whole turn of its only answer."""
    answer = example.candidates[0].strip()
    bare = answer.removesuffix(end).strip() if end else answer
    found = template.with_turns([*question, _turn(bare)], only_last=True)
    start, stop = found.turns[-1]
    text = found.text
    return replace(example, prompt=text[:start], candidates=(text[start:stop],), controls=found.controls, rendered=True)


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
