"""Prompt templates: `{column}` stands for a row's column."""

from __future__ import annotations

import re
import string
from collections import Counter
from functools import lru_cache

from zotune.errors import UsageError
from zotune.llm.config.data import DataOptions
from zotune.llm.data.control_tokens import EVERYWHERE, Span
from zotune.llm.data.readers.located import LocatedRow
from zotune.llm.rows.cells import cell_text, column_of
from zotune.llm.rows.records import Prompt
from zotune.system.bounds import ROW_LENGTH, WIDTH

# The template of a prompt in a column of its own.
PROMPT_COLUMN = "{prompt}"


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


def prompt_of(row: LocatedRow, options: DataOptions) -> Prompt:
    """Return the template of the options, or else the prompt column, filled with a row.

    Raises:
        UsageError: a column is missing, all of them are empty, or the prompt would be too long.
    """
    template = PROMPT_COLUMN if options.template is None else options.template
    values = {name: cell_text(row, column_of(name, options)) for name in template_columns(template)}
    if not any(value.strip() for value in values.values()):
        raise UsageError(f"{row.place}: the text is empty ({', '.join(map(repr, values))}). Leave the row out.")
    _check_length(template, values, row.place)
    return fill(template, values, options)


def fill(template: str, values: dict[str, str], options: DataOptions) -> Prompt:
    """Return a template with its values; control tokens are read in its own text alone, or everywhere if so asked."""
    text, written = filled(template, values)
    return Prompt(text, EVERYWHERE if options.read_control_tokens else written)


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
