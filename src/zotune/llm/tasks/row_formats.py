"""The formats of the user's own rows: text and label, prompt and completion, chat, multiple choice, prompt alone.

Each format is a pure function from a row to an example. Error messages name the row's place.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from functools import lru_cache, partial
from typing import Any

from zotune.errors import UsageError, did_you_mean
from zotune.llm.config.data import DataOptions
from zotune.llm.data.chat_template import ChatTemplate, without_nulls
from zotune.llm.data.control_tokens import EVERYWHERE, Span
from zotune.llm.data.examples import Example
from zotune.llm.data.readers import LocatedRow
from zotune.llm.scoring.accuracy import Measure, evaluate_accuracy
from zotune.llm.scoring.generated_answers import evaluate_answers
from zotune.llm.scoring.objectives import CLASSIFICATION, TEACHER_FORCING, Objective
from zotune.llm.scoring.perplexity import evaluate_log_loss
from zotune.system.bounds import ROW_LENGTH, ROW_VALUES, WIDTH, count_values

# A row, the options and the model's tokenizer → the example.
ToExample = Callable[[LocatedRow, DataOptions, Any], Example]

# The format of rows that only a reward function can score.
PROMPT_ALONE = "prompt"


@dataclass(frozen=True)
class Format:
    """A format of rows.

    Attributes:
        description: the content of a row.
        template: the default prompt template; None if the chat template makes the prompt.
        roles: columns that a row must have beside those in the template.
        to_example: the function from a row to an example.
        uses: options that this format uses and others do not.
    """

    description: str
    template: str | None
    roles: tuple[str, ...]
    to_example: ToExample
    objective: Objective
    measure: Measure
    uses: frozenset[str]

    def columns(self, options: DataOptions) -> tuple[str, ...]:
        """Return the columns that a row must have."""
        template = None if self.template is None else options.template or self.template
        from_template = () if template is None else template_columns(template)
        return tuple(dict.fromkeys(column_of(role, options) for role in (*from_template, *self.roles)))


def column_of(role: str, options: DataOptions) -> str:
    """Return the column of a role: text, label, prompt, completion, messages or choices; other names are columns."""
    renamed = {"text": options.text_column, "label": options.label_column}
    return renamed.get(role) or options.columns.get(role, role)


def classification(row: LocatedRow, options: DataOptions, tokenizer: Any) -> Example:
    """Return the template's prompt with the labels' words as candidates; labels that share a word are one class."""
    label = cell_text(row, options.label_column)
    words = options.verbalizer
    if label not in words:
        raise UsageError(f"{row.place}: the label {label!r} is not in the verbalizer.{did_you_mean(label, words)}")
    prompt, controls = _prompt(row, options)
    distinct = list(dict.fromkeys(word.strip() for word in words.values()))
    candidates = tuple(_after_prompt(prompt, word) for word in distinct)
    return Example(prompt, candidates, distinct.index(words[label].strip()), controls=controls, place=row.place)


def completion(row: LocatedRow, options: DataOptions, tokenizer: Any) -> Example:
    """Return the template's prompt with the completion exactly as written, followed by the end-of-text token.

    A completion that ends in this token already is not given a second one.
    """
    end = tokenizer.eos_token or ""
    text = without_end(_not_empty(row, column_of("completion", options)), end)
    answers: tuple[str, ...] = ()
    if options.compares_answers:
        _check_can_be_generated(text, row, options, tokenizer)
    if options.compares_answers or options.is_function:
        answers = (text.strip(),)
    prompt, controls = _prompt(row, options)
    return Example(prompt, (text + end,), 0, answers=answers, controls=controls, place=row.place)


def without_end(text: str, end: str) -> str:
    r"""Return a text without the end-of-text token that it ends in, and white space after the token.

    >>> without_end(" pong</s>\n", "</s>"), without_end(" pong\n", "</s>"), without_end(" pong", "")
    (' pong', ' pong\n', ' pong')
    """
    bare = text.rstrip()
    return bare.removesuffix(end) if end and bare.endswith(end) else text


def chat(row: LocatedRow, options: DataOptions, tokenizer: Any) -> Example:
    """Return the messages as rendered by the model's chat template, with the assistant's turns scored."""
    column = column_of("messages", options)
    messages = without_nulls(_list_of(row, column, 'messages, [{"role": "user", "content": "…"}, …]'))
    for message in messages:
        parts = [message.get(part) for part in ("role", "content")] if isinstance(message, dict) else [None]
        if not all(isinstance(part, str) and part.strip() for part in parts):
            raise UsageError(
                f"{row.place}: each message must have a role and a content, both non-empty texts; got "
                f"{_short(message)}."
            )
        _check_characters(message["content"], row, column)
    if options.is_function and messages:
        return _chat_to_answer(row, messages, options, tokenizer)
    if not messages or messages[-1]["role"] != "assistant":
        last = repr(messages[-1]["role"]) if messages else "missing"
        raise UsageError(f"{row.place}: the last message must have the role 'assistant', but its role is {last}.")
    try:
        found = _chat_template(options, tokenizer).with_turns(messages, only_last=options.scored_turns == "last")
    except UsageError as error:
        raise UsageError(f"{row.place}: {error}") from None
    return Example(found.text, ("",), 0, spans=found.turns, controls=found.controls, place=row.place)


def _chat_template(options: DataOptions, tokenizer: Any) -> ChatTemplate:
    today = None if options.chat_date is None else date.fromisoformat(options.chat_date)
    return ChatTemplate(tokenizer, today, options.read_control_tokens)


def _chat_to_answer(row: LocatedRow, messages: list[dict[str, str]], options: DataOptions, tokenizer: Any) -> Example:
    """Return the chat up to the answer to generate; an answer in the row becomes the reference."""
    is_answered = messages[-1]["role"] == "assistant"
    try:
        found = _chat_template(options, tokenizer).opening_answer(messages[: len(messages) - is_answered])
    except UsageError as error:
        raise UsageError(f"{row.place}: {error}") from None
    answers = (messages[-1]["content"].strip(),) if is_answered else ()
    end = len(found.text)
    return Example(found.text, (), 0, answers=answers, spans=((end, end),), controls=found.controls, place=row.place)


def choice(row: LocatedRow, options: DataOptions, tokenizer: Any) -> Example:
    """Return the template's prompt with the row's choices as candidates; the label is the right one or its index."""
    column = column_of("choices", options)
    values = _list_of(row, column, 'choices, ["one", "two", …]')
    choices = [cell_text(LocatedRow(row.place, {column: c}), column).strip() for c in values]
    if len(choices) < 2 or not all(choices):
        raise UsageError(
            f"{row.place}: the column {column!r} holds {_short(values)}; give at least two choices, none of them empty."
        )
    if len(set(choices)) < len(choices):
        twice = Counter(choices).most_common(1)[0][0]
        raise UsageError(f"{row.place}: the choice {twice!r} appears twice; give each choice once.")
    prompt, controls = _prompt(row, options)
    candidates = tuple(_after_prompt(prompt, c) for c in choices)
    return Example(prompt, candidates, _right_choice(row, options, values), controls=controls, place=row.place)


def prompt_alone(row: LocatedRow, options: DataOptions, tokenizer: Any) -> Example:
    """Return the template's prompt, from which text is generated; a label or completion becomes the reference.

    Either may be a list of accepted references.
    """
    answers: list[Any] = []
    for column in (options.label_column, column_of("completion", options)):
        value = row.columns.get(column)
        if value is not None and not answers:
            references = value if isinstance(value, list) else [value]
            texts = [cell_text(LocatedRow(row.place, {column: one}), column) for one in references]
            answers = [without_end(text, tokenizer.eos_token or "").strip() for text in texts]
    prompt, controls = _prompt(row, options)
    return Example(prompt, (), 0, answers=tuple(answers), controls=controls, place=row.place)


FORMATS: dict[str, Format] = {
    "classification": Format(
        "a text and its label",
        "{text}\nLabel:",
        ("label",),
        classification,
        CLASSIFICATION,
        evaluate_accuracy,
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
        frozenset({"scored_turns", "chat_date"}),
    ),
    "choice": Format(
        "a prompt, choices, and the right one's index or itself",
        "{prompt}",
        ("choices", "label"),
        choice,
        TEACHER_FORCING,
        evaluate_accuracy,
        frozenset({"template"}),
    ),
    PROMPT_ALONE: Format(
        "a prompt alone",
        "{prompt}",
        (),
        prompt_alone,
        CLASSIFICATION,
        evaluate_accuracy,
        frozenset({"template"}),
    ),
}
"""The formats by name, for the command line, the docs and the tests."""


def measure_of(form: Format, options: DataOptions) -> Measure:
    """Return the evaluation of rows of a format."""
    if not options.exact_match:
        return form.measure
    return partial(
        evaluate_answers, max_new_tokens=options.max_new_tokens, stops_at_newline=options.stop_at == "newline"
    )


@lru_cache
def template_columns(template: str) -> tuple[str, ...]:
    """Return the columns that a template names.

    >>> template_columns("{text}: {{so}} {other}")
    ('text', 'other')
    """
    try:
        fields = [(name, form) for _, name, form, _ in string.Formatter().parse(template) if name is not None]
        for _, form in fields:
            _check_width(form or "", template)
        names = [name for name, _ in fields]
        template.format_map(dict.fromkeys(names, ""))
        if not names:
            raise ValueError("it names no column, so all prompts would be the same")
    except UsageError:
        raise
    except (ValueError, IndexError, KeyError, AttributeError, TypeError) as error:
        raise UsageError(
            f"the template {template[:1000]!r} is not valid: {error}. {{column}} stands for a row's column; "
            "write a literal brace twice: {{ or }}."
        ) from None
    return tuple(names)


def _check_width(form: str, template: str) -> None:
    """Check the format of a field before a text of its width is made.

    Raises:
        UsageError: the width is above its bound.
        ValueError: the width is itself a field, so that a row would choose it.
    """
    if "{" in form:
        raise ValueError(f"its format {form!r} names a column")
    for digits in re.findall(r"[0-9]+", form):
        WIDTH.check(int(digits[:20]), f"the template {template[:80]!r}")


def cell_text(row: LocatedRow, column: str) -> str:
    """Return a cell as text; the numbers 1 and 1.0 are both "1".

    >>> cell_text(LocatedRow("a.jsonl, line 1", {"n": 1.0}), "n")
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


def _prompt(row: LocatedRow, options: DataOptions) -> tuple[str, tuple[Span, ...]]:
    """Return the filled template, and the spans in which the texts of control tokens are read as these tokens."""
    assert options.template is not None
    values = {name: cell_text(row, column_of(name, options)) for name in template_columns(options.template)}
    if not any(value.strip() for value in values.values()):
        raise UsageError(f"{row.place}: the text is empty ({', '.join(map(repr, values))}). Leave the row out.")
    _check_length(options.template, values, row.place)
    prompt, written = filled(options.template, values)
    return prompt, EVERYWHERE if options.read_control_tokens else written


def _check_length(template: str, values: dict[str, str], place: str) -> None:
    """Check the length of a filled template before it is made; a template may repeat a column many times.

    Raises:
        UsageError: it is above the bound of a row.
    """
    fields = Counter(name for _, name, _, _ in string.Formatter().parse(template) if name is not None)
    length = len(template) + sum(count * len(values[name]) for name, count in fields.items())
    ROW_LENGTH.check(length, f"{place}: the prompt")


def filled(template: str, values: dict[str, str]) -> tuple[str, tuple[Span, ...]]:
    """Return a template with its values, and the (start, end) of the template's own text in it.

    >>> filled("[INST] {text} [/INST]", {"text": "hi"})
    ('[INST] hi [/INST]', ((0, 7), (9, 17)))
    """
    text = ""
    spans: list[Span] = []
    for literal, name, form, conversion in string.Formatter().parse(template):
        if literal:
            # A doubled brace ends a part of the template's text, but not the text.
            joined = spans.pop()[0] if spans and spans[-1][1] == len(text) else len(text)
            text += literal
            spans.append((joined, len(text)))
        if name is not None:
            field = f"{{{name}{f'!{conversion}' if conversion else ''}{f':{form}' if form else ''}}}"
            text += field.format_map(values)
    return text, tuple(spans)


def _after_prompt(prompt: str, text: str) -> str:
    """Return a candidate after a prompt, with a space before it unless the prompt ends in white space."""
    return text if prompt[-1:].isspace() else f" {text}"


def _not_empty(row: LocatedRow, column: str) -> str:
    text = cell_text(row, column)
    if not text.strip():
        raise UsageError(f"{row.place}: the column {column!r} is empty. Leave the row out.")
    return text


def _check_characters(text: str, row: LocatedRow, column: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{row.place}: the column {column!r} holds half a character (a lone surrogate) at character {error.start}."
        ) from None


def _check_can_be_generated(text: str, row: LocatedRow, options: DataOptions, tokenizer: Any) -> None:
    tokens = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    one_line = options.stop_at == "newline"
    if (one_line and "\n" in text.strip()) or tokens > options.max_new_tokens:
        output = "one generated line" if one_line else "generated text"
        raise UsageError(
            f"{row.place}: {options.objective or 'exact_match'} compares {output} of at most {options.max_new_tokens} "
            f"tokens, but this completion has {len(text.strip().splitlines())} lines and {tokens} tokens. "
            "Raise --max-new-tokens, or give --stop-at end for several lines."
        )


def _list_of(row: LocatedRow, column: str, like: str) -> list[Any]:
    """Return the list in a column, which may be JSON text (in CSV)."""
    value = row.columns.get(column)
    if value is None or isinstance(value, str):
        value = cell_text(row, column)
        ROW_VALUES.check(count_values(value), row.place)
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, list):
        raise UsageError(f"{row.place}: the column {column!r} must hold a list of {like}; got {_short(value)}.")
    return value


def _right_choice(row: LocatedRow, options: DataOptions, choices: list[Any]) -> int:
    """Return the index of the right choice."""
    value, text = row.columns.get(options.label_column), cell_text(row, options.label_column).strip()
    texts = [cell_text(LocatedRow(row.place, {"": c}), "").strip() for c in choices]
    by_text = texts.index(text) if text in texts else None
    by_index = int(text) if text.isascii() and text.isdigit() and int(text) < len(choices) else None
    if not isinstance(value, str) and all(isinstance(c, str) for c in choices):
        by_text = None  # a number is an index if all choices are texts
    if by_text is None and by_index is None:
        raise UsageError(
            f"{row.place}: the column {options.label_column!r} is {_short(value)}, but must be the right choice itself "
            f"or its index, 0 to {len(choices) - 1}."
        )
    if by_text is not None and by_index is not None and by_text != by_index:
        raise UsageError(
            f"{row.place}: the column {options.label_column!r} is {_short(value)}, which is the text of one choice and "
            "the index of another. In JSON, write the index as a number and the choices as texts."
        )
    index = by_index if by_text is None else by_text
    assert index is not None
    return index


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
