"""The page of one run, `report.html` in its output folder: its scores, its course, and the recipe that repeats it.

The page is made from files of the run (`results.json`, `metrics.jsonl`, `config.yaml`), so it can be made at any time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from zotune.bench.report.figures import Figure, Panel, Point, Series, is_wide
from zotune.bench.report.html import draw_figure, render
from zotune.bench.results.quantities import significant
from zotune.errors import UsageError, reason_of
from zotune.llm.output.locked_folder import LockedFolder
from zotune.system.bounds import read_json

PAGE = "report.html"
_SPLITS = {"dev_before": "held-out rows, untuned", "dev": "held-out rows", "test": "evaluation rows"}
_GIB = 2**30
_START = {"step": 0, "num_forwards": 0, "seconds": 0.0}
# Number of points that a curve of the page's width can show.
_MOST_POINTS = 200

Line = dict[str, Any]


def write_run_page(folder: Path) -> Path:
    """Write the page of the run in a folder atomically and return its path.

    Raises:
        UsageError: the folder holds no finished run.
    """
    page = run_page(folder)
    with LockedFolder(folder) as locked, locked.staged() as staging:
        (staging / PAGE).write_text(page, encoding="utf-8")
    return folder / PAGE


def run_page(folder: Path) -> str:
    """The page of the run in a folder as HTML.

    Raises:
        UsageError: the folder holds no finished run, or one whose files are damaged.
    """
    try:
        results = read_json(folder / "results.json")
        recipe = (folder / "config.yaml").read_text(encoding="utf-8")
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{folder} holds no finished run: {error}. Give --run the --output-dir of a run.") from None
    try:
        return _page(results, recipe, _lines(folder / "metrics.jsonl"))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UsageError(
            f"{folder} does not hold the results and metrics that a run writes: {reason_of(error)}. Restore its files "
            "from a copy, or train again."
        ) from None


def _page(results: Line, recipe: str, lines: Sequence[Line]) -> str:
    config = results["config"]
    return render(
        "run.html",
        title=f"{config['model']}, tuned on {config['task'] or _names(config['train_file'])}",
        header=_header(results),
        heads=["rows", "metric", "value", "95 % interval", "rows read", "loss"],
        lines=[_score(label, results[name]) for name, label in _SPLITS.items() if results.get(name)],
        figures=[draw_figure(figure) for figure in figures(lines, results)],
        recipe=recipe,
    )


def _names(files: object) -> str:
    """Return the name of a file, or of several."""
    return " and ".join(map(str, files)) if isinstance(files, list) else str(files)


def _lines(path: Path) -> list[Line]:
    """The parsed lines of a metrics file, without an incomplete last line."""
    whole = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in whole]


def _header(results: Line) -> list[tuple[str, str]]:
    config = results["config"]
    best = results["best_step"]
    ended = "stopped early" if results["stopped_early"] else "stopped by a signal" if results["stopped_by"] else ""
    return [
        ("method, tuning", f"{config['method']}, {config['tuning']} ({results['num_tuned']:,} tuned parameters)"),
        ("learning rate, μ, queries", f"{config['learning_rate']:g}, {config['mu']:g}, {config['num_queries']}"),
        ("steps", ", ".join(filter(None, [f"{results['num_steps']} of {config['max_steps']}", ended]))),
        *([("best step", str(best))] if best is not None else []),
        *([("steps skipped", str(results["num_skipped"]))] if results["num_skipped"] else []),
        ("forward passes", f"{results['num_forwards']:,}"),
        ("training time", f"{significant(results['seconds'])} s"),
        ("peak memory", f"{significant(results['peak_memory'] / _GIB)} GiB"),
        ("seed", str(config["seed"])),
        ("made with", ", ".join(f"{name} {value}" for name, value in results["environment"].items())),
    ]


def _score(label: str, scores: Line) -> list[str]:
    """A row of the table of scores; the metric is the first key, and rates are shown as percentages."""
    metric, value = next(iter(scores.items()))
    ends = scores["low"], scores["high"]
    is_rate = None not in ends and ends[0] >= 0 and ends[1] <= 1
    numbers = ["–" if x is None else f"{100 * x:.1f} %" if is_rate else significant(x) for x in (value, *ends)]
    loss = scores.get("loss")
    text = "–" if loss is None else f"{loss:.4f}"
    # The interval of a single row is not known; infinite ends are null in JSON.
    interval = "–" if None in ends else f"{numbers[1]} to {numbers[2]}"
    return [label, metric, numbers[0], interval, f"{scores['num_examples']:,}", text]


# Figures --------------------------------------------------------------------------------------------------


def figures(lines: Sequence[Line], results: Line) -> Iterator[Figure]:
    """Yield the figures with at least two points: loss and metric over forward passes and over seconds, and memory."""
    training = [line for line in lines if "dev" not in line]
    dev = [(_cost_at(line["step"], training), line["dev"]) for line in lines if "dev" in line]
    if results.get("dev_before"):
        dev.insert(0, (_cost_at(0, training), results["dev_before"]))
    says = "The training loss is a mean over the last steps; the bars of the held-out metric are its 95 % interval."
    for cost, label in (("num_forwards", "forward passes"), ("seconds", "training time, s")):
        panels = tuple(_over(cost, label, training, dev))
        if panels:
            yield Figure(f"course-{cost}", f"Over {label.split(',')[0]}", says, panels)
    memory = [Point(line["step"], line["peak_memory"] / _GIB, note=_at(line)) for line in training]
    if len(memory) > 1:
        panel = Panel("peak memory", "step", "GiB", (_curve("peak so far", memory, 1),), from_zero=True)
        yield Figure("course-memory", "Memory", "The peak memory of the process up to each step.", (panel,))


def _cost_at(step: int, training: Sequence[Line]) -> Line:
    """Forward passes and seconds up to a step, interpolated linearly between logged steps."""
    before = next((line for line in reversed(training) if line["step"] <= step), _START)
    after = next((line for line in training if line["step"] >= step), before)
    share = (step - before["step"]) / (after["step"] - before["step"]) if after["step"] > before["step"] else 0.0
    between = {name: before[name] + share * (after[name] - before[name]) for name in ("num_forwards", "seconds")}
    return {"step": step, "num_forwards": round(between["num_forwards"]), "seconds": between["seconds"]}


def _curve(name: str, points: Sequence[Point], style: int) -> Series:
    """A joined series of at most about `_MOST_POINTS` points, evenly thinned; the last point is always kept."""
    every = -(-len(points) // _MOST_POINTS)
    thinned = [p for i, p in enumerate(points) if i % every == 0 or i == len(points) - 1]
    return Series(name, tuple(thinned), style, joined=True)


def _over(cost: str, label: str, training: Sequence[Line], dev: Sequence[tuple[Line, Line]]) -> Iterator[Panel]:
    losses = [Point(line[cost], line["loss"], note=_at(line)) for line in training if line["loss"] is not None]
    held_out = [Point(at[cost], scores["loss"], note=_at(at)) for at, scores in dev if scores.get("loss") is not None]
    series = (_curve("training loss", losses, 0), _curve("held-out loss", held_out, 2))
    drawn = tuple(s for s in series if len(s.points) > 1)
    if drawn:
        is_log = is_wide((p.y for s in drawn for p in s.points), 100)
        yield Panel("loss", label, "loss", drawn, log_y=is_log)
    if len(dev) > 1:
        metric = next(iter(dev[0][1]))
        curve = _curve(f"held-out {metric}", [_metric_point(at, scores, cost) for at, scores in dev], 3)
        yield Panel(f"held-out {metric}", label, metric, (curve,))


def _metric_point(at: Line, scores: Line, cost: str) -> Point:
    value, ends = next(iter(scores.values())), (scores["low"], scores["high"])
    if None in ends:
        return Point(at[cost], value, note=f"{_at(at)}: {significant(value)}")
    note = f"{_at(at)}: {significant(value)} ({significant(ends[0])} to {significant(ends[1])})"
    return Point(at[cost], value, *ends, note)


def _at(line: Line) -> str:
    text = f"step {line['step']}, {line['num_forwards']} forward passes, {significant(line['seconds'])} s"
    return text if line.get("loss") is None else f"{text}, loss {line['loss']:.4f}"
