"""The text of `--help` for a verb whose options are a schema: usage, examples, and the options in groups."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from zotune.llm.config.schema import GROUPS, group_of, options_by_group

_COLUMN = 28  # where descriptions begin
_MAX_CHOICES = 48  # characters of the choices beside a flag; more of them stand in its description
_METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH", dict: "KEY VALUE ...", tuple: "TEXT ..."}
_JSON = ("Output", "--json", "Print one JSON object on stdout in place of text.")


@dataclass(frozen=True)
class HelpPage:
    """The parts of a verb's help that its schema does not hold."""

    usage: str
    description: str
    examples: Sequence[str]
    # Flags beside the schema's: group, flag and description.
    flags: Sequence[tuple[str, str, str]] = ()
    # Second spellings of the schema's options.
    aliases: Mapping[str, str] = field(default_factory=dict)
    # Groups of the schema's options that the table of groups does not know.
    groups: Mapping[str, str] = field(default_factory=dict)


def help_text(page: HelpPage, schema: type[BaseModel], values: Mapping[str, Any], width: int | None = None) -> str:
    """Return the help of a verb.

    Args:
        page: usage, description and examples.
        schema: the options, with their types and descriptions.
        values: the defaults of the options, those of a recipe included.
        width: columns of the text; by default those of the terminal, within 60 and 120.
    """
    columns = width or min(max(shutil.get_terminal_size().columns, 60), 120)
    lines = [f"usage: {page.usage}", "", *textwrap.wrap(page.description, columns), "", "Examples:"]
    lines += [f"  {example}" for example in page.examples]
    grouped = _grouped(page, schema)
    for group in GROUPS:
        names = grouped.get(group, [])
        entries = [(_spelling(page, schema, name), _description(schema, name, values.get(name))) for name in names]
        entries += [(flag, text) for of_group, flag, text in (*page.flags, _JSON) if of_group == group]
        if entries:
            lines += ["", f"{group}:"]
            lines += [line for entry in entries for line in _entry(*entry, columns)]
    return "\n".join(lines)


def _grouped(page: HelpPage, schema: type[BaseModel]) -> dict[str, list[str]]:
    """Return the schema's options by group; those that `page.groups` names come first in theirs."""
    if not page.groups:
        return options_by_group(schema)
    names = [*page.groups, *(name for name in schema.model_fields if name not in page.groups)]
    group = {name: page.groups.get(name) or group_of(schema, name) for name in names}
    return {of_group: [name for name in names if group[name] == of_group] for of_group in GROUPS}


def _entry(flag: str, text: str, columns: int) -> list[str]:
    """Return the lines of an option: flag and description side by side, or on two lines if the flag is long."""
    lines = textwrap.wrap(text, columns - _COLUMN, break_long_words=False) or [""]
    indent = " " * _COLUMN
    if len(flag) + 4 > _COLUMN:
        return [f"  {flag}", *(indent + line for line in lines)]
    return [f"  {flag}".ljust(_COLUMN) + lines[0], *(indent + line for line in lines[1:])]


def _spelling(page: HelpPage, schema: type[BaseModel], name: str) -> str:
    annotation = schema.model_fields[name].annotation
    flag = f"--{name.replace('_', '-')}"
    if annotation is bool:
        default_on = schema.model_fields[name].default is True
        return f"{flag}, --no-{flag[2:]}" if default_on else flag
    alias = page.aliases.get(name)
    return f"{flag}{f', {alias}' if alias else ''} {_metavar(annotation)}"


def _metavar(annotation: Any) -> str:
    """Return the placeholder of an option's value; of several types that it may have, all.

    >>> _metavar(int | None), _metavar(Literal["a", "b"]), _metavar(float | Literal["auto"]), _metavar(dict[str, str])
    ('INT', '{a,b}', 'FLOAT|auto', 'KEY VALUE ...')
    """
    origin, parts = get_origin(annotation), [part for part in get_args(annotation) if part is not NoneType]
    if origin is Annotated:
        return _metavar(parts[0])
    if origin in (Union, UnionType) and len(parts) > 1:
        return "|".join(dict.fromkeys(_metavar(part).strip("{}") for part in parts))
    if choices := _choices(annotation):
        text = "{" + ",".join(choices) + "}"
        return text if len(text) <= _MAX_CHOICES else "NAME"
    if origin in (dict, tuple) or not parts:
        return _METAVARS[origin or annotation]
    return _metavar(parts[0])


def _choices(annotation: Any) -> list[str]:
    """Return the values that an option takes, if they are a few names."""
    if get_origin(annotation) is Literal:
        return list(map(str, get_args(annotation)))
    if len([part for part in get_args(annotation) if part is not NoneType]) > 1:
        return []
    literals = [part for part in get_args(annotation) if get_origin(part) is Literal]
    return [choice for part in literals for choice in _choices(part)]


def _description(schema: type[BaseModel], name: str, default: Any) -> str:
    """Return an option's description with its choices and its default, unless it names the default itself."""
    info = schema.model_fields[name]
    text = info.description or ""
    choices = _choices(info.annotation)
    if choices and _metavar(info.annotation) == "NAME":
        text += f" One of {', '.join(choices)}."
    names_default = default == info.default and "default:" in text.lower()
    if default is None or default is False or default in ("", "{}", (), {}) or names_default:
        return text
    return f"{text} (default: {'on' if default is True else _value(default)})"


def _value(default: Any) -> str:
    if isinstance(default, dict):
        return " ".join(f"{key} {value}" for key, value in default.items())
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
