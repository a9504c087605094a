"""`zotune train`: fine-tune a model by a recipe and options, or show with --dry-run what the run would do."""

from __future__ import annotations

from pathlib import Path

from zotune.cli.help import HelpPage, help_text
from zotune.cli.options import complete, is_help, parse, split_recipe
from zotune.cli.output import print_json, print_message, print_text
from zotune.errors import UsageError
from zotune.llm.config.run import TrainConfig
from zotune.llm.rows.sources import UserRows, read_checked_files

_PAGE = HelpPage(
    usage="zotune train [RECIPE] [--OPTION VALUE ...]",
    description="Fine-tune a language model with forward passes only, or with a first-order baseline. RECIPE is a YAML "
    "file, or the name of a recipe that comes with zotune; options override its values.",
    examples=(
        "zotune train sst2-smollm2",
        "zotune train --model smollm2-135m --train-file my.jsonl --tuning lora",
    ),
    flags=(
        (
            "Run",
            "--dry-run",
            "Show the rows, the tuned parameters, forward passes and memory of the run; start and write nothing.",
        ),
    ),
)
_NO_DATA = """nothing to train on: give either a task (--task sst2) or files of your own (--train-file), or a recipe.
  zotune train sst2-smollm2
  zotune train --train-file my.jsonl --text-column text --label-column label
`zotune tasks` lists the tasks, `zotune train --help` the options."""


def run(args: list[str], as_json: bool) -> int:
    """Train, or show what training would do, and return the exit code."""
    is_dry = "--dry-run" in args
    args = [a for a in args if a != "--dry-run"]
    recipe, source, args = split_recipe(args, "zotune train")
    if is_help(args):
        print_text(help_text(_PAGE, TrainConfig, complete(TrainConfig, recipe, source)))
        return 0
    if not args and not recipe:
        raise UsageError(_NO_DATA)
    # Without a recipe nobody has chosen a learning rate.
    config = parse(TrainConfig, recipe or {"learning_rate": "auto"}, source, args, "zotune train")
    # A broken row is told before torch and the model are loaded, which takes far longer than reading the rows.
    given = read_checked_files(config)
    return _dry_run(config, given, as_json) if is_dry else _train(config, given, as_json)


def _train(config: TrainConfig, given: UserRows | None, as_json: bool) -> int:
    from zotune.llm.training.train import train
    from zotune.system.malloc import tune_malloc
    from zotune.system.processes import is_first_process

    tune_malloc()
    result = train(config, given=given)
    if not is_first_process():
        return 0 if result.stopped_by is None else 128 + result.stopped_by
    _write_page(config.output_dir)
    if as_json:
        print_json(result.to_json())
    else:
        for name, evaluation in (("held-out rows before", result.dev_before), ("held-out rows", result.dev)):
            if evaluation is not None:
                print_text(f"{name}: {evaluation.named}")
        if result.test is not None and result.test is not result.dev:
            print_text(f"evaluation rows: {result.test.named}")
        print_text(
            f"{result.num_steps} steps, {result.num_forwards} forward passes, {result.seconds:.0f} s, "
            f"peak memory {result.peak_memory / 2**20:.0f} MiB\nsaved in {result.output_dir}"
        )
        if result.stopped_by is not None:
            print_text("stopped before the end and not evaluated; the same command with --resume goes on")
    return 0 if result.stopped_by is None else 128 + result.stopped_by


def _write_page(folder: Path) -> None:
    """Write the run's page beside its results. Without the extra that pages need, write none: no run fails for it."""
    try:
        from zotune.bench.report.run_html import write_run_page
    except ImportError:
        return
    try:
        write_run_page(folder)
    except (OSError, UsageError) as error:
        print_message(f"the run's page could not be written: {getattr(error, 'strerror', None) or error}")


def _dry_run(config: TrainConfig, given: UserRows | None, as_json: bool) -> int:
    from zotune.plan.dry_run import dry_run
    from zotune.system.processes import is_first_process

    forecast = dry_run(config, given)
    if is_first_process():
        print_json(forecast.to_json()) if as_json else print_text(str(forecast))
    return 2 if forecast.refused else 0
