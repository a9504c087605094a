"""The choice of figures for an experiment: those of its layout, and three for every table of accuracies.

These show each accuracy with its interval and the paper's number, its cost in forward passes, seconds and memory, and
the course of the training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from zotune.bench.report.figures import Figure, Panel, Point, Series, is_wide, style_of
from zotune.bench.results.quantities import Quantity, label_of, quantity, run_values
from zotune.bench.results.records import CellResult
from zotune.bench.results.tables import Cell, Column, Place, Table, in_our_unit, interval, metric_of, paper_numbers
from zotune.bench.spec.schema import Experiment
from zotune.bench.spec.vocabulary import Coordinate

_COSTS = ("num_forwards", "seconds", "peak_memory")
_PAPER = "the paper"
# From the quantity that a formula predicts to the measured quantity.
_PREDICTED = {"formula_bytes": "over_baseline_bytes", "expected_relative_variance": "relative_variance"}
# Largest number of curves that readers can distinguish in one panel.
_MAX_CURVES = 12


def figures(name: str, experiment: Experiment, cells: Sequence[Cell], table: Table) -> list[Figure]:
    """All figures of an experiment that have points."""
    chosen: list[Figure] = []
    if not any(c.is_usable for c in cells):
        return chosen
    if has_numeric_x(experiment, cells):
        chosen.append(over_axis(name, experiment, cells))
    else:
        chosen.append(ranking(name, experiment, table))
    accurate = [c for c in cells if c.is_usable and c.result and any(run.test for run in c.result.runs)]
    if len(accurate) > 1:
        chosen += [costs(name, experiment, accurate), training_course(name, experiment, accurate)]
    chosen += theory(name, experiment, cells)
    return [figure for figure in chosen if figure.num_points]


# Over an axis ---------------------------------------------------------------------------------------------


def has_numeric_x(experiment: Experiment, cells: Sequence[Cell]) -> bool:
    """Whether the layout's x is an axis with numbers as values."""
    axis = experiment.layout.x
    values = [c.coordinates.get(axis) for c in cells] if axis else []
    return bool(values) and all(isinstance(v, int | float) for v in values)


def over_axis(name: str, experiment: Experiment, cells: Sequence[Cell]) -> Figure:
    """Each y of the layout over its x; a line for each combination of the other row axes, hollow for the paper's."""
    axis = str(experiment.layout.x)
    # Cells of different kinds have different quantities, so the kind does not separate panels.
    across = [a for a in experiment.layout.columns if a not in (axis, "kind")]
    quantities = [quantity(y) for y in experiment.layout.y] or [quantity("accuracy")]
    panels = [
        _axis_panel(experiment, q, axis, place, [c for c in cells if _place(c, across) == place])
        for place in dict.fromkeys(_place(c, across) for c in cells)
        for q in quantities
    ]
    shown = tuple(panel for panel in panels if any(True for _ in panel.points()))
    says = "Each point is a mean over seeds, with its 95 % interval or, for amounts, the least and greatest run."
    return Figure(f"{name}-along", experiment.question, says, shown)


def _axis_panel(experiment: Experiment, q: Quantity, axis: str, place: Place, here: Sequence[Cell]) -> Panel:
    apart = _varying([a for a in experiment.layout.rows if a not in (axis, "kind")], here)
    names = list(dict.fromkeys(_label(c, apart) or "ours" for c in here))
    series = []
    for label in names:
        points = [_point(c, axis, q) for c in here if (_label(c, apart) or "ours") == label]
        known = tuple(sorted((p for p in points if p is not None), key=lambda p: p.x))
        series.append(Series(label, known, style_of(label, names), joined=True))
    series += _of_paper(experiment, q, axis, here, names)
    drawn = tuple(s for s in series if s.points)
    xs = [p.x for s in drawn for p in s.points]
    title = ", ".join([*map(str, place), q.label])
    is_wide_y = q.by_ratio and is_wide(p.y for s in drawn for p in s.points)
    metric = metric_of(here)
    return Panel(title, axis.replace("_", " "), label_of(q, metric), drawn, log_x=is_wide(xs), log_y=is_wide_y)


def _point(cell: Cell, axis: str, q: Quantity) -> Point | None:
    values = run_values(cell.result, q) if cell.is_usable and cell.result else []
    if not values:
        return None
    mean = sum(values) / len(values)
    low, high = interval([cell], q)
    x = cell.coordinates[axis]
    return Point(float(x), mean, low, high, f"{axis} {x}, {_in_words(q, mean, low, high)}")


def _of_paper(
    experiment: Experiment, q: Quantity, axis: str, here: Sequence[Cell], names: Sequence[str]
) -> Iterator[Series]:
    """The paper's numbers in the same panel, one series for each label."""
    numbers = [
        (label, paper, value)
        for paper, label in paper_numbers(experiment, here)
        if paper.metric == q.name
        and axis in paper.coordinates
        and (value := in_our_unit(paper, q)) is not None
        and any(_agree_except(paper.coordinates, c.coordinates, axis) for c in here)
    ]
    for label, some in groupby(sorted(numbers, key=lambda t: t[0]), key=lambda t: t[0]):
        points = [Point(float(p.coordinates[axis]), value, note=f"{p.source}: {q.text(value)}") for _, p, value in some]
        known = tuple(sorted(points, key=lambda p: p.x))
        yield Series(f"{_PAPER} {label}".strip(), known, len(names), joined=True, hollow=True)


def _agree_except(paper: Mapping[str, Coordinate], ours: Mapping[str, Coordinate], axis: str) -> bool:
    """Whether both have equal coordinates, except on the axis."""
    return all(ours.get(a) == v for a, v in paper.items() if a != axis and a in ours)


# Ranking --------------------------------------------------------------------------------------------------


def ranking(name: str, experiment: Experiment, table: Table) -> Figure:
    """A panel for each column and a line for each row of a table: our number with its interval, and the paper's."""
    vary = [i for i, _ in enumerate(table.row_axes) if len({row[i] for row in table.rows}) > 1]
    names = tuple(", ".join(str(row[i]) for i in vary) or str(row[-1] if row else "ours") for row in table.rows)
    panels = tuple(_ranking(table, j, column, names) for j, column in enumerate(table.columns))
    says = (
        "Each line is a row of the table. Filled markers are our numbers, with bars for their 95 % intervals; hollow "
        "markers are the paper’s numbers, for its own model."
    )
    if table.baselines:
        says += f" Dotted lines show the {' and the '.join(label for label, _ in table.baselines)}."
    return Figure(f"{name}-standing", experiment.question, says, tuple(p for p in panels if p.series))


def _ranking(table: Table, j: int, column: Column, names: tuple[str, ...]) -> Panel:
    q, ours, theirs = column.quantity, [], dict[str, list[Point]]()
    for i, row in enumerate(table.entries):
        entry = row[j]
        if entry.mean is not None:
            note = f"{names[i]}, {_in_words(q, entry.mean, entry.low, entry.high)}"
            ours.append(Point(entry.mean, i, entry.low, entry.high, note))
        for number in entry.paper:
            note = f"{names[i]}, {number.source}: {q.text(number.value)} {q.unit}"
            theirs.setdefault(number.label, []).append(Point(number.value, i, note=note))
    series = [Series("ours", tuple(ours), 1)] if ours else []
    series += [Series(f"{_PAPER} {k}".strip(), tuple(v), 2 + n, hollow=True) for n, (k, v) in enumerate(theirs.items())]
    lines = tuple((label, numbers[j]) for label, numbers in table.baselines if numbers[j] is not None)
    is_log = q.by_ratio and is_wide(p.x for s in series for p in s.points)
    return Panel(
        table.heading(column),
        label_of(q, table.metric),
        "",
        tuple(series) if ours else (),
        categories=names,
        log_x=is_log,
        from_zero=q.by_ratio and not is_log,
        lines=lines,  # type: ignore[arg-type]
    )


# Costs and courses ----------------------------------------------------------------------------------------


def costs(name: str, experiment: Experiment, cells: Sequence[Cell]) -> Figure:
    """Accuracy over its cost in forward passes, seconds and peak memory."""
    accuracy, metric = quantity("accuracy"), metric_of(cells)
    apart = _apart(experiment, cells)
    names = list(dict.fromkeys(_label(c, apart) for c in cells))
    panels = []
    for cost in map(quantity, _COSTS):
        series = []
        for label in names:
            points = [_cost_point(c, cost, accuracy) for c in cells if _label(c, apart) == label]
            series.append(Series(label, tuple(p for p in points if p is not None), style_of(label, names)))
        xs = [p.x for s in series for p in s.points]
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
    return Point(x, y, low, high, f"{_all(cell)}: {accuracy.text(y)} % for {cost.text(x)} {cost.unit}")


def training_course(name: str, experiment: Experiment, cells: Sequence[Cell]) -> Figure:
    """The metric on the held-out rows over the forward passes, as a mean over seeds."""
    across = [a for a in experiment.layout.columns]
    panels = []
    for place in dict.fromkeys(_place(c, across) for c in cells):
        here = [c for c in cells if _place(c, across) == place]
        apart = _varying([a for a in here[0].coordinates if a not in across], here)
        names = [_label(c, apart) or "ours" for c in here][:_MAX_CURVES]
        series = [
            Series(label, _course(c.result), style_of(label, names), joined=True)
            for label, c in zip(names, here, strict=False)
            if c.result is not None
        ]
        xs = [p.x for s in series for p in s.points if p.x]
        title, label = ", ".join(map(str, place)) or "held-out rows", f"held-out {metric_of(here)}, %"
        drawn = tuple(s for s in series if s.points)
        panels.append(Panel(title, "forward passes", label, drawn, log_x=is_wide(xs, 100)))
    says = "Each line is a mean over seeds. A run keeps the best step on the held-out rows, not the last."
    return Figure(f"{name}-way", "How does training proceed?", says, tuple(p for p in panels if p.series))


def _course(result: CellResult) -> tuple[Point, ...]:
    """The mean over seeds of each evaluation that all seeds have."""
    by_step: dict[int, list[tuple[float, float]]] = {}
    for run in result.runs:
        for e in run.evaluations:
            if e.dev_value is not None:
                by_step.setdefault(e.step, []).append((e.num_forwards, 100 * e.dev_value))
    whole = {step: v for step, v in by_step.items() if len(v) == len(result.runs)}
    means = [(step, *(sum(c) / len(v) for c in zip(*v, strict=True))) for step, v in sorted(whole.items())]
    return tuple(Point(x, y, note=f"step {step}, {x:.0f} forward passes: {y:.1f} %") for step, x, y in means)


# Theory ---------------------------------------------------------------------------------------------------


def theory(name: str, experiment: Experiment, cells: Sequence[Cell]) -> Iterator[Figure]:
    """Measured numbers over the predictions of formulas."""
    panels = []
    for predicted, measured in ((quantity(a), quantity(b)) for a, b in _PREDICTED.items()):
        points = []
        for cell in cells:
            xs = run_values(cell.result, predicted) if cell.is_usable and cell.result else []
            ys = run_values(cell.result, measured) if cell.is_usable and cell.result else []
            if xs and ys:
                x, y = sum(xs) / len(xs), sum(ys) / len(ys)
                note = f"{_all(cell)}: {measured.text(y)} measured, {predicted.text(x)} by the formula"
                points.append(Point(x, y, note=note))
        if not points:
            continue
        is_log = is_wide(v for p in points for v in (p.x, p.y))
        series = (Series("cells", tuple(points), 1),)
        x_label, y_label = (
            f"{how}, {q.unit}".strip(", ") for how, q in (("by formula", predicted), ("measured", measured))
        )
        axes = Panel(measured.label, x_label, y_label, series, equal=True)
        panels.append(replace(axes, log_x=is_log, log_y=is_log, from_zero=not is_log))
    if panels:
        says = "On the line the formula is exact; above it the measured number is larger than the formula’s."
        yield Figure(f"{name}-theory", "Does the formula predict the measurement?", says, tuple(panels))


# Coordinates and labels -----------------------------------------------------------------------------------


def _place(cell: Cell, axes: Sequence[str]) -> Place:
    return tuple(cell.coordinates.get(axis, "") for axis in axes)


def _varying(axes: Sequence[str], cells: Sequence[Cell]) -> list[str]:
    """The axes on which cells differ."""
    return [axis for axis in axes if len({c.coordinates.get(axis) for c in cells}) > 1]


def _apart(experiment: Experiment, cells: Sequence[Cell]) -> list[str]:
    """The axes that distinguish series: the method if cells differ in it, else the row axes."""
    all_axes = _varying([*experiment.layout.rows, *experiment.layout.columns], cells)
    return ["method"] if "method" in all_axes else _varying(experiment.layout.rows, cells) or all_axes


def _label(cell: Cell, axes: Sequence[str]) -> str:
    return ", ".join(str(cell.coordinates[axis]) for axis in axes if axis in cell.coordinates)


def _all(cell: Cell) -> str:
    return ", ".join(map(str, cell.coordinates.values()))


def _in_words(q: Quantity, mean: float, low: float | None, high: float | None) -> str:
    """A number with its interval, in words."""
    text = f"{q.text(mean)} {q.unit}".strip()
    return text if low is None or high is None else f"{text} ({q.text(low)} to {q.text(high)})"
