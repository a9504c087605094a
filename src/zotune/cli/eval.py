"""`zotune eval`: measure a model on tasks or on the user's own rows."""

from __future__ import annotations

from contextlib import nullcontext

from zotune.cli.help import HelpPage, help_text
from zotune.cli.options import complete, is_help, parse
from zotune.cli.output import print_json, print_text
from zotune.errors import UsageError
from zotune.llm.checkpoints.adapter_source import folder_of_run
from zotune.llm.config.run import EvalConfig, inherited_options
from zotune.llm.rows.sources import read_checked_files

_PAGE = HelpPage(
    usage="zotune eval [--OPTION VALUE ...]",
    description="Measure a model's accuracy, F1 of generated answers or loss, with the 95 % interval. A model that was "
    "tuned on your own rows is evaluated with the columns, template and labels of its training.",
    examples=(
        "zotune eval --model smollm2-135m --task sst2",
        "zotune eval --model runs/latest --eval-file my.jsonl",
    ),
)
_NO_DATA = """nothing to evaluate on: give either a task or files of your own.
  zotune eval --model runs/latest --task sst2
  zotune eval --model runs/latest --eval-file my.jsonl
`zotune tasks` lists the tasks, `zotune eval --help` the options."""


def run(args: list[str], as_json: bool) -> int:
    """Evaluate and return the exit code."""
    if is_help(args):
        print_text(help_text(_PAGE, EvalConfig, complete(EvalConfig, {}, "defaults")))
        return 0
    if not args:
        raise UsageError(_NO_DATA)
    config = parse(EvalConfig, {}, "command line", args, "zotune eval")
    # The model's training run says how its rows are read; options override that.
    inherited, source = inherited_options(config, folder_of_run(config.model, config.model_revision))
    if inherited:
        config = parse(EvalConfig, inherited, source, args, "zotune eval")
    # A broken row is told before torch and the model are loaded, which takes far longer than reading the rows.
    read_checked_files(config)
    from zotune.llm.ledger.voting import evaluate
    from zotune.llm.output.results_folder import results_folder, write_results
    from zotune.system.malloc import OWN_PAGES_OF_PASSES, tune_malloc
    from zotune.system.processes import is_first_process

    tune_malloc(OWN_PAGES_OF_PASSES)
    # The folder is checked before the evaluation, and nobody else writes there during it.
    target = config.output_dir if is_first_process() else None
    with nullcontext() if target is None else results_folder(target) as folder:
        evaluations, results = evaluate(config)
        if folder is not None:
            write_results(folder, results)
    if not is_first_process():
        return 0
    if as_json:
        print_json(results)
    else:
        for task, evaluation in evaluations.items():
            print_text("\n".join([f"{task}:"] * (len(evaluations) > 1) + evaluation.lines()))
    return 0
