"""The page of one run of `zotune train`, `report.html` in its folder: what it found, how it got there, how to repeat it.

It reads what the run wrote (`results.json`, `metrics.jsonl`, `config.yaml`), so it can be made at any time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from zotune.bench.figures import Figure, Panel, Point, Series, is_wide
from zotune.bench.page import render, shown
from zotune.bench.quantities import significant
from zotune.errors import UsageError

PAGE = "report.html"
_SPLITS = {"dev_before": "held-out rows, untuned", "dev": "held-out rows", "test": "evaluation rows"}
_GIB = 2**30


def write_run_page(folder: Path) -> Path:
    """Write the page of the run in a folder, whole or not at all; where it is.

    Raises:
        UsageError: there is no finished run.
    """
    page = run_page(folder)
    path = folder / PAGE
    aside = folder / f".{PAGE}.{os.getpid()}"
    aside.write_text(page, encoding="utf-8")
    aside.replace(path)
    return path


def run_page(folder: Path) -> str:
    """The page as text.

    Raises:
        UsageError: there is no finished run.
    """
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        recipe = (folder / "config.yaml").read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} holds no finished run: {error}. Give --run the --output-dir of a run.") from None
    lines = _lines(folder / "metrics.jsonl")
    config = results["config"]
    return render(
        "run.html",
        title=f"{config['model']}, tuned on {config['task'] or config['train_file']}",
        header=_header(results),
        heads=["rows", "metric", "value", "95 % interval", "rows read", "loss"],
        lines=[_score(label, results[name]) for name, label in _SPLITS.items() if results.get(name)],
        figures=[shown(figure) for figure in figures(lines, results)],
        recipe=recipe,
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics, but for a last one that is not whole."""
    whole = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in whole]


def _header(results: dict[str, Any]) -> list[tuple[str, str]]:
    config = results["config"]
    best = results["best_step"]
    ended = "stopped early" if results["stopped_early"] else "stopped by a signal" if results["stopped_by"] else ""
    return [
        ("method, tuning", f"{config['method']}, {config['tuning']} ({results['num_tuned']:,} numbers tuned)"),
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


def _score(label: str, found: dict[str, Any]) -> list[str]:
    """A line of the result's table: the metric comes first, and rates are shown as percentages."""
    metric, value = next(iter(found.items()))
    is_rate = 0 <= found["low"] and found["high"] <= 1
    numbers = [f"{100 * x:.1f} %" if is_rate else significant(x) for x in (value, found["low"], found["high"])]
    loss = found.get("loss")
    text = "–" if loss is None else f"{loss:.4f}"
    return [label, metric, numbers[0], f"{numbers[1]} to {numbers[2]}", f"{found['num_examples']:,}", text]


# Figures --------------------------------------------------------------------------------------------------


def figures(lines: Sequence[dict[str, Any]], results: dict[str, Any]) -> Iterator[Figure]:
    """Loss and held-out metric over forward passes and seconds, and memory; those that have two points or more."""
    training = [line for line in lines if "dev" not in line]
    spent = {line["step"]: line for line in training}
    dev = [(spent[line["step"]], line["dev"]) for line in lines if "dev" in line and line["step"] in spent]
    if results.get("dev_before"):
        dev.insert(0, ({"step": 0, "num_forwards": 0, "seconds": 0.0}, results["dev_before"]))
    costs = (("num_forwards", "forward passes"), ("seconds", "training time, s"))
    panels = [panel for cost, label in costs for panel in _over(cost, label, training, dev)]
    if panels:
        says = "Training loss is the mean of the last steps; the bars of the held-out metric are its 95 % interval."
        yield Figure("course", "Loss and metric", says, tuple(panels))
    memory = [Point(line["step"], line["peak_memory"] / _GIB, note=_at(line)) for line in training]
    if len(memory) > 1:
        series = (Series("peak so far", tuple(memory), 1, joined=True),)
        panel = Panel("peak memory", "step", "GiB", series, from_zero=True)
        yield Figure("memory", "Memory", "The most that the process has held so far.", (panel,))


def _over(cost: str, label: str, training: Sequence[Any], dev: Sequence[Any]) -> Iterator[Panel]:
    losses = [Point(line[cost], line["loss"], note=_at(line)) for line in training if line["loss"] is not None]
    held_out = [Point(at[cost], d["loss"], note=_at(at)) for at, d in dev if d.get("loss") is not None]
    series = [
        Series("training loss", tuple(losses), 0, joined=True),
        Series("held-out loss", tuple(held_out), 2, joined=True),
    ]
    drawn = tuple(s for s in series if len(s.points) > 1)
    if drawn:
        is_log = is_wide((p.y for s in drawn for p in s.points), 100)
        yield Panel("loss", label, "loss", drawn, log_y=is_log)
    if len(dev) > 1:
        metric = next(iter(dev[0][1]))
        found = tuple(_measured(at, d, cost) for at, d in dev)
        yield Panel(f"held-out {metric}", label, metric, (Series(f"held-out {metric}", found, 3, joined=True),))


def _measured(at: dict[str, Any], found: dict[str, Any], cost: str) -> Point:
    value = next(iter(found.values()))
    note = f"{_at(at)}: {significant(value)} ({significant(found['low'])} to {significant(found['high'])})"
    return Point(at[cost], value, found["low"], found["high"], note)


def _at(line: dict[str, Any]) -> str:
    text = f"step {line['step']}, {line['num_forwards']} forward passes, {significant(line['seconds'])} s"
    return text if line.get("loss") is None else f"{text}, loss {line['loss']:.4f}"
