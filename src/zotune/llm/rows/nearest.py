"""The nearest shape for columns that fit none, and the options with which they fit."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from zotune.errors import did_you_mean
from zotune.llm.config.data import DataOptions
from zotune.llm.rows.cells import column_of
from zotune.llm.rows.shape import Shape
from zotune.llm.rows.shapes import PLAIN_TEXT, PROMPT_ALONE, SHAPES

# Names that files give to the columns of a role.
_KNOWN_NAMES = {
    "text": ("sentence", "review", "content", "tweet", "comment", "body"),
    "label": ("labels", "class", "category", "sentiment", "stars", "rating", "score"),
    "prompt": ("question", "query", "source", "problem", "article", "document", "input"),
    "completion": ("answer", "response", "chosen", "target", "summary", "highlights", "solution", "output"),
    "choices": ("options", "candidates", "endings"),
    "messages": ("conversation", "dialog", "dialogue", "chat", "turns"),
    "instruction": ("task",),
    "input": ("context",),
    "output": ("response", "answer", "completion"),
    "conversations": (),
}
_OPTIONS = {"text": "--text-column", "label": "--label-column"}
_SHOWN = 20


def nearest_shape(present: Sequence[str], options: DataOptions) -> str:
    """Return which columns there are, the nearest shape, and the options with which they have it.

    >>> print(nearest_shape(["question", "answer"], DataOptions(eval_file="a.csv")).split(". ")[2])
    Give --columns prompt question completion answer
    """
    forms = {name: shape for name, shape in SHAPES.items() if name not in (PROMPT_ALONE, PLAIN_TEXT)}
    found = {name: _names(shape, present, options) for name, shape in forms.items()}
    nearest = min(forms, key=lambda name: _distance(found[name], present))
    lacking = next(column for column in forms[nearest].columns(options) if column not in present)
    shapes = "; ".join(f"{name} ({', '.join(shape.columns(options))})" for name, shape in forms.items())
    plain = ""
    if options.text_column in present:
        plain = f" To learn the column {options.text_column!r} as plain text, give --data-format {PLAIN_TEXT}."
    return (
        f"there is no column {lacking!r}.{_hint(lacking, present)} The columns {_listed(present)} fit no shape "
        f"of rows; the nearest one is {nearest}, {forms[nearest].description}."
        f"{_advice(forms[nearest], found[nearest], present, options)}{plain} The shapes are: {shapes}."
    )


def _hint(name: str, present: Sequence[str]) -> str:
    """Return the column that is spelt nearly so, if there is one; all columns are listed anyway."""
    hint = did_you_mean(name, present)
    return hint if hint.startswith(" Did") else ""


def is_named_like(role: str, column: str) -> bool:
    """Return whether a column may be one of a role under another name.

    >>> is_named_like("label", "Labels"), is_named_like("label", "sentiment"), is_named_like("label", "url")
    (True, True, False)
    """
    name = column.lower()
    return name in _KNOWN_NAMES.get(role, ()) or bool(difflib.get_close_matches(name, [role], n=1, cutoff=0.8))


def _names(shape: Shape, present: Sequence[str], options: DataOptions) -> dict[str, str | None]:
    """Return the column that each role of a shape may have, by name or by another usual name; None if there is none."""
    roles = shape.roles_needed(options)
    return {role: _name(role, present, options) for role in roles}


def _name(role: str, present: Sequence[str], options: DataOptions) -> str | None:
    named = column_of(role, options)
    return next((name for name in (named, *_KNOWN_NAMES.get(role, ())) if name in present), None)


def _distance(names: Mapping[str, str | None], present: Sequence[str]) -> tuple[float, int]:
    """Return how far columns are from a shape: the share of roles without a column, and the roles of another name."""
    lacking = sum(name is None for name in names.values())
    return lacking / len(names), sum(name not in (None, role) for role, name in names.items())


def _advice(shape: Shape, names: Mapping[str, str | None], present: Sequence[str], options: DataOptions) -> str:
    if None in names.values():
        return " For columns of other names give --text-column, --label-column or --columns prompt NAME."
    more = {role: _name(role, present, options) for role in shape.optional if role in _KNOWN_NAMES}
    renamed = {r: n for r, n in {**names, **more}.items() if n is not None and n != column_of(r, options)}
    columns = " ".join(f"{role} {name}" for role, name in renamed.items() if role not in _OPTIONS)
    given = [f"{_OPTIONS[role]} {name}" for role, name in renamed.items() if role in _OPTIONS]
    return f" Give {' '.join([*given, *([f'--columns {columns}'] if columns else [])])}."


def _listed(names: Sequence[str]) -> str:
    return ", ".join([*map(repr, names[:_SHOWN]), *(["…"] if len(names) > _SHOWN else [])])
