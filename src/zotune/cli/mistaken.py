"""What a mistaken argument was probably meant to be: an option of another spelling, a file of rows, a model, a task."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from pydantic import BaseModel

from zotune.llm.config.aliases import alias_table
from zotune.llm.config.run import EvalConfig, TrainConfig

_COMMANDS: dict[str, type[BaseModel]] = {"zotune train": TrainConfig, "zotune eval": EvalConfig}
_DATA = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".gz")


def unknown_option(flag: str, schema: type[BaseModel], prog: str) -> str:
    """Return a sentence on an option that a command does not have: the nearest one, or the command that has it.

    >>> unknown_option("--lerning-rate", TrainConfig, "zotune train")
    '`zotune train` has no option --lerning-rate. Did you mean --learning-rate?'
    >>> unknown_option("--max_steps", EvalConfig, "zotune eval")
    '`zotune eval` has no option --max_steps; `zotune train` has it.'
    """
    name = flag.lstrip("-").replace("-", "_")
    others = [command for command, its in _COMMANDS.items() if name in its.model_fields]
    if others and name not in schema.model_fields:
        return f"`{prog}` has no option {flag}; `{others[0]}` has it."
    # Our own names come first: of two that are as near, the first one is named.
    names = (*schema.model_fields, *sorted(alias_table().names))
    near = [name] if name in schema.model_fields else get_close_matches(name, names, n=1)
    hint = f"Did you mean --{near[0].replace('_', '-')}?" if near else f"`{prog} --help` lists the options."
    return f"`{prog}` has no option {flag}. {hint}"


def unexpected_argument(argument: str, prog: str) -> str:
    """Return a sentence on an argument that is no option and no recipe: what it probably names, and where that goes.

    >>> unexpected_argument("my.jsonl", "zotune eval")
    "'my.jsonl' is a file of rows: zotune eval --eval-file my.jsonl"
    """
    meant = meaning_of_argument(argument, prog)
    return (
        meant or f"`{prog}` takes no argument {argument!r} here; each option begins with two dashes, as --model NAME."
    )


def meaning_of_argument(argument: str, prog: str) -> str | None:
    """Return what an argument that is no recipe names, and the command that takes it; None if that is unknown."""
    meant = _meant(argument, "--eval-file" if prog == "zotune eval" else "--train-file")
    if meant is None or (prog == "zotune plan" and not meant[1].startswith("--model")):
        return None
    return f"{argument!r} is {meant[0]}: {prog} {meant[1]}"


def is_data_file(argument: str) -> bool:
    """Return whether an argument in a recipe's place is a file of rows, by its name or, of JSON, by how it begins."""
    if not argument.lower().endswith(_DATA):
        return False
    return not argument.lower().endswith(".json") or _holds_rows(Path(argument))


def _holds_rows(path: Path) -> bool:
    """Return whether a JSON file holds an array, or an object on each of its first lines; a recipe is one object."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            lines = [line for line in (file.readline(1000).strip(), file.readline(1000).strip()) if line]
    except OSError:
        return True
    return lines[:1] == [] or lines[0].startswith("[") or [line[:1] for line in lines] == ["{", "{"]


def _meant(argument: str, rows: str) -> tuple[str, str] | None:
    """Return what an argument that is no recipe names, and the option that takes it."""
    if argument.lower().endswith(_DATA):
        return "a file of rows", f"{rows} {argument}"
    if argument.startswith("hub:"):
        return "a data set of the Hub", f"{rows} {argument}"
    from zotune.llm.models.builtin import BUILT_IN
    from zotune.llm.tasks import TASKS

    if argument in TASKS:
        return "a task", f"--task {argument}"
    path = Path(argument)
    is_folder = any((path / name).is_file() for name in ("config.json", "adapter_config.json"))
    if is_folder or argument in BUILT_IN or argument.startswith("random:") or argument.endswith(".gguf"):
        return "a model", f"--model {argument}"
    return ("a folder of rows", f"{rows} {argument}") if (path / "dataset_info.json").is_file() else None
