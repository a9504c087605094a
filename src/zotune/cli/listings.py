"""`zotune models`, `zotune tasks`, `zotune methods` and `zotune env`: tables of names, and the environment."""

from __future__ import annotations

import os

from zotune.cli.output import print_table, print_text
from zotune.errors import UsageError


def models(args: list[str], as_json: bool) -> int:
    """List the built-in models and the architectures with random weights."""
    if _shows_help("models", "List the models that have a name here.", args):
        return 0
    from zotune.llm.models.builtin import BUILT_IN
    from zotune.llm.models.random_models import ARCHITECTURES

    rows = {name: model.description for name, model in BUILT_IN.items()}
    rows |= {f"random:{name}": "architecture with random weights, for memory and speed" for name in ARCHITECTURES}
    print_table({**rows, "HUB/ID or FOLDER": "any causal or masked language model of transformers"}, as_json)
    return 0


def tasks(args: list[str], as_json: bool) -> int:
    """List the built-in tasks."""
    if _shows_help("tasks", "List the tasks that have a name here, with their licences.", args):
        return 0
    from zotune.llm.tasks import TASKS

    print_table({name: f"{task.description}; licence: {task.licence}" for name, task in TASKS.items()}, as_json)
    return 0


def methods(args: list[str], as_json: bool) -> int:
    """List the zeroth-order methods and the first-order baselines."""
    if _shows_help("methods", "List the methods: zeroth-order ones and first-order baselines.", args):
        return 0
    from zotune.methods.table import METHODS

    rows = {name: (method.__doc__ or "").splitlines()[0] for name, method in METHODS.items()}
    rows |= {
        "fo_sgd": "first-order baseline: SGD by back-propagation",
        "fo_adam": "first-order baseline: Adam by back-propagation",
    }
    print_table(rows, as_json)
    return 0


def env(args: list[str], as_json: bool) -> int:
    """Show versions, processor, GPU and the cache folder."""
    if _shows_help(
        "env", "Show versions, processor, GPU and the cache folder, for instance for a report of a bug.", args
    ):
        return 0
    from zotune.llm.output.environment import environment
    from zotune.system.cache_dir import cache_folder

    print_table({**environment(), "processors": str(os.cpu_count()), "cache": str(cache_folder())}, as_json)
    return 0


def _shows_help(verb: str, description: str, args: list[str]) -> bool:
    """Show the help of a verb without options if it is asked for; refuse any other argument."""
    if args and args[0] in ("-h", "--help"):
        print_text(f"usage: zotune {verb} [--json]\n\n{description} With --json: one JSON object.")
        return True
    if args:
        raise UsageError(f"zotune {verb} takes no option but --json, got {args[0]!r}.")
    return False
