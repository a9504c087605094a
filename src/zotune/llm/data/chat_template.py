"""Rendering chats with a model's chat template, and locating the assistant's characters in them.

The characters of a turn are never guessed. Either the template marks them itself (`{% generation %}`), or they are the
difference between two renderings: the chat up to and including the turn, and the chat before it with the opening of an
answer. If the first does not start with the second, the row is refused.

A rendering depends on the messages alone: a template that reads the clock gets the date of the run's config, and the
text of a control token within a message stays plain text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date, datetime, time
from functools import lru_cache
from typing import Any, cast

from zotune.errors import UsageError
from zotune.llm.data.control_tokens import EVERYWHERE, Span, control_tokens
from zotune.system.bounds import CHAT_MEMORY, address_space, memory_below

Message = dict[str, Any]
Tool = Mapping[str, Any]

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
# A call of transformers' clock with a format written out: the format, in either kind of quotes.
_CLOCK = "strftime_now"
_CLOCK_CALL = re.compile(_CLOCK + r"""\(\s*(?:format\s*=\s*)?(?:"([^"\\]*)"|'([^'\\]*)')\s*\)""")


# What an expression of a template may raise.
_PYTHON_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True)
class ChatText:
    """A rendered chat.

    Attributes:
        text: the chat with its special tokens as text.
        controls: the (start, end) of the characters in which the texts of control tokens are these tokens.
        turns: the (start, end) of the assistant's turns, each with its end-of-turn token.
    """

    text: str
    controls: tuple[Span, ...] = EVERYWHERE
    turns: tuple[Span, ...] = ()


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: a tokenizer of transformers with a chat template.
        today: the date for a template that reads the clock; None if it does not.
        reads_control_tokens: whether the texts of control tokens in messages are read as these tokens.

    Raises:
        UsageError: the tokenizer has no template, or several without a default, or the template draws at random.
    """

    tokenizer: Any
    today: date | None = None
    reads_control_tokens: bool = False
    _source: str = field(init=False)

    def __post_init__(self) -> None:
        source = _template_of(self.tokenizer)
        if names_used(source) & {"|random", "lipsum"}:
            raise UsageError(
                "the model's chat template draws at random, so the same rows would give other texts in each run. "
                "Save the tokenizer with a template that does not."
            )
        object.__setattr__(self, "_source", source if self.today is None else _at_date(source, self.today))

    def with_turns(
        self, messages: Sequence[Message], *, only_last: bool, tools: Sequence[Tool] = (), first: int = 0
    ) -> ChatText:
        """Return the whole chat with the assistant's turns.

        Args:
            messages: `{"role": …, "content": …}`, the last one by the assistant.
            only_last: whether to return the last turn only.
            tools: JSON schemas of the tools that the assistant may call.
            first: the number of messages before the first turn to return.

        Raises:
            UsageError: the template rejects these messages, writes no calls of tools, or a turn cannot be located.
        """
        self._check_writes_calls(messages)
        hidden, tools = self._hide(messages), self._hide(tools)
        text, marked = self._render(hidden, tools)
        turns = [i for i, message in enumerate(hidden) if message["role"] == "assistant"]
        chosen = [i for i in turns if i >= first][-1 if only_last else 0 :]
        if marked is not None:
            if len(marked) != len(turns):
                raise UsageError(
                    f"the chat template marks {len(marked)} of {len(turns)} turns of the assistant. Correct its "
                    "{% generation %} marks, or remove them."
                )
            spans = marked[len(turns) - len(chosen) :]
        else:
            spans = [self._turn_span(hidden, i, text, tools) for i in chosen]
        shown, controls = self._show(text)
        return ChatText(shown, controls, tuple(spans))

    def opening_answer(self, messages: Sequence[Message], *, tools: Sequence[Tool] = ()) -> ChatText:
        """Return the chat up to the start of the assistant's next turn.

        Raises:
            UsageError: the template rejects these messages, or writes no calls of tools.
        """
        self._check_writes_calls(messages)
        return ChatText(*self._show(self._render(self._hide(messages), self._hide(tools), opens_answer=True)[0]))

    @property
    def writes_tools(self) -> bool:
        """Whether the template writes the tools that the assistant may call."""
        return "tools" in names_used(self._source)

    def _check_writes_calls(self, messages: Sequence[Message]) -> None:
        if any("tool_calls" in message for message in messages) and "tool_calls" not in self._source:
            raise UsageError(
                "the assistant calls a tool, and the model's chat template writes no calls of tools, so the model "
                "would learn an empty turn. Use a model whose template writes them, or give one with --chat-template."
            )

    def _hide(self, values: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        hide = (lambda text: text) if self.reads_control_tokens else control_tokens(self.tokenizer).hide
        return cast(list[dict[str, Any]], _mapped(list(values), hide))

    def _show(self, text: str) -> tuple[str, tuple[Span, ...]]:
        return (text, EVERYWHERE) if self.reads_control_tokens else control_tokens(self.tokenizer).show(text)

    def _turn_span(self, messages: Sequence[Message], index: int, text: str, tools: Sequence[Tool]) -> Span:
        """Locate one turn in the whole chat."""
        before, _ = self._render(messages[:index], tools, opens_answer=True)
        after, _ = self._render(messages[: index + 1], tools)
        if not (after.startswith(before) and text.startswith(after)):
            raise UsageError(
                f"the chat template renders the turns up to message {index + 1} differently when others follow, so the "
                "assistant's characters cannot be located. Use --scored-turns last, or a template that marks its turns "
                "with {% generation %}."
            )
        turn = after[len(before) :]
        # The end-of-turn token is scored, because the model has to generate it; line breaks after it are not.
        bare = turn.rstrip()
        ends = [*self.tokenizer.all_special_tokens, *self.tokenizer.get_added_vocab()]
        return len(before), len(before) + len(bare if any(bare.endswith(end) for end in ends) else turn)

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Tool], *, opens_answer: bool = False
    ) -> tuple[str, list[Span] | None]:
        """Render the template; return the text and the spans that the template marks, or None if it marks none."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        marks = bool(_MARKED.search(self._source))
        try:
            # The template is the model's: its sandbox bounds neither repetition of text nor widths.
            with memory_below(address_space() + CHAT_MEMORY.value):
                texts, spans = render_jinja_template(
                    [list(messages)],
                    tools=list(tools) or None,
                    chat_template=self._source,
                    return_assistant_tokens_mask=marks,
                    add_generation_prompt=opens_answer,
                    **self.tokenizer.special_tokens_map,
                )
        except MemoryError:
            raise UsageError(CHAT_MEMORY.refusal("the model's chat template")) from None
        except (TemplateError, *_PYTHON_ERRORS) as error:
            raise UsageError(f"the chat template rejects these messages: {error}") from None
        return texts[0], [(start, end) for start, end in spans[0]] if marks else None


def reads_clock(tokenizer: Any) -> bool:
    """Return whether a tokenizer's chat template writes the date of today; False if it has no template for chats."""
    with suppress(UsageError):
        return _CLOCK in names_used(_template_of(tokenizer))
    return False


@lru_cache(maxsize=16)
def _at_date(source: str, today: date) -> str:
    """Return a template with the calls of the clock replaced by what they give at a date.

    Raises:
        UsageError: the template uses the clock in another way, so its text cannot be fixed.
    """

    def then(call: re.Match[str]) -> str:
        return repr(datetime.combine(today, time()).strftime(call[1] if call[1] is not None else call[2]))

    fixed = _CLOCK_CALL.sub(then, source)
    if _CLOCK in names_used(fixed):
        raise UsageError(
            f"the model's chat template reads the clock ({_CLOCK}) with a format that is not written out, so the text "
            "of a row would change from day to day. Save the tokenizer with a template that does not."
        )
    return fixed


@lru_cache(maxsize=16)
def names_used(template: str) -> frozenset[str]:
    """Return the variables and (after a bar) filters of a template, but no variable that it only asks about."""
    from jinja2 import Environment, TemplateSyntaxError, nodes

    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except TemplateSyntaxError:
        return frozenset()  # rendering says what is wrong
    asked = [id(test.node) for test in tree.find_all(nodes.Test) if test.name in ("defined", "undefined")]
    used = [node for node in tree.find_all(nodes.Name) if id(node) not in asked]
    return frozenset([*(node.name for node in used), *(f"|{node.name}" for node in tree.find_all(nodes.Filter))])


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Return a nested value with all its texts changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(part, change) for key, part in value.items()}
    return [_mapped(part, change) for part in value] if isinstance(value, list) else value


def _template_of(tokenizer: Any) -> str:
    """Return the template for chats.

    Raises:
        UsageError: there is none, or several and none is the default.
    """
    known = getattr(tokenizer, "chat_template", None)
    if not known:
        raise UsageError(
            "the model's tokenizer has no chat template. Use a model that was trained for chats, rows with a prompt "
            "and a completion, or give a template with --chat-template (a file, chatml or plain)."
        )
    if isinstance(known, dict) and "default" not in known:
        names = ", ".join(sorted(known))
        raise UsageError(
            f"the model's tokenizer has several chat templates ({names}), and none of them is named default. Choose "
            "one with --chat-template NAME."
        )
    return str(tokenizer.get_chat_template())
