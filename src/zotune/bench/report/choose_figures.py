"""The choice of figures for an experiment: those of its layout, and three for every table of accuracies.

These show each accuracy with its seeds, its interval and the paper's number; what it cost (`cost_figures`); and the
course of the training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from zotune.bench.report.cost_figures import costs, training_course
from zotune.bench.report.figures import Figure, Panel, Point, Series, is_wide, style_of
from zotune.bench.results.cells import Cell, Place, label_of_cell, name_of, place_of, varying
from zotune.bench.results.paper_numbers import in_our_unit, paper_numbers
from zotune.bench.results.quantities import Quantity, label_of, quantity, run_values
from zotune.bench.results.tables import Column, Entry, Table, interval, metric_of, shows
from zotune.bench.spec.schema import Experiment
from zotune.bench.spec.vocabulary import Coordinate

_PAPER = "the paper"
# From the quantity that a formula predicts to the measured quantity.
_PREDICTED = {"formula_bytes": "step_bytes", "expected_relative_variance": "relative_variance"}


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
        _axis_panel(experiment, q, axis, place, [c for c in cells if place_of(c, across) == place])
        for place in dict.fromkeys(place_of(c, across) for c in cells)
        for q in quantities
    ]
    shown = tuple(panel for panel in panels if any(True for _ in panel.points()))
    says = "Each point is a mean over seeds, which are the dots, with its 95 % interval or, for amounts, the extremes."
    return Figure(f"{name}-along", experiment.question, says, shown)


def _axis_panel(experiment: Experiment, q: Quantity, axis: str, place: Place, cells: Sequence[Cell]) -> Panel:
    here = [c for c in cells if shows(c, q)]
    apart = varying([a for a in experiment.layout.rows if a not in (axis, "kind")], here)
    names = list(dict.fromkeys(label_of_cell(c, apart) or "ours" for c in here))
    series = []
    for label in names:
        points = [_point(c, axis, q) for c in here if (label_of_cell(c, apart) or "ours") == label]
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
    dots = tuple(values) if len(values) > 1 else ()
    return Point(float(x), mean, low, high, f"{axis} {x}, {_in_words(q, mean, low, high)}", dots)


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
        "Each line is a row of the table. Filled markers are our numbers, with bars for their 95 % intervals and a dot "
        "for each seed; hollow markers are the paper’s numbers, for its own model."
    )
    if table.baselines:
        says += f" Dotted lines show the {' and the '.join(label for label, _ in table.baselines)}."
    return Figure(f"{name}-standing", experiment.question, says, tuple(p for p in panels if p.series))


def _ranking(table: Table, j: int, column: Column, names: tuple[str, ...]) -> Panel:
    q, ours, theirs = column.quantity, [], dict[str, list[Point]]()
    shown = [(name, row[j]) for name, row in zip(names, table.entries, strict=True) if _has_number(row[j])]
    names = tuple(name for name, _ in shown)
    for i, (_, entry) in enumerate(shown):
        if entry.mean is not None:
            note = f"{names[i]}, {_in_words(q, entry.mean, entry.low, entry.high)}"
            dots = entry.values if len(entry.values) > 1 else ()
            ours.append(Point(entry.mean, i, entry.low, entry.high, note, dots))
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


def _has_number(entry: Entry) -> bool:
    return entry.mean is not None or bool(entry.paper)


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
                note = f"{name_of(cell)}: {measured.text(y)} measured, {predicted.text(x)} by the formula"
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


def _in_words(q: Quantity, mean: float, low: float | None, high: float | None) -> str:
    """A number with its interval, in words."""
    text = f"{q.text(mean)} {q.unit}".strip()
    return text if low is None or high is None else f"{text} ({q.text(low)} to {q.text(high)})"
