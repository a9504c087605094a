"""Arguments of the command line to one validated record: options override a recipe, which overrides the defaults."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel

from zotune.llm.config.schema import validate

Config = TypeVar("Config", bound=BaseModel)

# An option of the command line and the key of a recipe that it replaces, because both say the same in another way.
_REPLACES = {
    "--train-file": "task",
    "--eval-file": "task",
    "--num-train-epochs": "max_steps",
    "--max-steps": "num_train_epochs",
}


def parse(schema: type[Config], recipe: Mapping[str, Any], source: str, args: list[str], prog: str) -> Config:
    """Read options into a validated record of `schema`.

    Args:
        schema: the options, with their types, defaults and descriptions.
        recipe: values by name, which the options override.
        source: the origin of the recipe, for messages.
        args: the arguments after the verb (and after the recipe's name).
        prog: the command, for messages.

    Raises:
        UsageError: a value is wrong.
        SystemExit: an option is unknown or has no value; the message is printed, and the exit code is 2.
    """
    import tyro

    values = complete(schema, recipe, source)
    for option, replaced in _REPLACES.items():
        if replaced in values and any(a.replace("_", "-").split("=")[0] == option for a in args):
            values[replaced] = schema.model_fields[replaced].default
    args = join_values([a.replace("--zo-eps", "--mu").replace("--zo_eps", "--mu") for a in args], "--task")
    record: Any = tyro.cli(unchecked_record(schema, values), args=args, prog=prog, description=schema.__doc__)
    return validate(schema, dataclasses.asdict(record), "command line")


def complete(schema: type[BaseModel], recipe: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the recipe's values, checked one by one, and the defaults of all other options."""
    return validate(schema, dict(recipe), source, partial=True).model_dump()


def unchecked_record(schema: type[BaseModel], values: Mapping[str, Any]) -> Any:
    """Return a dataclass with the options of a schema and these defaults, from which tyro makes the flags.

    The dataclass has no rules of its own: the schema words every complaint about a value.
    """
    import tyro

    fields = [
        (
            name,
            Annotated[info.annotation, tyro.conf.arg(help=info.description)],
            dataclasses.field(default_factory=functools.partial(values.get, name)),
        )
        for name, info in schema.model_fields.items()
    ]
    return dataclasses.make_dataclass(schema.__name__, fields, frozen=True)


def join_values(args: list[str], option: str) -> list[str]:
    """Join the values after an option by commas, so that several values become one.

    >>> join_values(["--task", "sst2", "rte", "--seed", "1"], "--task")
    ['--task', 'sst2,rte', '--seed', '1']
    """
    if option not in args:
        return args
    start = args.index(option) + 1
    stop = next((i for i in range(start, len(args)) if args[i].startswith("-")), len(args))
    return [*args[:start], ",".join(args[start:stop]), *args[stop:]] if stop > start else args


def is_help(args: list[str]) -> bool:
    """Return whether the arguments ask for help."""
    return "-h" in args or "--help" in args
