"""`zotune bench …`: list, run and look at the experiments of the benchmark."""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import FrameType
from typing import Any, get_args

from zotune.bench.spec.resolve import cells, find, names
from zotune.bench.spec.schema import CellSpec
from zotune.bench.spec.vocabulary import SCALES, Alike, Scale
from zotune.errors import UsageError
from zotune.llm.training.progress import clock
from zotune.llm.training.signals import signal_handler
from zotune.messages import say

RESULTS = Path("benchmarks/results/bench")

_EXAMPLES = """
examples:
  zotune bench list
  zotune bench run table2 --scale cpu --jobs 2
  zotune bench run table2 table6 --only 'table2/zo_sgd--*' --dry-run
  zotune bench run my-table.toml --scale cpu
  zotune bench status --scale cpu
  zotune bench verify --scale cpu --jobs 2
  zotune bench report --scale cpu
  zotune bench report --run runs/sst2
"""

# What a command found, as JSON and as text, and the exit code.
Answer = tuple[Any, str, int]


def run(args: Sequence[str], as_json: bool) -> int:
    """Run a command of the benchmark; the exit code."""
    chosen = _parser().parse_args(args)
    found, text, code = chosen.run(chosen)
    print(json.dumps(found, indent=2) if as_json else text)  # noqa: T201
    return int(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zotune bench", description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], Answer], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        command.add_argument("--results", type=Path, default=RESULTS, help=f"folder of results; default: {RESULTS}")
        return command

    add("list", _list, "the experiments, their cells at each scale, and how long these take")
    for command in (
        add("run", _run, "run what is not done; what failed or is stale is run again"),
        add("status", _status, "which cells are done, failed, stale or missing"),
        add("verify", _verify, "run one job of each kind of stale results again; accept those of a kind that agrees"),
    ):
        command.add_argument("names", nargs="*", metavar="NAME", help="experiments, or TOML files; default: all")
        command.add_argument("--scale", choices=SCALES, default="cpu", help="default: cpu")
        command.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="cells, as 'table2/zo_sgd*'")
        command.add_argument("--data-source", help="where tasks' rows come from: sample, hub or a folder")
    reporting = add("report", _report, "a page of the results beside the paper's; tables and figures for papers")
    reporting.add_argument("names", nargs="*", metavar="NAME", help="experiments, or TOML files; default: all")
    reporting.add_argument("--scale", choices=SCALES, default="cpu", help="default: cpu")
    reporting.add_argument("--data-source", help="as `run` was told")
    reporting.add_argument("--output", type=Path, metavar="FOLDER", help="default: RESULTS/report-SCALE")
    reporting.add_argument("--run", dest="folder", type=Path, metavar="FOLDER", help="the page of one run instead")
    running = commands.choices["run"]
    running.add_argument("--keep-stale", action="store_true", help="leave results of other code or config as they are")
    commands.choices["verify"].add_argument(
        "--alike",
        choices=get_args(Alike),
        default="options",
        help="what makes a kind: all options but for amounts (default), or the method and what is tuned alone",
    )
    commands.choices["verify"].add_argument(
        "--against",
        type=Path,
        metavar="CHECKOUT",
        help="compare with what the code in this checkout of the results' commit finds here, not with the results",
    )
    for command in (running, commands.choices["verify"]):
        command.add_argument("--jobs", type=_count, default=1, help="cells at a time; processors are shared among them")
        command.add_argument("--executor", choices=("local", "ray"), default="local", help="where jobs run")
        command.add_argument("--gpus-per-job", type=float, default=0.0, help="with ray: GPUs that each job takes")
        command.add_argument("--dry-run", action="store_true", help="list the cells, run nothing")
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it is how many, at least 1, not {text!r}")
    return int(text)


# Which cells -----------------------------------------------------------------------------------------------


def chosen_cells(
    given: Sequence[str], scale: Scale, patterns: Sequence[str] = ("*",), data_source: str | None = None
) -> dict[str, list[CellSpec]]:
    """The cells that names and patterns choose, by experiment.

    A pattern is one of `EXPERIMENT/CELL`, or of an experiment's name alone.

    Raises:
        UsageError: a name is unknown, or nothing is chosen.
    """
    found: dict[str, list[CellSpec]] = {}
    for name in given or names():
        stem, experiment = find(name)
        if given or scale in experiment.scale:
            every = (_reading(c, data_source) for c in cells(stem, experiment, scale))
            found[stem] = [c for c in every if any(_chosen(c, p) for p in patterns)]
    if not any(found.values()):
        wanted = " or ".join(patterns)
        raise UsageError(f"no cell of {', '.join(found)} is called {wanted}; `zotune bench run --dry-run` lists them.")
    return found


def _chosen(spec: CellSpec, pattern: str) -> bool:
    return fnmatchcase(spec.path if "/" in pattern else spec.experiment, pattern)


def _reading(spec: CellSpec, data_source: str | None) -> CellSpec:
    """The cell with its task's rows from elsewhere."""
    if data_source is None or "task" not in spec.options:
        return spec
    return spec.model_copy(update={"options": {**spec.options, "data_source": data_source}})


# Commands --------------------------------------------------------------------------------------------------


def _list(args: argparse.Namespace) -> Answer:
    rows: dict[str, dict[str, Any]] = {}
    for name in names():
        _, experiment = find(name)
        scales = {
            scale: {
                "cells": sum(1 for _ in cells(name, experiment, scale)),
                "minutes": experiment.scale[scale].minutes,
            }
            for scale in experiment.scale
        }
        rows[name] = {"title": experiment.title, "question": experiment.question, "scales": scales}
    lines = [f"{'':<12}" + "".join(f"{scale:>18}" for scale in SCALES)]
    for name, row in rows.items():
        lines.append(f"{name:<12}" + "".join(f"{_of_scale(row['scales'].get(scale)):>18}" for scale in SCALES))
        lines.append(f"    {row['title']}")
    totals = {s: sum(row["scales"].get(s, {}).get("minutes") or 0 for row in rows.values()) for s in SCALES}
    lines += ["", f"expected for all of scale cpu, one process at a time on one core: {clock(60 * totals['cpu'])}"]
    return rows, "\n".join(lines), 0


def _of_scale(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    minutes = "" if row["minutes"] is None else f", {row['minutes']:g} min"
    return f"{row['cells']} cells{minutes}"


def _status(args: argparse.Namespace) -> Answer:
    from zotune.bench.results.records import read_result, result_path
    from zotune.bench.run.runner import state_of

    rows: dict[str, dict[str, Any]] = {}
    for specs in chosen_cells(args.names, args.scale, args.only, args.data_source).values():
        for spec in specs:
            state = state_of(args.results, spec)
            found = read_result(result_path(args.results, spec.scale, spec.experiment, spec.name))
            rows[spec.path] = {"state": state, "message": found.message if found else ""}
    counts: dict[str, int] = {}
    for row in rows.values():
        counts[row["state"]] = counts.get(row["state"], 0) + 1
    width = max(map(len, rows))
    lines = [f"{path.ljust(width)}  {row['state']:<13}  {row['message']}".rstrip() for path, row in rows.items()]
    lines.append(", ".join(f"{count} {state}" for state, count in sorted(counts.items())))
    return {"cells": rows, "counts": counts}, "\n".join(lines), 0


def _run(args: argparse.Namespace) -> Answer:
    chosen = chosen_cells(args.names, args.scale, args.only, args.data_source)
    specs = [spec for some in chosen.values() for spec in some]
    minutes = _minutes_a_cell(args, chosen)
    if args.dry_run:
        lines = [*minutes, f"{len(specs)} cells, some {clock(60 * sum(minutes.values()) / args.jobs)}"]
        return {"cells": [spec.model_dump(mode="json") for spec in specs]}, "\n".join(lines), 0
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


def _verify(args: argparse.Namespace) -> Answer:
    from zotune.bench.run.progress import Progress
    from zotune.bench.run.verify import grouped, stale_of, verify

    specs = [s for some in chosen_cells(args.names, args.scale, args.only, args.data_source).values() for s in some]
    found, left = stale_of(args.results, specs, None if args.against is None else _commit_of(args.against))
    unfit = len(left)
    groups = grouped(found, args.alike)
    rows = [(group, [one.spec.path for one in group.members]) for group in groups]
    if args.dry_run:
        lines = [f"{group.name}: {len(paths)} stale, by {paths[0]}" for group, paths in rows]
        seconds = sum(group.cheapest.seconds for group in groups) / args.jobs
        lines.append(f"{len(groups)} kinds of {len(found)} stale results, some {clock(seconds)}")
        listed = [{"kind": group.name, "by": paths[0], "results": paths} for group, paths in rows]
        return {"kinds": listed, "left": left}, "\n".join([*lines, *_reasons(left)]), 0
    stop = threading.Event()
    minutes = {group.cheapest.spec.path: group.cheapest.seconds / 60 for group in groups}
    with stopped_by_signals(stop) as signals, Progress(minutes, args.jobs) as display:
        verdicts = verify(args.results, groups, _slots_of_both(args, stop), stop, display)
    kinds = [verdict.to_json() for verdict in verdicts]
    left |= {path: reason for verdict in verdicts for path, reason in verdict.left.items()}
    lines = [str(verdict) for verdict in verdicts]
    accepted, stale = sum(len(verdict.accepted) for verdict in verdicts), len(found) + unfit
    text = "\n".join([*lines, *_reasons(left), f"{accepted} of {stale} stale results accepted in {args.results}"])
    return {"kinds": kinds, "left": left}, text, 128 + signals[0] if signals else int(accepted < stale)


def _commit_of(checkout: Path) -> str:
    """The commit of another checkout of this package.

    Raises:
        UsageError: it is none, or was changed.
    """
    from zotune.bench.run.content_key import PACKAGE
    from zotune.bench.run.runner import commit

    package = checkout / "src" / PACKAGE.name
    found = commit(package) if package.is_dir() else "unknown"
    if found == "unknown" or found.endswith("+"):
        why = "was changed" if found.endswith("+") else "is no checkout"
        raise UsageError(f"--against takes a checkout of the commit that results are of, and {checkout} {why}.")
    return found


def _slots_of_both(args: argparse.Namespace, stop: threading.Event) -> list[tuple[Any, Any]]:
    """For each job that runs at a time an executor of today's code, and with `--against` one of that checkout's."""
    slots = _slots(args, stop)
    if args.against is None:
        return [(slot, None) for slot in slots]
    if args.executor != "local":
        raise UsageError("--against runs on this machine alone; leave --executor out.")
    source = (args.against / "src").resolve()
    worker = next(iter(sorted(source.glob("*/bench/**/worker.py")))).relative_to(source).with_suffix("")
    command = (sys.executable, "-m", ".".join(worker.parts))
    return [(slot, replace(slot, command=command, source=source)) for slot in slots]


def _reasons(left: Mapping[str, str]) -> list[str]:
    return [f"{path} is left stale: {reason}" for path, reason in left.items()]


def _report(args: argparse.Namespace) -> Answer:
    try:
        from zotune.bench.report.report import report
        from zotune.bench.report.run_html import write_run_page
    except ImportError as error:
        raise UsageError(f"{error}. Reports need their extra: pip install 'zotune[bench]'.") from None
    if args.folder is not None:
        page = write_run_page(args.folder)
        return {"page": str(page)}, str(page), 0
    output = args.output or args.results / f"report-{args.scale}"
    written = report(args.results, args.scale, output, args.names, lambda spec: _reading(spec, args.data_source))
    text = f"{written[0]}, and {len(written) - 1} files of tables and figures beside it"
    return {"page": str(written[0]), "files": list(map(str, written))}, text, 0


def _minutes_a_cell(args: argparse.Namespace, chosen: Mapping[str, Sequence[CellSpec]]) -> dict[str, float]:
    """What each cell is expected to take, by path: its experiment's minutes in equal parts."""
    found: dict[str, float] = {}
    for name, specs in chosen.items():
        given = next((n for n in args.names if Path(n).stem == name), name)
        _, experiment = find(given)
        every = max(1, sum(1 for _ in cells(name, experiment, args.scale)))
        minutes = experiment.scale[args.scale].minutes
        # Without a word on it, a minute each.
        each = 1.0 if minutes is None else minutes / every
        found |= {spec.path: each for spec in specs}
    return found


def _slots(args: argparse.Namespace, stop: threading.Event) -> list[Any]:
    """An executor for each cell that runs at a time."""
    from zotune.bench.run.processes import Process
    from zotune.bench.run.ray_executor import ray_executors

    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, processors // args.jobs)
    # Two pools of spinning threads on the same cores bring each other to a standstill.
    environment = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    if args.executor == "ray":
        gpus = args.gpus_per_job
        return ray_executors(args.jobs, environment, cpus=threads, gpus=gpus, stopped=stop.is_set)
    num_gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    share_out = args.jobs > 1 and num_gpus > 1 and "CUDA_VISIBLE_DEVICES" not in os.environ
    own = [{"CUDA_VISIBLE_DEVICES": str(i % num_gpus)} if share_out else {} for i in range(args.jobs)]
    return [Process(stop.is_set, {**environment, **one}) for one in own]


@contextmanager
def stopped_by_signals(stop: threading.Event) -> Iterator[list[int]]:
    """Let Ctrl-C and SIGTERM set `stop`; the signals that came."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if not came:
            say("stopping; what is done is kept, and the next call goes on from here …")
        came.append(number)
        stop.set()

    with signal_handler(note):
        yield came
