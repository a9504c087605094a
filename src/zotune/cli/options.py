"""Arguments of the command line to one validated record: options override a recipe, which overrides the defaults."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

from zotune.cli.arguments import read_arguments
from zotune.cli.mistaken import is_data_file, meaning_of_argument, unexpected_argument
from zotune.errors import UsageError
from zotune.llm.config.aliases import is_alias, meaning_of, resolve_aliases
from zotune.llm.config.run import find_recipe, read_recipe
from zotune.llm.config.schema import validate

Config = TypeVar("Config", bound=BaseModel)

# An option of the command line and the key of a recipe that it replaces, because both say the same in another way.
_REPLACES = {
    "train_file": "task",
    "eval_file": "task",
    "num_train_epochs": "max_steps",
    "max_steps": "num_train_epochs",
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
        UsageError: an option is unknown, or a value is missing or wrong.
    """
    args, aliased = split_aliases(args, schema.model_fields)
    given = resolve_aliases(aliased, schema.model_fields, "command line")
    _check_once(aliased, args, schema, prog)
    given |= read_arguments(schema, join_values(args, "--task"), prog)
    validate(schema, given, "command line", partial=True)
    record = validate(schema, dict(recipe), source, partial=True)
    replaced = {_REPLACES[option] for option in given.keys() & _REPLACES.keys()}
    # What nobody chose stays unset.
    chosen = {name: getattr(record, name) for name in record.model_fields_set - replaced}
    return validate(schema, {**chosen, **given}, "command line")


def complete(schema: type[BaseModel], recipe: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the recipe's values, checked one by one, and the defaults of all other options.

    A default that depends on other options is None, because these may still change.
    """
    record = validate(schema, dict(recipe), source, partial=True)
    is_set = record.model_fields_set
    return {k: v if k in is_set or not _is_open(schema, k) else None for k, v in record.model_dump().items()}


def _is_open(schema: type[BaseModel], name: str) -> bool:
    """Return whether an option's default depends on other options."""
    return bool(schema.model_fields[name].default_factory_takes_validated_data)


def option_of(arg: str) -> str:
    """Return the name of the option that an argument begins, without --no; empty if it is a value.

    >>> option_of("--learning-rate=1"), option_of("--no-resume"), option_of("1e-3")
    ('learning_rate', 'resume', '')
    """
    return arg[2:].partition("=")[0].replace("-", "_").removeprefix("no_") if arg.startswith("--") else ""


def split_aliases(args: list[str], known: Collection[str]) -> tuple[list[str], dict[str, Any]]:
    """Return the arguments without the options that the table of aliases explains, and these with their values.

    >>> split_aliases(["--bf16", "--seed", "1", "--lr=1e-3"], ("seed",))
    (['--seed', '1'], {'bf16': True, 'lr': '1e-3'})
    """
    rest: list[str] = []
    aliased: dict[str, Any] = {}
    starts = [i for i, arg in enumerate(args) if arg.startswith("--")] + [len(args)]
    rest += args[: starts[0]]
    for start, stop in itertools.pairwise(starts):
        flag, _, joined = args[start].partition("=")
        given = [joined] if "=" in args[start] else args[start + 1 : stop]
        whole = flag[2:].replace("-", "_")
        for name, bare in ((whole, True), (whole.removeprefix("no_"), False)):
            value: Any = given[0] if len(given) == 1 else given or bare
            if is_alias(name, value, known):
                aliased[name] = value
                break
        else:
            rest += args[start:stop]
    return rest, aliased


def _check_once(aliased: Mapping[str, Any], args: list[str], schema: type[BaseModel], prog: str) -> None:
    """Refuse an option that is given by two names, and one that the command does not have."""
    for name, value in aliased.items():
        flag = f"--{name.replace('_', '-')}"
        for option in meaning_of(name, value, schema.model_fields).options:
            ours = f"--{option.replace('_', '-')}"
            if option not in schema.model_fields:
                raise UsageError(f"{flag} is {ours} here, an option that `{prog}` does not have.")
            if option in map(option_of, args):
                raise UsageError(f"{flag} and {ours} both set {option}; give one of them.")


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


def split_recipe(args: list[str], prog: str) -> tuple[dict[str, Any], str, list[str]]:
    """Return the values of the recipe that the first argument names, their source, and the other arguments.

    Raises:
        UsageError: there is no such recipe, or it cannot be read; the message says if it is something else.
    """
    if not args or args[0].startswith("-"):
        return {}, "command line", args
    if is_data_file(args[0]):
        raise UsageError(unexpected_argument(args[0], prog))
    try:
        path = find_recipe(args[0])
    except UsageError as error:
        raise UsageError(meaning_of_argument(args[0], prog) or str(error)) from None
    return read_recipe(path), str(path), args[1:]
