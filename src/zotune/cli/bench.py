"""`zotune bench`: list and run the experiments of the benchmark, and report their results."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from zotune.bench.run.estimate import Estimate, estimate, hours
from zotune.bench.run.slots import slots, stopped_by_signals
from zotune.bench.spec.resolve import cells, find, names
from zotune.bench.spec.schema import CellSpec
from zotune.bench.spec.selection import chosen_cells, with_data_source
from zotune.bench.spec.vocabulary import SCALES, Alike
from zotune.cli.subcommands import Command, CommandParser, CommandResult, VerbParser
from zotune.errors import UsageError
from zotune.llm.training.progress import clock
from zotune.messages import one_line, say

RESULTS = Path("benchmarks/results/bench")

_DESCRIPTION = """Run the experiments of the benchmark (the paper's tables and figures, and the
leaderboard), and report their results beside the paper's."""
_EXAMPLES = (
    "zotune bench list",
    "zotune bench run table2 --scale cpu --jobs 2",
    "zotune bench run table2 table6 --only 'table2/zo_sgd--*' --dry-run",
    "zotune bench run my-table.toml --scale cpu",
    "zotune bench status --scale cpu",
    "zotune bench verify --scale cpu --jobs 2",
    "zotune bench report --scale cpu",
    "zotune bench report --run runs/sst2",
)


def run(args: Sequence[str], as_json: bool) -> int:
    """Run a command of the benchmark and return the exit code."""
    return _parser().run_command(args, as_json)


def _parser() -> VerbParser:
    parser = VerbParser("zotune bench", _DESCRIPTION, _EXAMPLES)

    def add(name: str, run: Command, text: str) -> CommandParser:
        command = parser.add_command(name, run, text)
        command.add_argument(
            "--results", metavar="FOLDER", type=Path, default=RESULTS, help=f"Folder of results; default: {RESULTS}."
        )
        return command

    def add_selection(command: CommandParser) -> None:
        command.add_argument("names", nargs="*", metavar="NAME", help="Experiments, or TOML files; default: all.")
        command.add_argument("--scale", choices=SCALES, default="cpu", help="Size of the cells; default: cpu.")

    add("list", _list, "List the experiments and their number of cells at each scale.")
    run_parser = add("run", _run, "Run missing cells, and run failed and stale ones again.")
    status_parser = add("status", _status, "Show which cells are done, failed, stale or missing.")
    verify_parser = add(
        "verify", _verify, "Run one job of each kind of stale results again, and accept the kinds whose result agrees."
    )
    for command in (run_parser, status_parser, verify_parser):
        add_selection(command)
        command.add_argument(
            "--only",
            nargs="+",
            default=["*"],
            metavar="PATTERN",
            help="Only cells that match, such as 'table2/zo_sgd*'.",
        )
        command.add_argument(
            "--data-source", metavar="SOURCE", help="Source of the tasks' rows: sample, hub or a folder."
        )
    report_parser = add("report", _report, "Write a page of the results beside the paper's, tables and figures.")
    add_selection(report_parser)
    report_parser.add_argument("--data-source", metavar="SOURCE", help="The --data-source of `zotune bench run`.")
    report_parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="Folder of the report; default: RESULTS/report-SCALE."
    )
    report_parser.add_argument(
        "--run", dest="folder", type=Path, metavar="FOLDER", help="Write the page of this training run instead."
    )
    run_parser.add_argument(
        "--keep-stale", action="store_true", help="Do not run results of another code or config again."
    )
    _add_comparison(verify_parser)
    for command in (run_parser, verify_parser):
        _add_execution(command)
    return parser


def _add_comparison(command: CommandParser) -> None:
    """Add the options that say which results `verify` compares."""
    command.add_argument(
        "--alike",
        choices=get_args(Alike),
        default="options",
        help="Jobs of one kind share all options but for amounts (options), or method, tuned parameters and precision "
        "(method); default: options.",
    )
    command.add_argument(
        "--against",
        type=Path,
        metavar="CHECKOUT",
        help="Compare with results of the code in this checkout of the results' commit, computed here, instead of with "
        "the results themselves.",
    )


def _add_execution(command: CommandParser) -> None:
    """Add the options that say where and how many jobs run."""
    command.add_argument(
        "--jobs",
        metavar="N",
        type=_count,
        default=1,
        help="Number of jobs that run at a time and share the processors; default: 1.",
    )
    command.add_argument(
        "--executor", choices=("local", "ray"), default="local", help="Where jobs run; default: local."
    )
    command.add_argument(
        "--gpus-per-job", metavar="N", type=float, default=0.0, help="With ray: number of GPUs of each job; default: 0."
    )
    command.add_argument("--dry-run", action="store_true", help="List the cells and estimate their time; run nothing.")


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"the number of jobs must be an integer of at least 1, not {text!r}")
    return int(text)


# Commands --------------------------------------------------------------------------------------------------


def _list(args: argparse.Namespace) -> CommandResult:
    rows: dict[str, dict[str, Any]] = {}
    for name in names():
        _, experiment = find(name)
        scales = {scale: {"cells": sum(1 for _ in cells(name, experiment, scale))} for scale in experiment.scale}
        rows[name] = {"title": experiment.title, "question": experiment.question, "scales": scales}
    lines = [f"{'':<12}" + "".join(f"{scale:>12}" for scale in SCALES)]
    for name, row in rows.items():
        counts = (row["scales"].get(scale, {}).get("cells") for scale in SCALES)
        lines.append(f"{name:<12}" + "".join(f"{'–' if n is None else f'{n} cells':>12}" for n in counts))
        lines.append(f"    {row['title']}")
    lines += ["", "zotune bench run --dry-run --scale SCALE estimates the time of the cells."]
    return rows, "\n".join(lines), 0


def _status(args: argparse.Namespace) -> CommandResult:
    from zotune.bench.results.records import read_result, result_path
    from zotune.bench.run.runner import state_of

    rows: dict[str, dict[str, Any]] = {}
    for specs in chosen_cells(args.names, args.scale, args.only, args.data_source).values():
        for spec in specs:
            state = state_of(args.results, spec)
            result = read_result(result_path(args.results, spec.scale, spec.experiment, spec.name))
            rows[spec.path] = {"state": state, "message": result.message if result else ""}
    counts: dict[str, int] = {}
    for row in rows.values():
        counts[row["state"]] = counts.get(row["state"], 0) + 1
    width = max(map(len, rows))
    lines = [
        f"{path.ljust(width)}  {row['state']:<13}  {one_line(row['message'])}".rstrip() for path, row in rows.items()
    ]
    lines.append(", ".join(f"{count} {state}" for state, count in sorted(counts.items())))
    return {"cells": rows, "counts": counts}, "\n".join(lines), 0


def _run(args: argparse.Namespace) -> CommandResult:
    selection = chosen_cells(args.names, args.scale, args.only, args.data_source)
    specs = [spec for experiment in selection.values() for spec in experiment]
    expected = _estimate(specs, args)
    if args.dry_run:
        lines = [f"{path}: {hours(seconds)}" for path, seconds in expected.seconds.items()]
        lines.append(f"{len(specs)} cells, {expected.text(args.jobs)}")
        listed = {"cells": [spec.model_dump(mode="json") for spec in specs], "seconds": expected.seconds}
        return listed, "\n".join(lines), 0
    minutes = {path: seconds / 60 for path, seconds in expected.seconds.items()}
    if args.scale != "smoke":
        say(expected.text(args.jobs))
    from zotune.bench.run.progress import Progress
    from zotune.bench.run.runner import Runner

    stop = threading.Event()
    args.results.mkdir(parents=True, exist_ok=True)
    with stopped_by_signals(stop) as signals, Progress(minutes, args.jobs) as display:
        runner = Runner(args.results, _slots(args, stop), stop, display, keeps_stale=args.keep_stale)
        states = runner.run(specs)
    bad = {path: state for path, state in states.items() if state not in ("done", "stale")}
    text = f"{len(states) - len(bad)} of {len(specs)} cells done in {args.results}"
    text += "".join(f"\n{path}: {state}" for path, state in bad.items())
    return {"states": states}, text, 128 + signals[0] if signals else int(bool(bad))


def _verify(args: argparse.Namespace) -> CommandResult:
    from zotune.bench.run.progress import Progress
    from zotune.bench.verify.checkout import commit_of
    from zotune.bench.verify.groups import grouped, stale_of
    from zotune.bench.verify.verify import verify

    selection = chosen_cells(args.names, args.scale, args.only, args.data_source)
    specs = [spec for experiment in selection.values() for spec in experiment]
    results, left = stale_of(args.results, specs, None if args.against is None else commit_of(args.against))
    unfit = len(left)
    groups = grouped(results, args.alike)
    rows = [(group, [one.spec.path for one in group.members]) for group in groups]
    if args.dry_run:
        lines = [f"{group.name}: {len(paths)} stale, by {paths[0]}" for group, paths in rows]
        seconds = sum(group.cheapest.seconds for group in groups) / args.jobs
        lines.append(f"{len(groups)} kinds of {len(results)} stale results, about {clock(seconds)}")
        listed = [{"kind": group.name, "by": paths[0], "results": paths} for group, paths in rows]
        return {"kinds": listed, "left": left}, "\n".join([*lines, *_reasons(left)]), 0
    stop = threading.Event()
    minutes = {group.cheapest.spec.path: group.cheapest.seconds / 60 for group in groups}
    with stopped_by_signals(stop) as signals, Progress(minutes, args.jobs) as display:
        verdicts = verify(args.results, groups, _slots_of_both(args, stop), stop, display)
    kinds = [verdict.to_json() for verdict in verdicts]
    left |= {path: reason for verdict in verdicts for path, reason in verdict.left.items()}
    lines = [str(verdict) for verdict in verdicts]
    accepted, stale = sum(len(verdict.accepted) for verdict in verdicts), len(results) + unfit
    text = "\n".join([*lines, *_reasons(left), f"{accepted} of {stale} stale results accepted in {args.results}"])
    return {"kinds": kinds, "left": left}, text, 128 + signals[0] if signals else int(accepted < stale)


def _reasons(left: Mapping[str, str]) -> list[str]:
    return [f"{path} is left stale: {reason}" for path, reason in left.items()]


def _report(args: argparse.Namespace) -> CommandResult:
    try:
        from zotune.bench.report.report import report
        from zotune.bench.report.run_html import write_run_page
    except ImportError as error:
        raise UsageError(f"{error}. Reports need the packages of an extra: pip install 'zotune[bench]'.") from None
    if args.folder is not None:
        page = write_run_page(args.folder)
        return {"page": str(page)}, str(page), 0
    output = args.output or args.results / f"report-{args.scale}"
    paths = report(args.results, args.scale, output, args.names, lambda spec: with_data_source(spec, args.data_source))
    text = f"{paths[0]}, and {len(paths) - 1} files of tables and figures beside it"
    return {"page": str(paths[0]), "files": list(map(str, paths))}, text, 0


def _estimate(specs: Sequence[CellSpec], args: argparse.Namespace) -> Estimate:
    """Return how long the cells take; tiny models take little time, whatever they are."""
    if args.scale == "smoke":
        return Estimate({spec.path: 30.0 for spec in specs}, len(specs), 0)
    return estimate(specs, args.results)


def _slots(args: argparse.Namespace, stop: threading.Event) -> list[Any]:
    """Return one executor for each of the jobs that run at the same time."""
    return slots(args.jobs, args.executor, args.gpus_per_job, stop)


def _slots_of_both(args: argparse.Namespace, stop: threading.Event) -> list[tuple[Any, Any]]:
    """Return, for each job at a time, an executor of today's code and, with `--against`, one of that checkout's."""
    from zotune.bench.verify.checkout import with_checkout

    if args.against is not None and args.executor != "local":
        raise UsageError("--against runs on this machine only; leave --executor out.")
    return with_checkout(_slots(args, stop), args.against)
