"""The shapes of a user's own rows: text and label, prompt and completion, chats, multiple choice, a prompt alone.

Each shape is a pure function from a row to an example. What is wrong with a row is said with its place.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from zotune.errors import UsageError, did_you_mean
from zotune.llm.config.run import DataOptions
from zotune.llm.data.chat_template import assistant_spans, opening
from zotune.llm.data.examples import Example
from zotune.llm.data.readers import Located
from zotune.llm.scoring.accuracy import Measure, evaluate
from zotune.llm.scoring.answers import evaluate_answers
from zotune.llm.scoring.objectives import CLASSIFICATION, TEACHER_FORCING, Objective
from zotune.llm.scoring.perplexity import evaluate_log_loss

# A row, the options and the model's tokenizer → the example.
ToExample = Callable[[Located, DataOptions, Any], Example]

# The shape of rows that only a function can judge.
PROMPT_ALONE = "prompt"


@dataclass(frozen=True)
class Format:
    """A shape of rows.

    Attributes:
        description: what a row holds.
        template: the prompt where none is given; None where the prompt is the chat template's affair.
        roles: what a row must hold beside what the template names.
        to_example: a row to an example.
        uses: options that only some shapes have a use for.
    """

    description: str
    template: str | None
    roles: tuple[str, ...]
    to_example: ToExample
    objective: Objective
    measure: Measure
    uses: frozenset[str]

    def columns(self, options: DataOptions) -> tuple[str, ...]:
        """The columns that a row must have."""
        template = None if self.template is None else options.template or self.template
        named = () if template is None else fields(template)
        return tuple(dict.fromkeys(column_of(role, options) for role in (*named, *self.roles)))


def column_of(role: str, options: DataOptions) -> str:
    """The column that plays a role: text, label, prompt, completion, messages or choices; others are what they are."""
    own = {"text": options.text_column, "label": options.label_column}
    return own.get(role) or options.columns.get(role, role)


def classification(row: Located, options: DataOptions, tokenizer: Any) -> Example:
    """The template, and each label's word as a candidate; labels that share a word are one class."""
    label = text_of(row, options.label_column)
    words = options.verbalizer
    if label not in words:
        raise UsageError(f"{row.place}: the label {label!r} is not in the verbalizer.{did_you_mean(label, words)}")
    prompt = _prompt(row, options)
    distinct = list(dict.fromkeys(word.strip() for word in words.values()))
    candidates = tuple(_continuing(prompt, word) for word in distinct)
    return Example(prompt, candidates, distinct.index(words[label].strip()), place=row.place)


def completion(row: Located, options: DataOptions, tokenizer: Any) -> Example:
    """The template, and the completion exactly as it is written, with the end of text behind it."""
    text = _not_empty(row, column_of("completion", options))
    answers: tuple[str, ...] = ()
    if options.compares_answers:
        _check_can_be_generated(text, row, options, tokenizer)
    if options.compares_answers or options.is_function:
        answers = (text.strip(),)
    return Example(_prompt(row, options), (text + (tokenizer.eos_token or ""),), 0, answers=answers, place=row.place)


def chat(row: Located, options: DataOptions, tokenizer: Any) -> Example:
    """The messages as the model's chat template writes them, the assistant's turns scored."""
    column = column_of("messages", options)
    messages = _list_of(row, column, 'messages, [{"role": "user", "content": "…"}, …]')
    for message in messages:
        parts = [message.get(part) for part in ("role", "content")] if isinstance(message, dict) else [None]
        if not all(isinstance(part, str) and part.strip() for part in parts):
            raise UsageError(
                f"{row.place}: each message has a role and a content, both texts that are not empty; got "
                f"{_short(message)}."
            )
        _check_characters(message["content"], row, column)
    if options.is_function and messages:
        return _opened(row, messages, tokenizer)
    if not messages or messages[-1]["role"] != "assistant":
        last = repr(messages[-1]["role"]) if messages else "missing"
        raise UsageError(f"{row.place}: the last message is the assistant's, which is learnt; here its role is {last}.")
    try:
        text, spans = assistant_spans(tokenizer, messages, only_last=options.scored_turns == "last")
    except UsageError as error:
        raise UsageError(f"{row.place}: {error}") from None
    return Example(text, ("",), 0, spans=spans, place=row.place)


def _opened(row: Located, messages: list[dict[str, str]], tokenizer: Any) -> Example:
    """The chat up to the answer that is to be generated; an answer that the row has is what to compare with."""
    is_answered = messages[-1]["role"] == "assistant"
    try:
        text = opening(tokenizer, messages[: len(messages) - is_answered])
    except UsageError as error:
        raise UsageError(f"{row.place}: {error}") from None
    answers = (messages[-1]["content"].strip(),) if is_answered else ()
    return Example(text, (), 0, answers=answers, spans=((len(text), len(text)),), place=row.place)


def choice(row: Located, options: DataOptions, tokenizer: Any) -> Example:
    """The template, and the row's own choices as candidates; the label is the right one's index, or itself."""
    column = column_of("choices", options)
    given = _list_of(row, column, 'choices, ["one", "two", …]')
    choices = [text_of(Located(row.place, {column: c}), column).strip() for c in given]
    if len(choices) < 2 or not all(choices):
        raise UsageError(f"{row.place}: the column {column!r} holds {_short(given)}; two choices or more, none empty.")
    twice = next((c for i, c in enumerate(choices) if c in choices[:i]), None)
    if twice is not None:
        raise UsageError(f"{row.place}: the choice {twice!r} is there twice, so neither can be right alone.")
    prompt = _prompt(row, options)
    return Example(prompt, tuple(_continuing(prompt, c) for c in choices), _right(row, options, given), place=row.place)


def prompt_alone(row: Located, options: DataOptions, tokenizer: Any) -> Example:
    """The template, from which text is generated; the label or the completion, if any, is what to compare with.

    Either may be a list of what is accepted.
    """
    answers: list[Any] = []
    for column in (options.label_column, column_of("completion", options)):
        value = row.columns.get(column)
        if value is not None and not answers:
            given = value if isinstance(value, list) else [value]
            answers = [text_of(Located(row.place, {column: one}), column).strip() for one in given]
    return Example(_prompt(row, options), (), 0, answers=tuple(answers), place=row.place)


FORMATS: dict[str, Format] = {
    "classification": Format(
        "a text and its label",
        "{text}\nLabel:",
        ("label",),
        classification,
        CLASSIFICATION,
        evaluate,
        frozenset({"template", "verbalizer"}),
    ),
    "completion": Format(
        "a prompt and its completion",
        "{prompt}",
        ("completion",),
        completion,
        TEACHER_FORCING,
        evaluate_log_loss,
        frozenset({"template", "exact_match"}),
    ),
    "chat": Format(
        "messages of a chat",
        None,
        ("messages",),
        chat,
        TEACHER_FORCING,
        evaluate_log_loss,
        frozenset({"scored_turns"}),
    ),
    "choice": Format(
        "a prompt, choices, and the right one's index or itself",
        "{prompt}",
        ("choices", "label"),
        choice,
        TEACHER_FORCING,
        evaluate,
        frozenset({"template"}),
    ),
    PROMPT_ALONE: Format(
        "a prompt alone",
        "{prompt}",
        (),
        prompt_alone,
        CLASSIFICATION,
        evaluate,
        frozenset({"template"}),
    ),
}
"""Every shape by name: feeds the command line, the docs and the tests."""


def measure_of(form: Format, options: DataOptions) -> Measure:
    """How rows of a shape are evaluated."""
    return evaluate_answers if options.exact_match else form.measure


@lru_cache
def fields(template: str) -> tuple[str, ...]:
    """The columns that a template names.

    >>> fields("{text}: {{so}} {other}")
    ('text', 'other')
    """
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        template.format_map(dict.fromkeys(names, ""))
        if not names:
            raise ValueError("it names no column, so that all prompts were the same")
    except (ValueError, IndexError, KeyError, AttributeError, TypeError) as error:
        raise UsageError(
            f"the template {template!r} is not valid: {error}. {{column}} stands for a row's column; "
            "for a brace itself write two: {{ or }}."
        ) from None
    return tuple(names)


def text_of(row: Located, column: str) -> str:
    """A cell as text: numbers as people write them, 1 and 1.0 the same.

    >>> text_of(Located("a.jsonl, line 1", {"n": 1.0}), "n")
    '1'
    """
    if column not in row.columns:
        raise UsageError(f"{row.place}: there is no column {column!r}.{did_you_mean(column, row.columns)}")
    if row.columns[column] is None:
        raise UsageError(f"{row.place}: the column {column!r} is null. Leave the row out.")
    value = row.columns[column]
    if isinstance(value, str):
        _check_characters(value, row, column)
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    raise UsageError(f"{row.place}: the column {column!r} holds {_short(value)}, which is not text.")


def _prompt(row: Located, options: DataOptions) -> str:
    assert options.template is not None
    values = {name: text_of(row, column_of(name, options)) for name in fields(options.template)}
    if not any(value.strip() for value in values.values()):
        raise UsageError(f"{row.place}: the text is empty ({', '.join(map(repr, values))}). Leave the row out.")
    return options.template.format_map(values)


def _continuing(prompt: str, text: str) -> str:
    """A candidate behind a prompt: one space between them, unless the prompt ends in white space."""
    return text if prompt[-1:].isspace() else f" {text}"


def _not_empty(row: Located, column: str) -> str:
    text = text_of(row, column)
    if not text.strip():
        raise UsageError(f"{row.place}: the column {column!r} is empty. Leave the row out.")
    return text


def _check_characters(text: str, row: Located, column: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{row.place}: the column {column!r} holds half a character (a lone surrogate) at character {error.start}."
        ) from None


def _check_can_be_generated(text: str, row: Located, options: DataOptions, tokenizer: Any) -> None:
    tokens = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    one_line = options.stop_at == "newline"
    if (one_line and "\n" in text.strip()) or tokens > options.max_new_tokens:
        lines = "one generated line" if one_line else "generated text"
        instead = "Raise max_new_tokens, or stop_at: end" if options.is_generated else "Leave exact_match out"
        raise UsageError(
            f"{row.place}: {options.objective or 'exact_match'} compares {lines} of at most {options.max_new_tokens} "
            f"tokens, but this completion has {len(text.strip().splitlines())} lines and {tokens} tokens. {instead}."
        )


def _list_of(row: Located, column: str, like: str) -> list[Any]:
    """A column that holds a list, as such or (in CSV) as JSON."""
    value = row.columns.get(column)
    if value is None or isinstance(value, str):
        value = text_of(row, column)
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, list):
        raise UsageError(f"{row.place}: the column {column!r} must hold a list of {like}; got {_short(value)}.")
    return value


def _right(row: Located, options: DataOptions, choices: list[Any]) -> int:
    """The index of the right choice."""
    value, text = row.columns.get(options.label_column), text_of(row, options.label_column).strip()
    texts = [text_of(Located(row.place, {"": c}), "").strip() for c in choices]
    by_text = texts.index(text) if text in texts else None
    by_index = int(text) if text.isascii() and text.isdigit() and int(text) < len(choices) else None
    if not isinstance(value, str) and all(isinstance(c, str) for c in choices):
        by_text = None  # a number among texts counts them
    if by_text is None and by_index is None:
        raise UsageError(
            f"{row.place}: the column {options.label_column!r} is {_short(value)}, but must be the right choice itself "
            f"or its index, 0 to {len(choices) - 1}."
        )
    if by_text is not None and by_index is not None and by_text != by_index:
        raise UsageError(
            f"{row.place}: the column {options.label_column!r} is {_short(value)}, which is one choice's text and "
            "another's index. Write the index as a number in JSON, the choices as texts."
        )
    found = by_index if by_text is None else by_text
    assert found is not None
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
