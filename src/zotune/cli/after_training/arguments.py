"""The arguments of commands on a model's folder: its name first, then options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from pydantic import BaseModel

from zotune.cli.options import option_of, parse
from zotune.errors import UsageError

Config = TypeVar("Config", bound=BaseModel)

_NAMES = ("model", "model_name_or_path", "adapter_name_or_path", "lora_model_dir")


def parse_folder(schema: type[Config], args: Sequence[str], prog: str, several: str = "") -> Config:
    """Return the options of a command whose first argument is the folder of a run.

    Args:
        schema: the options; `model` is the folder.
        args: the arguments.
        prog: the command, for messages.
        several: what to say if several folders are given.

    Raises:
        UsageError: there is no folder, there are several, or an option is unknown or wrong.
    """
    folders = []
    rest = list(args)
    while rest and not rest[0].startswith("-"):
        folders.append(rest.pop(0))
    named = [arg for arg in rest if option_of(arg) in _NAMES]
    if not folders and not named:
        raise UsageError(f"the folder of a run is missing: {prog} runs/latest. `{prog} --help` shows the options.")
    if len(folders) + len(named) > 1:
        raise UsageError(f"`{prog}` takes one folder, got {', '.join([*folders, *named])}.{several}")
    recipe = {"model": folders[0]} if folders else {}
    return parse(schema, recipe, "command line", rest, prog)
