"""Reading the arguments of a command: options and their values by name, as texts that a schema then checks.

An option takes as many values as its type: none for a switch, pairs for a mapping, some for a list, else one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from types import NoneType
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from zotune.cli.mistaken import unexpected_argument, unknown_option
from zotune.errors import UsageError
from zotune.llm.config.schema import accepted_by


def read_arguments(schema: type[BaseModel], args: Sequence[str], prog: str) -> dict[str, Any]:
    """Return the values of options by name; of an option that is given twice, the last ones.

    Args:
        schema: the options of the command.
        args: the arguments after the command.
        prog: the command, for messages.

    Raises:
        UsageError: an option is unknown, or has too few or too many values; each unknown one has a line.

    >>> from zotune.llm.config.run import TrainConfig
    >>> read_arguments(TrainConfig, ["--mu=1e-3", "--no-resume", "--verbalizer", "1", "good"], "zotune train")
    {'mu': '1e-3', 'resume': False, 'verbalizer': {'1': 'good'}}
    """
    options = list(options_of(args))
    stray = args[: next((i for i, arg in enumerate(args) if _is_flag(arg)), len(args))]
    wrong = [unexpected_argument(stray[0], prog)] if stray else []
    wrong += [unknown_option(flag, schema, prog) for flag, _ in options if _name(schema, flag) is None]
    if wrong:
        raise UsageError("\n".join(dict.fromkeys(wrong)))
    return {str(_name(schema, flag)): _value(schema, flag, values, prog) for flag, values in options}


def options_of(args: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each option as it is written, without its values, and these.

    >>> list(options_of(["--mu=1e-3", "--task", "sst2", "rte"]))
    [('--mu', ['1e-3']), ('--task', ['sst2', 'rte'])]
    """
    starts = [i for i, arg in enumerate(args) if _is_flag(arg)] + [len(args)]
    for start, stop in pairwise(starts):
        flag, equals, joined = args[start].partition("=")
        yield flag, [*([joined] if equals else []), *args[start + 1 : stop]]


def _is_flag(arg: str) -> bool:
    """Whether an argument is an option: two dashes, or one that a letter follows."""
    return arg.startswith("--") or (arg[:1] == "-" and arg[1:2].isalpha())


def _name(schema: type[BaseModel], flag: str) -> str | None:
    """Return the name of the option that a flag sets, --no-x that of a switch x; None if there is none."""
    name = flag[2:].replace("-", "_")
    if name in schema.model_fields or not flag.startswith("--"):
        return name if flag.startswith("--") else None
    switch = name.removeprefix("no_")
    field = schema.model_fields.get(switch)
    return switch if field is not None and field.annotation is bool and switch != name else None


def _value(schema: type[BaseModel], flag: str, values: list[str], prog: str) -> Any:
    name = str(_name(schema, flag))
    field = schema.model_fields[name]
    kinds = {get_origin(part) for part in (field.annotation, *get_args(field.annotation))}
    if field.annotation is bool:
        if len(values) > 1 or (values and flag[2:].replace("-", "_") != name):
            raise UsageError(f"{flag} is a switch and takes no value, got {' '.join(values)!r}.")
        return values[0] if values else flag[2:].replace("-", "_") == name
    if dict in kinds:
        if not values or len(values) % 2:
            raise UsageError(f"{flag} takes pairs of a name and a value, got {' '.join(values)!r}.")
        return dict(zip(values[::2], values[1::2], strict=True))
    if not values:
        raise UsageError(f"{flag} needs a value: {accepted_by(field)}. `{prog} --help` describes it.")
    if tuple in kinds:
        return values
    if len(values) > 1:
        is_recipe = values[-1].endswith((".yaml", ".yml"))
        remedy = f"The recipe comes first: {prog} {values[-1]}" if is_recipe else "Put a value with spaces in quotes."
        raise UsageError(f"{flag} takes one value, got {', '.join(values)}. {remedy}")
    return None if values[0] == "None" and NoneType in get_args(field.annotation) else values[0]
