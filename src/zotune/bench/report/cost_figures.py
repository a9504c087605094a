"""Figures of costs: accuracy over what it took, and the held-out rows in the course of the training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from zotune.bench.report.figures import Figure, Panel, Point, Series, is_wide, style_of, with_shared_axes
from zotune.bench.results.cells import Cell, label_of_cell, name_of, place_of, varying
from zotune.bench.results.quantities import Quantity, label_of, quantity, run_values
from zotune.bench.results.records import CellResult, Evaluation
from zotune.bench.results.tables import interval, metric_of
from zotune.bench.spec.schema import Experiment

_COSTS = ("forward_equivalents", "seconds", "step_bytes")
# Largest number of curves that readers can distinguish in one panel.
_MAX_CURVES = 12


def costs(name: str, experiment: Experiment, cells: Sequence[Cell]) -> Figure:
    """Accuracy over its cost in forward-equivalents, seconds and the memory of a step, where these were recorded."""
    accuracy, metric = quantity("accuracy"), metric_of(cells)
    apart = _apart(experiment, cells)
    names = list(dict.fromkeys(label_of_cell(c, apart) for c in cells))
    panels = []
    for cost in map(quantity, _COSTS):
        series = []
        for label in names:
            points = [_cost_point(c, cost, accuracy) for c in cells if label_of_cell(c, apart) == label]
            series.append(Series(label, tuple(p for p in points if p is not None), style_of(label, names)))
        xs = [p.x for s in series for p in s.points]
        if not xs:
            continue
        title = f"{metric} against {cost.label}"
        panels.append(Panel(title, label_of(cost), label_of(accuracy, metric), tuple(series), log_x=is_wide(xs, 8)))
    says = "Up is better and left is cheaper. A point is worth its cost if no other is both above it and to its left."
    return Figure(f"{name}-spent", "What does it cost?", says, tuple(panels))


def _cost_point(cell: Cell, cost: Quantity, accuracy: Quantity) -> Point | None:
    assert cell.result is not None
    xs, ys = run_values(cell.result, cost), run_values(cell.result, accuracy)
    if not xs or not ys or not any(xs):
        return None
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    low, high = interval([cell], accuracy)
    return Point(x, y, low, high, f"{name_of(cell)}: {accuracy.text(y)} % for {cost.text(x)} {cost.unit}")


def training_course(name: str, experiment: Experiment, cells: Sequence[Cell]) -> Figure:
    """The metric on the held-out rows over the forward-equivalents, as a mean over seeds with the band of all seeds.

    Over seconds where a result does not record forward-equivalents: calls of the model are no common currency.
    """
    across = list(experiment.layout.columns)
    cost, x_label = _currency(cells)
    panels = []
    for place in dict.fromkeys(place_of(c, across) for c in cells):
        here = [c for c in cells if place_of(c, across) == place][:_MAX_CURVES]
        apart = varying([a for a in here[0].coordinates if a not in across], here)
        names = [label_of_cell(c, apart) or "ours" for c in here]
        series = [
            Series(label, _course(c.result, cost, x_label), style_of(label, names), joined=True, banded=True)
            for label, c in zip(names, here, strict=True)
            if c.result is not None
        ]
        xs = [p.x for s in series for p in s.points if p.x]
        title, label = ", ".join(map(str, place)) or "held-out rows", f"held-out {metric_of(here)}, %"
        drawn = tuple(s for s in series if s.points)
        panels.append(Panel(title, x_label, label, drawn, log_x=is_wide(xs, 100)))
    says = (
        "Each line is the mean over seeds, in the band from the lowest to the highest seed. All panels have the same "
        "axes. A run keeps the best step on the held-out rows, not the last."
    )
    return Figure(f"{name}-way", "How does training proceed?", says, with_shared_axes(p for p in panels if p.series))


_Cost = Callable[[Evaluation], float | None]


def _currency(cells: Sequence[Cell]) -> tuple[_Cost, str]:
    """What the course is drawn over, and its label."""
    every = [e for c in cells if c.result for run in c.result.runs for e in run.evaluations]
    if all(e.forward_equivalents is not None for e in every):
        return (lambda e: e.forward_equivalents), "forward-equivalents"
    return (lambda e: e.seconds), "seconds of training"


def _course(result: CellResult, cost: _Cost, unit: str) -> tuple[Point, ...]:
    """The mean over seeds of each evaluation that all seeds have, with the least and the greatest seed."""
    by_step: dict[int, list[tuple[float, float]]] = {}
    for run in result.runs:
        for e in run.evaluations:
            x = cost(e)
            if e.dev_value is not None and x is not None:
                by_step.setdefault(e.step, []).append((x, 100 * e.dev_value))
    points = []
    for step, pairs in sorted(by_step.items()):
        if len(pairs) == len(result.runs):
            xs, ys = zip(*pairs, strict=True)
            x, y, low, high = sum(xs) / len(xs), sum(ys) / len(ys), min(ys), max(ys)
            note = f"step {step}, {x:.0f} {unit}: {y:.1f} %"
            note += f" ({low:.1f} to {high:.1f})" if len(ys) > 1 else ""
            points.append(Point(x, y, low, high, note))
    return tuple(points)


def _apart(experiment: Experiment, cells: Sequence[Cell]) -> list[str]:
    """The axes that distinguish series: the method if cells differ in it, else the row axes."""
    all_axes = varying([*experiment.layout.rows, *experiment.layout.columns], cells)
    return ["method"] if "method" in all_axes else varying(experiment.layout.rows, cells) or all_axes
