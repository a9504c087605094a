"""`zotune plan`: predict the memory of each method, and the largest batch or length that fits."""

from __future__ import annotations

from zotune.cli.help import HelpPage, help_text
from zotune.cli.options import complete, is_help, join_values, parse
from zotune.cli.output import print_json, print_text
from zotune.plan.options import PlanConfig

_PAGE = HelpPage(
    usage="zotune plan [--OPTION VALUE ...]",
    description="Predict the memory of each method from the architecture alone, before a run: does it fit, and with "
    "which batch?",
    examples=(
        "zotune plan --model smollm2-135m --memory 8GB",
        "zotune plan --model random:opt-13b --method zo_sgd fo_adam --dtype bfloat16",
    ),
    aliases={"per_device_train_batch_size": "--batch-size"},
    groups={"memory": "Run", "largest": "Run", "length": "Run", "calibrate": "Run"},
)


def run(args: list[str], as_json: bool) -> int:
    """Plan and return the exit code."""
    if is_help(args):
        print_text(help_text(_PAGE, PlanConfig, complete(PlanConfig, {}, "defaults")))
        return 0
    config = parse(PlanConfig, {}, "command line", join_values(args, "--method"), "zotune plan")
    from zotune.plan.planning import plan
    from zotune.plan.report import show

    predictions = plan(config)
    if as_json:
        print_json(predictions.to_json())
    else:
        show(predictions)
    return 0
