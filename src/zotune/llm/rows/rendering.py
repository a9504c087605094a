"""A record as an example of one model: what its tokenizer and its chat template add to the texts of a row."""

from __future__ import annotations

from datetime import date
from typing import Any

from zotune.errors import UsageError
from zotune.llm.config.data import DataOptions
from zotune.llm.data.chat_template import ChatTemplate
from zotune.llm.data.examples import Example
from zotune.llm.rows.records import Chat, Choice, Completion, OpenPrompt, Record


def example_of(record: Record, options: DataOptions, tokenizer: Any) -> Example:
    """Return what a model reads of a row, and what is scored.

    Args:
        record: what the row means.
        options: the conversion of rows.
        tokenizer: the model's tokenizer; records of choices need none.

    Raises:
        UsageError: the model cannot read the row so; the message names file and line.
    """
    match record:
        case Choice():
            return _of_choice(record)
        case Completion():
            return _of_completion(record, options, tokenizer)
        case OpenPrompt():
            return _of_open_prompt(record, tokenizer)
        case Chat():
            return _of_chat(record, options, tokenizer)
    raise TypeError(f"no example is made of a {type(record).__name__}")


def _of_choice(record: Choice) -> Example:
    text, controls = record.prompt
    candidates = tuple(_after_prompt(text, candidate) for candidate in record.candidates)
    return Example(text, candidates, record.label, controls=controls, place=record.place)


def _of_completion(record: Completion, options: DataOptions, tokenizer: Any) -> Example:
    """Return the completion as it is written, with the end-of-text token, which is not written a second time."""
    if record.user is not None and has_chat_template(tokenizer):
        return _of_chat(_as_chat(record), options, tokenizer)
    end = tokenizer.eos_token or ""
    text = without_end(record.completion, end)
    answers: tuple[str, ...] = ()
    if options.compares_answers:
        _check_can_be_generated(text, record.place, options, tokenizer)
    if options.compares_answers or options.is_function:
        answers = (text.strip(),)
    prompt, controls = record.prompt
    return Example(prompt, (text + end,), 0, answers=answers, controls=controls, place=record.place)


def _of_open_prompt(record: OpenPrompt, tokenizer: Any) -> Example:
    end = tokenizer.eos_token or ""
    answers = tuple(without_end(text, end).strip() for text in record.references)
    text, controls = record.prompt
    return Example(text, (), 0, answers=answers, controls=controls, place=record.place)


def _of_chat(record: Chat, options: DataOptions, tokenizer: Any) -> Example:
    """Return the messages as the chat template writes them; the assistant's turns are scored, or one generated."""
    try:
        template = chat_template_of(options, tokenizer)
        return _to_answer(record, template) if options.is_function else _with_turns(record, template, options)
    except UsageError as error:
        raise UsageError(f"{record.place}: {error}") from None


def _with_turns(record: Chat, template: ChatTemplate, options: DataOptions) -> Example:
    only_last = record.first is None and options.scored_turns == "last"
    found = template.with_turns(record.messages, only_last=only_last, tools=record.tools, first=record.first or 0)
    return Example(found.text, ("",), 0, spans=found.turns, controls=found.controls, place=record.place)


def _to_answer(record: Chat, template: ChatTemplate) -> Example:
    """The chat up to the answer to generate; an answer in the row becomes the reference."""
    *before, last = record.messages
    is_answered = last["role"] == "assistant"
    found = template.opening_answer(before if is_answered else record.messages, tools=record.tools)
    answers = (last["content"].strip(),) if is_answered else tuple(text.strip() for text in record.references)
    end = len(found.text)
    return Example(found.text, (), 0, answers=answers, spans=((end, end),), controls=found.controls, place=record.place)


def _as_chat(record: Completion) -> Chat:
    """Return a prompt and its completion as what the user says and what the assistant answers."""
    said = {"system": record.system, "user": record.user, "assistant": record.completion}
    messages = tuple({"role": role, "content": text} for role, text in said.items() if text is not None)
    return Chat(place=record.place, columns=record.columns, messages=messages)


def has_chat_template(tokenizer: Any) -> bool:
    """Return whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def is_written_as_chat(record: Record, tokenizer: Any) -> bool:
    """Return whether the chat template writes a record."""
    is_asked = isinstance(record, Completion) and record.user is not None
    return isinstance(record, Chat) or (is_asked and has_chat_template(tokenizer))


def chat_template_of(options: DataOptions, tokenizer: Any) -> ChatTemplate:
    """Return the chat template of a tokenizer, as the options have it read.

    Raises:
        UsageError: it has none, or one that cannot be used.
    """
    today = None if options.chat_date is None else date.fromisoformat(options.chat_date)
    return ChatTemplate(tokenizer, today, options.read_control_tokens)


def _after_prompt(prompt: str, text: str) -> str:
    """Return a candidate after a prompt, with a space before it unless the prompt ends in white space."""
    return text if prompt[-1:].isspace() else f" {text}"


def without_end(text: str, end: str) -> str:
    r"""Return a text without the end-of-text token that it ends in, and white space after the token.

    >>> without_end(" pong</s>\n", "</s>"), without_end(" pong\n", "</s>"), without_end(" pong", "")
    (' pong', ' pong\n', ' pong')
    """
    bare = text.rstrip()
    return bare.removesuffix(end) if end and bare.endswith(end) else text


def _check_can_be_generated(text: str, place: str, options: DataOptions, tokenizer: Any) -> None:
    tokens = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    one_line = options.stop_at == "newline"
    if (one_line and "\n" in text.strip()) or tokens > options.max_new_tokens:
        output = "one generated line" if one_line else "generated text"
        raise UsageError(
            f"{place}: {options.objective or 'exact_match'} compares {output} of at most {options.max_new_tokens} "
            f"tokens, but this completion has {len(text.strip().splitlines())} lines and {tokens} tokens. "
            "Raise --max-new-tokens, or give --stop-at end for several lines."
        )
