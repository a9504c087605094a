"""`zotune tune`: train at several values of some options, compare on held-out rows, and write the best as a recipe."""

from __future__ import annotations

from typing import Any, get_origin

from zotune.cli.help import HelpPage, help_text
from zotune.cli.options import complete, is_help, option_of, parse, split_recipe
from zotune.cli.output import print_json, print_message, print_text
from zotune.errors import UsageError
from zotune.llm.config.aliases import alias_table
from zotune.llm.config.run import TrainConfig
from zotune.llm.config.schema import validate
from zotune.llm.rows.sources import read_checked_files

_PAGE = HelpPage(
    usage="zotune tune [RECIPE] --OPTION VALUE VALUE ... [--OPTION VALUE ...]",
    description="Train at each combination of the values of some options, and compare the runs on held-out rows, never "
    "on evaluation rows. Each run is in a folder of its own in output_dir; the same command again goes on where it "
    "was stopped. The best one is written as a recipe.",
    examples=(
        "zotune tune sst2-smollm2 --learning-rate 3e-3 1e-2 3e-2 --max-steps 300",
        "zotune tune --train-file my.jsonl --tuning lora --learning-rate 1e-4 1e-1 --mu 1e-3 1e-1 --num-trials 20",
    ),
    flags=(
        ("Run", "--num-trials INT", "Let Optuna choose so many points between the smallest and the largest values."),
    ),
)
# Options of the search itself, which have one value.
_FIXED = (
    *("output_dir", "overwrite_output_dir", "resume", "num_eval", "num_more_eval", "eval_file", "seed", "num_dev"),
    "data_seed",
)


def run(args: list[str], as_json: bool) -> int:
    """Search and return the exit code."""
    recipe, source, args = split_recipe(args, "zotune tune")
    if is_help(args):
        print_text(help_text(_PAGE, TrainConfig, complete(TrainConfig, recipe, source)))
        return 0
    args, num_trials = _num_trials(args)
    args, axes = split_axes(args)
    if not axes:
        raise UsageError(
            "nothing to compare: give an option several values, as zotune tune RECIPE --learning-rate 1e-4 1e-3 1e-2."
        )
    first = [f"--{name.replace('_', '-')}={values[0]}" for name, values in axes.items()]
    config = parse(TrainConfig, recipe, source, [*args, *first], "zotune tune")
    typed = {name: _typed(config, name, values) for name, values in axes.items()}
    read_checked_files(config)  # before torch and a model are loaded
    from zotune.llm.tune.sweep import SearchStoppedError, sweep, table
    from zotune.system.malloc import tune_malloc

    tune_malloc()
    try:
        outcome = sweep(config, typed, num_trials)
    except SearchStoppedError as stopped:
        print_message(str(stopped))
        return 128 + stopped.signal
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the search was interrupted; the same command goes on with it") from None
    if as_json:
        print_json(outcome.to_json())
    else:
        print_text(f"{table(outcome)}\nbest recipe: {outcome.recipe}\n  zotune train {outcome.recipe}")
    return 0


def split_axes(args: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Return the arguments without the options that have several values, and these.

    Raises:
        UsageError: an option that cannot be compared has several values.

    >>> split_axes(["--seed", "1", "--lr", "1e-3", "1e-2", "--lora-target-modules", "q_proj", "v_proj"])
    (['--seed', '1', '--lora-target-modules', 'q_proj', 'v_proj'], {'learning_rate': ['1e-3', '1e-2']})
    """
    rest: list[str] = []
    axes: dict[str, list[str]] = {}
    i = 0
    while i < len(args):
        stop = next((j for j in range(i + 1, len(args)) if args[j].startswith("--")), len(args))
        given, name = args[i + 1 : stop], option_of(args[i])
        name = alias_table().same.get(name, name)
        field = TrainConfig.model_fields.get(name)
        if len(given) > 1 and field is not None and get_origin(field.annotation) not in (tuple, dict):
            if name in _FIXED:
                raise UsageError(f"--{name.replace('_', '-')} has one value in all runs of a search, got {given}.")
            axes[name] = list(dict.fromkeys(given))
        else:
            rest += args[i:stop]
        i = stop
    return rest, axes


def _num_trials(args: list[str]) -> tuple[list[str], int | None]:
    """Return the arguments without --num-trials, and its number."""
    for i, arg in enumerate(args):
        if option_of(arg) == "num_trials":
            joined = "=" in arg
            value = arg.partition("=")[2] if joined else "".join(args[i + 1 : i + 2])
            if not value.isdecimal() or int(value) < 1:
                raise UsageError(f"--num-trials is a number of trials of at least 1, got {value!r}.")
            return [*args[:i], *args[i + (1 if joined else 2) :]], int(value)
    return args, None


def _typed(config: TrainConfig, name: str, values: list[str]) -> list[Any]:
    """Return the values of an option as the schema reads them."""
    plain = config.model_dump()
    return [getattr(validate(TrainConfig, {**plain, name: value}, "command line"), name) for value in values]
