"""Rendering chats with a model's chat template, and locating the assistant's characters in them.

The characters of a turn are never guessed. Either the template marks them itself (`{% generation %}`), or they are the
difference between two renderings: the chat up to and including the turn, and the chat before it with the opening of an
answer. If the first does not start with the second, the row is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from zotune.errors import UsageError

Message = dict[str, Any]
Span = tuple[int, int]

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


def assistant_spans(tokenizer: Any, messages: Sequence[Message], *, only_last: bool) -> tuple[str, tuple[Span, ...]]:
    """Return the whole chat as text, and the (start, end) of the assistant's turns, each with its end-of-turn token.

    Args:
        tokenizer: a tokenizer of transformers with a chat template.
        messages: `{"role": …, "content": …}`, the last one by the assistant.
        only_last: whether to return the last turn only.

    Raises:
        UsageError: there is no template, it rejects these messages, or a turn cannot be located.
    """
    _check_template(tokenizer)
    text, marked = _render(tokenizer, messages)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if marked is not None:
        if len(marked) != len(turns):
            raise UsageError(
                f"the chat template marks {len(marked)} of {len(turns)} turns of the assistant. Correct its "
                "{% generation %} marks, or remove them."
            )
        spans = marked
    else:
        spans = [_turn_span(tokenizer, messages, i, text) for i in (turns[-1:] if only_last else turns)]
    return text, tuple(spans[-1:] if only_last else spans)


def chat_prompt(tokenizer: Any, messages: Sequence[Message]) -> str:
    """Return the chat as text up to the start of the assistant's next turn.

    Raises:
        UsageError: there is no template, or it rejects these messages.
    """
    _check_template(tokenizer)
    return _render(tokenizer, messages, opens_answer=True)[0]


def _turn_span(tokenizer: Any, messages: Sequence[Message], index: int, text: str) -> Span:
    """Locate one turn in the whole chat."""
    before, _ = _render(tokenizer, messages[:index], opens_answer=True)
    after, _ = _render(tokenizer, messages[: index + 1])
    if not (after.startswith(before) and text.startswith(after)):
        raise UsageError(
            f"the chat template renders the turns up to message {index + 1} differently when others follow, so the "
            "assistant's characters cannot be located. Use --scored-turns last, or a template that marks its turns "
            "with "
            "{% generation %}."
        )
    turn = after[len(before) :]
    # The end-of-turn token is scored, because the model has to generate it; line breaks after it are not.
    bare = turn.rstrip()
    ends = [*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()]
    return len(before), len(before) + len(bare if any(bare.endswith(end) for end in ends) else turn)


def _check_template(tokenizer: Any) -> None:
    if getattr(tokenizer, "chat_template", None) is None:
        raise UsageError(
            "the model's tokenizer has no chat template. Use a model that was trained for chats, or rows with a prompt "
            "and a completion."
        )


def _render(
    tokenizer: Any, messages: Sequence[Message], *, opens_answer: bool = False
) -> tuple[str, list[Span] | None]:
    """Render the template; return the text and the spans that the template marks, or None if it marks none."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    template = tokenizer.get_chat_template()
    marks = bool(_MARKED.search(template))
    try:
        texts, spans = render_jinja_template(
            [list(messages)],
            chat_template=template,
            return_assistant_tokens_mask=marks,
            add_generation_prompt=opens_answer,
            **tokenizer.special_tokens_map,
        )
    except (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise UsageError(f"the chat template rejects these messages: {error}") from None
    return texts[0], [(start, end) for start, end in spans[0]] if marks else None
