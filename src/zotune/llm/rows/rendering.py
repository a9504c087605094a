"""Records as examples for one model: its tokenizer and its chat template complete the texts of a row."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from typing import Any

from zotune.errors import UsageError
from zotune.llm.config.data import DataOptions
from zotune.llm.data.chat_template import ChatTemplate
from zotune.llm.data.examples import Example
from zotune.llm.data.in_chat import in_chat, with_system
from zotune.llm.rows.records import Chat, Choice, Completion, OpenPrompt, PlainText, Record


def example_of(record: Record, options: DataOptions, tokenizer: Any) -> Example:
    """Return the example of a row: the text that a model reads, and its scored parts.

    Args:
        record: the meaning of the row.
        options: the conversion of rows.
        tokenizer: the model's tokenizer; records of choices need none.

    Raises:
        UsageError: the model cannot read the row so; the message names file and line.
    """
    example = _example_of(record, options, tokenizer)
    return replace(example, columns=record.columns) if options.reads_columns else example


def _example_of(record: Record, options: DataOptions, tokenizer: Any) -> Example:
    match record:
        case Choice():
            return _in_chat(_of_choice(record), options, tokenizer)
        case Completion():
            return _of_completion(record, options, tokenizer)
        case OpenPrompt():
            return _in_chat(_of_open_prompt(record, tokenizer), options, tokenizer)
        case PlainText():
            return _of_plain_text(record, tokenizer)
        case Chat():
            return _of_chat(record, options, tokenizer)
    raise TypeError(f"no example is made of a {type(record).__name__}")


def _of_choice(record: Choice) -> Example:
    text, controls = record.prompt
    candidates = tuple(_after_prompt(text, candidate) for candidate in record.candidates)
    return Example(text, candidates, record.label, controls=controls, place=record.place)


def _of_completion(record: Completion, options: DataOptions, tokenizer: Any) -> Example:
    """Return the completion as it is written, with the end-of-text token, which is not written a second time."""
    end = tokenizer.eos_token or ""
    if is_written_as_chat(record, options, tokenizer):
        return _of_chat(_as_chat(record, end), options, tokenizer)
    text = without_end(record.completion, end)
    answers = _answers(text, record.place, options, tokenizer)
    prompt, controls = record.prompt
    return Example(prompt, (text + end,), 0, answers=answers, controls=controls, place=record.place)


def _of_open_prompt(record: OpenPrompt, tokenizer: Any) -> Example:
    end = tokenizer.eos_token or ""
    answers = tuple(without_end(text, end).strip() for text in record.references)
    text, controls = record.prompt
    return Example(text, (), 0, answers=answers, controls=controls, place=record.place)


def _of_plain_text(record: PlainText, tokenizer: Any) -> Example:
    """Return a text as what follows an empty prompt, with the end-of-text token, which is not written a second time."""
    end = tokenizer.eos_token or ""
    text = without_end(record.text.text, end)
    return Example("", (text + end,), 0, controls=record.text.controls, place=record.place)


def _of_chat(record: Chat, options: DataOptions, tokenizer: Any) -> Example:
    """Return the messages as the chat template writes them; the assistant's turns are scored, or one generated."""
    record = _with_system(record, options)
    try:
        template = chat_template_of(options, tokenizer)
        if options.is_function:
            return _to_answer(record, template)
        answers = _answers(record.messages[-1]["content"], "the last turn", options, tokenizer)
        return replace(_with_turns(record, template, options), answers=answers)
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


def _with_system(record: Chat, options: DataOptions) -> Chat:
    """Return a chat with the message of the system that the options give, if it has none."""
    messages = tuple(with_system(record.messages, options.system_prompt))
    added = len(messages) - len(record.messages)
    return replace(record, messages=messages, first=record.first if record.first is None else record.first + added)


def _in_chat(example: Example, options: DataOptions, tokenizer: Any) -> Example:
    """Return an example as the chat template writes its prompt and its candidates, if that is asked for."""
    if not options.apply_chat_template:
        return example
    try:
        return in_chat(example, chat_template_of(options, tokenizer), options.system_prompt)
    except UsageError as error:
        raise UsageError(f"{example.place}: {error}") from None


def _answers(text: str, place: str, options: DataOptions, tokenizer: Any) -> tuple[str, ...]:
    """Return the answer of a row, if generated text is compared with it or judged beside it."""
    if options.compares_answers:
        _check_can_be_generated(text, place, options, tokenizer)
    return (text.strip(),) if options.generates_text else ()


def _as_chat(record: Completion, end: str) -> Chat:
    """Return a prompt and its completion as what the user says and what the assistant answers."""
    said = {"system": record.system, "user": record.user, "assistant": record.completion}
    if record.user is None:  # what stands between the two in a text is of neither
        said |= {"user": record.prompt.text.strip(), "assistant": without_end(record.completion, end).strip()}
    messages = tuple({"role": role, "content": text} for role, text in said.items() if text is not None)
    return Chat(place=record.place, columns=record.columns, messages=messages)


def has_chat_template(tokenizer: Any) -> bool:
    """Return whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def is_written_as_chat(record: Record, options: DataOptions, tokenizer: Any) -> bool:
    """Return whether the chat template writes a record."""
    is_asked = isinstance(record, Completion) and record.user is not None
    return isinstance(record, Chat) or options.apply_chat_template or (is_asked and has_chat_template(tokenizer))


def chat_template_of(options: DataOptions, tokenizer: Any) -> ChatTemplate:
    """Return the chat template of a tokenizer, at the date of the options.

    Raises:
        UsageError: the tokenizer has none, or one that cannot be used.
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
