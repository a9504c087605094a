"""Directives that write the reference of the command line from the code: options cannot drift from their pages.

{zotune-options} MODULE:CLASS      the options of a pydantic schema, by group
{zotune-parser} MODULE:FUNCTION    the commands of an argparse parser
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import re
import typing
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, get_args, get_origin

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

_PLAIN = {str: "TEXT", int: "INTEGER", float: "NUMBER", Path: "PATH", bool: ""}

# The headings of records that have no word of their own, and the order of headings.
_TITLES = {
    "EvalConfig": "Evaluation",
    "PlanConfig": "Plan",
    "SelectionOptions": "Evaluation",
    "StepOptions": "Run",
    "TrainConfig": "Run",
}
_ORDER = ("Model", "Data", "Objective", "Tuning", "Method", "Run", "Evaluation", "Output")


def named(place: str) -> Any:
    """What `module:name` names."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def type_text(annotation: Any) -> str:
    """A field's type as a reader of the command line would write it.

    >>> type_text(int | None), type_text(Literal["a", "b"]), type_text(tuple[str, ...]), type_text(dict[str, str])
    ('INTEGER', 'a|b', 'TEXT …', 'TEXT TEXT …')
    """
    if get_origin(annotation) is typing.Annotated:
        return type_text(get_args(annotation)[0])
    if get_origin(annotation) in (typing.Union, UnionType):
        return "|".join(type_text(a) for a in get_args(annotation) if a is not NoneType)
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    if get_origin(annotation) is tuple:
        return f"{type_text(get_args(annotation)[0])} …"
    if get_origin(annotation) is dict:
        return f"{' '.join(map(type_text, get_args(annotation)))} …"
    return _PLAIN.get(annotation, getattr(annotation, "__name__", str(annotation)))


def escaped(text: str) -> str:
    """Text in which Markdown finds no markup but code; options become code."""
    text = re.sub(r"(?<![`\w-])(--[a-z][a-z-]*)", r"`\1`", text)
    return re.sub(r"(?<!`)([*_<>\[\]|])(?![^`]*`(?:[^`]*`[^`]*`)*[^`]*$)", r"\\\1", text)


def sentence(text: str) -> str:
    """A help text with a capital letter and a full stop.

    >>> sentence("how many steps stay"), sentence("")
    ('How many steps stay.', '')
    """
    return f"{escaped(text[:1].upper() + text[1:]).rstrip('.')}." if text else ""


def default_text(field: Any) -> str:
    """A field's default as it would be written, or nothing where its description says what happens without it."""
    if field.default_factory_takes_validated_data:  # the description says how it depends on other options
        return ""
    value = field.get_default(call_default_factory=True)
    if field.is_required():
        return "Required."
    if value is None or value in ((), {}, ""):
        return ""
    return f"Default: `{str(value).lower() if isinstance(value, bool) else value}`."


def options_by_group(schema: Any) -> dict[str, list[str]]:
    """The names of options by group, as `--help` shows them, else by the record that declares them."""
    by_help = getattr(import_module("zotune.llm.config.schema"), "options_by_group", None)
    if by_help is not None:
        with contextlib.suppress(KeyError):  # `zotune plan` has options that no run has
            return dict(by_help(schema))
    groups: dict[str, list[str]] = {}
    for name in schema.model_fields:
        owner = next(c for c in reversed(schema.__mro__) if name in inspect.get_annotations(c))
        groups.setdefault(_TITLES.get(owner.__name__, owner.__name__.removesuffix("Options")), []).append(name)
    return dict(sorted(groups.items(), key=lambda g: _ORDER.index(g[0]) if g[0] in _ORDER else len(_ORDER)))


def option_text(name: str, annotation: Any, text: str, default: str) -> str:
    """One option as a directive of Sphinx's, which gives it an anchor and an entry in the index."""
    flag, kind = f"--{name.replace('_', '-')}", type_text(annotation)
    # Choices beside a number or a text are no list to choose from.
    choices = "" if any(part in _PLAIN.values() for part in kind.split("|")) or "|" not in kind else kind
    line = f"{flag} {'CHOICE' if choices and len(choices) > 24 else kind}".strip()
    more = [f"One of {', '.join(f'`{c}`' for c in choices.split('|'))}."] if choices else []
    if annotation is bool:
        line = f"{flag}, --no-{flag[2:]}"
    facts = " ".join([*more, default]).strip()
    return f"::::{{option}} {line}\n{escaped(text)}\n\n{facts}\n::::\n"


class _Generated(SphinxDirective):
    """A directive whose text is written in Markdown by the code and then read like the rest of the page."""

    required_arguments = 1
    has_content = False

    def text(self) -> str:
        """The Markdown."""
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        """As Sphinx asks."""
        return self.parse_text_to_nodes(self.text(), allow_section_headings=True)


class Options(_Generated):
    """The options of a schema, by group; `program` is the command that has them."""

    option_spec: ClassVar[dict[str, Any]] = {"program": directives.unchanged_required}

    def text(self) -> str:
        """The Markdown."""
        schema = named(self.arguments[0])
        parts = [f"```{{program}} {self.options['program']}\n```"]
        for group, names in options_by_group(schema).items():
            parts.append(f"## {group}")
            for name in names:
                field = schema.model_fields[name]
                parts.append(option_text(name, field.annotation, field.description or "", default_text(field)))
        return "\n\n".join(parts)


class Parser(_Generated):
    """The commands of a parser, each with its arguments."""

    def text(self) -> str:
        """The Markdown."""
        parser = named(self.arguments[0])()
        (commands,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        parts = []
        for name, command in commands.choices.items():
            usage = " ".join(command.format_usage().removeprefix("usage: ").split())
            parts += [f"## {parser.prog} {name}", sentence(command.description or "")]
            parts += [f"```text\n{wrapped(usage)}\n```", f"```{{program}} {parser.prog} {name}\n```"]
            parts += [argument_text(a) for a in command._actions if a.help != argparse.SUPPRESS and a.dest != "help"]
        return "\n\n".join(parts)


def argument_text(action: argparse.Action) -> str:
    """One argument of a parser as a directive of Sphinx's."""
    value = action.metavar or action.dest.upper() if action.nargs != 0 else ""
    line = " ".join([", ".join(action.option_strings) or str(action.metavar or action.dest), str(value)])
    if not action.option_strings:
        line = f"{action.metavar or action.dest}{' …' if action.nargs in ('+', '*') else ''}"
    choices = f" One of {', '.join(f'`{c}`' for c in action.choices)}." if action.choices else ""
    return f"::::{{option}} {line.strip()}\n{sentence(action.help or '')}{choices}\n::::\n"


def wrapped(usage: str, width: int = 76) -> str:
    """A usage line in lines that a phone shows by scrolling a little."""
    lines, rest = [""], re.findall(r"\[[^\]]*\]|\S+", usage)
    for part in rest:
        if lines[-1] and len(lines[-1]) + len(part) >= width:
            lines.append("   ")
        lines[-1] = f"{lines[-1]} {part}" if lines[-1] else part
    return "\n".join(lines)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives."""
    app.add_directive("zotune-options", Options)
    app.add_directive("zotune-parser", Parser)
    return {"version": "1", "parallel_read_safe": True}
