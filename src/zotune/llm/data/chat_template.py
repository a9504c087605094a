"""Chats as a model's own template writes them, and which of their characters are the assistant's.

A turn's characters are found, never guessed. Either the template marks them itself (`{% generation %}`), or
they are what the chat up to the turn has more than the chat before it with the opening of an answer: both are
rendered, and where the one does not begin with the other the row is refused.
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
    """The whole chat as text, and the (start, end) of the assistant's turns in it, each with its end-of-turn token.

    Args:
        tokenizer: that of transformers, with a chat template.
        messages: `{"role": …, "content": …}`, the last one the assistant's.
        only_last: the last turn alone.

    Raises:
        UsageError: there is no template, it does not take these messages, or a turn's place cannot be told.
    """
    _check_template(tokenizer)
    text, marked = _rendered(tokenizer, messages)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if marked is not None:
        if len(marked) != len(turns):
            raise UsageError(f"the chat template marks {len(marked)} turns of {len(turns)}; it is broken.")
        spans = marked
    else:
        spans = [_turn(tokenizer, messages, i, text) for i in (turns[-1:] if only_last else turns)]
    return text, tuple(spans[-1:] if only_last else spans)


def opening(tokenizer: Any, messages: Sequence[Message]) -> str:
    """The chat up to where the assistant's next turn begins.

    Raises:
        UsageError: there is no template, or it does not take these messages.
    """
    _check_template(tokenizer)
    return _rendered(tokenizer, messages, opens_answer=True)[0]


def _turn(tokenizer: Any, messages: Sequence[Message], index: int, text: str) -> Span:
    """Where one turn stands in the whole chat."""
    before, _ = _rendered(tokenizer, messages[:index], opens_answer=True)
    after, _ = _rendered(tokenizer, messages[: index + 1])
    if not (after.startswith(before) and text.startswith(after)):
        raise UsageError(
            f"the chat template writes the turns up to message {index + 1} differently when others follow, so what is "
            "the assistant's cannot be told. Use --scored-turns last, or a template that marks its turns with "
            "{% generation %}."
        )
    turn = after[len(before) :]
    # What ends a turn is scored, for the model has to say it; line breaks behind it are the template's.
    bare = turn.rstrip()
    ends = [*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()]
    return len(before), len(before) + len(bare if any(bare.endswith(end) for end in ends) else turn)


def _check_template(tokenizer: Any) -> None:
    if getattr(tokenizer, "chat_template", None) is None:
        raise UsageError(
            "the model's tokenizer has no chat template. Use a model that was made for chats, or rows of prompt and "
            "completion."
        )


def _rendered(
    tokenizer: Any, messages: Sequence[Message], *, opens_answer: bool = False
) -> tuple[str, list[Span] | None]:
    """The template's text, and the spans that it marks itself; None where it marks none."""
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
        raise UsageError(f"the chat template does not take these messages: {error}") from None
    return texts[0], [(start, end) for start, end in spans[0]] if marks else None
