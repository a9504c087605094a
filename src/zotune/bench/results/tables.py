"""Tables of results: ours, their standard error over seeds, and what the paper has in the same place.

A table is rows × columns of entries, made of an experiment's results by its axes; how it is written is `writing.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from zotune.bench.results.intervals import contrast
from zotune.bench.results.quantities import QUANTITIES, Quantity, label_of, outcomes, quantity, readings
from zotune.bench.results.records import CellResult, Coordinate, Score, mean_and_error
from zotune.bench.run.runner import State
from zotune.bench.spec.experiments import Experiment, PaperCell

Place = tuple[Coordinate, ...]
Coordinates = Mapping[str, Coordinate]
# What a paper's unit is in ours; its GB are GiB, for the weights of OPT-13B are 48 of them.
_UNITS = {"%": ("%", 1.0), "GB": ("GiB", 1.0), "GiB": ("GiB", 1.0), "s": ("s", 1.0), "A100s": ("", 1.0), "": ("", 1.0)}
# Rows of an accuracy table that no method earned.
BASELINES = {"zero_shot": "untuned model", "majority": "majority class"}


@dataclass(frozen=True)
class Cell:
    """A cell of an experiment as the report sees it: its place, how it stands, and what it found so far."""

    coordinates: Coordinates
    state: State
    result: CellResult | None = None

    @property
    def is_usable(self) -> bool:
        """Whether it has numbers to show: done, also by code of another day."""
        return self.result is not None and self.result.status == "done" and bool(self.result.runs)


@dataclass(frozen=True)
class Beside:
    """A number of the paper next to ours.

    Attributes:
        label: where its place differs from our cell's ("opt-1.3b"), else nothing.
        value: in our unit; `difference`: ours less it, None where we have none.
        ratio: its multiple of the paper's first row in the column; None where there is no such row.
    """

    source: str
    label: str
    value: float
    difference: float | None
    ratio: float | None = None


@dataclass(frozen=True)
class Entry:
    """What stands in one place of a table.

    Attributes:
        mean, error: over seeds; `error` is None of a single seed. Both None where there is no result.
        low, high: the 95 % interval over evaluation rows and seeds; None where it is not known.
        ratio: the mean's multiple of the column's first row.
        message: why a cell has no result.
    """

    state: State | None
    mean: float | None = None
    error: float | None = None
    low: float | None = None
    high: float | None = None
    num_seeds: int = 0
    ratio: float | None = None
    paper: tuple[Beside, ...] = ()
    message: str = ""


@dataclass(frozen=True)
class Column:
    """Coordinates of a column, and what its entries are of."""

    place: Place
    quantity: Quantity


@dataclass(frozen=True)
class Table:
    """Rows × columns.

    Attributes:
        row_axes, column_axes: names of the axes.
        rows: places of the rows, in order.
        entries: by row and column.
        baselines: rows of their own, of numbers or None.
        metric: what `accuracy` is in it.
    """

    name: str
    row_axes: tuple[str, ...]
    column_axes: tuple[str, ...]
    rows: tuple[Place, ...]
    columns: tuple[Column, ...]
    entries: tuple[tuple[Entry, ...], ...]
    baselines: tuple[tuple[str, tuple[float | None, ...]], ...] = ()
    metric: str = "accuracy"

    def heading(self, column: Column) -> str:
        """What a column is called.

        With one quantity in all columns, its place alone.
        """
        several = len({c.quantity.name for c in self.columns}) > 1
        parts = [str(value) for value in column.place]
        if several or not parts:
            parts.append(label_of(column.quantity, self.metric))
        return ", ".join(parts)


def table(name: str, experiment: Experiment, cells: Sequence[Cell]) -> Table:
    """The table of an experiment by its layout; cells that share a place (by an axis left out) share an entry."""
    rows_of, columns_of = experiment.layout.rows, experiment.layout.columns
    quantities = _quantities(experiment, cells)
    rows = _places(rows_of, cells)
    every = [Column(place, q) for place in _places(columns_of, cells) for q in quantities]
    columns = tuple(column for column in every if _is_known(column, columns_of, experiment.kind, cells))
    beside = papers(experiment, cells)
    grid: list[list[Entry]] = []
    for row in rows:
        there = dict(zip(rows_of, row, strict=True))
        places = [{**there, **dict(zip(columns_of, column.place, strict=True))} for column in columns]
        grid.append([_entry(place, column, cells, beside) for place, column in zip(places, columns, strict=True)])
    return Table(
        name=name,
        row_axes=rows_of,
        column_axes=columns_of,
        rows=rows,
        columns=columns,
        entries=tuple(map(tuple, _with_ratios(grid, columns))),
        baselines=tuple(_baselines(columns_of, columns, cells)),
        metric=metric_of(cells),
    )


def metric_of(cells: Iterable[Cell]) -> str:
    """What the runs' metric is: accuracy, unless answers have degrees."""
    found = {run.test.metric for c in cells if c.result for run in c.result.runs if run.test is not None}
    return found.pop() if len(found) == 1 else "accuracy"


def _quantities(experiment: Experiment, cells: Sequence[Cell]) -> tuple[Quantity, ...]:
    """Those of the layout, or what cells of the kind are about."""
    if experiment.layout.y:
        return tuple(map(quantity, experiment.layout.y))
    if experiment.kind == "accuracy":
        return (quantity("accuracy"),)
    runs = [run for cell in cells if cell.result for run in cell.result.runs]
    names = dict.fromkeys(name for run in runs for name in (*run.measured, *run.values))
    return tuple(map(quantity, names)) or (quantity("peak_memory"), quantity("seconds"))


def _places(axes: Sequence[str], cells: Sequence[Cell]) -> tuple[Place, ...]:
    """The combinations of values that some cell has, in the order in which cells come; numbers in theirs."""
    found = tuple(dict.fromkeys(tuple(c.coordinates.get(axis, "") for axis in axes) for c in cells))
    are_numbers = all(isinstance(value, int | float) for place in found for value in place)
    return tuple(sorted(found, key=lambda place: tuple(map(float, place)))) if are_numbers else found


def _is_known(column: Column, axes: Sequence[str], kind: str, cells: Sequence[Cell]) -> bool:
    """Whether some cell of a column has its quantity, or may yet: only cells of that kind have an accuracy."""
    place = dict(zip(axes, column.place, strict=True))
    here = [c for c in cells if _agrees(c.coordinates, place)]
    usable = [c.result for c in here if c.is_usable and c.result]
    if usable or (column.quantity.name in QUANTITIES and column.quantity.name != "accuracy"):
        return not usable or any(readings(result, column.quantity) for result in usable)
    are_accurate = any(c.coordinates.get("kind", kind) == "accuracy" for c in here)
    return (column.quantity.name == "accuracy") == are_accurate


def _entry(place: Coordinates, column: Column, cells: Sequence[Cell], beside: Sequence[tuple[PaperCell, str]]) -> Entry:
    here = [c for c in cells if _agrees(c.coordinates, place)]
    if not here:
        return Entry(None)
    read = [value for c in here if c.is_usable and c.result for value in readings(c.result, column.quantity)]
    mean, error = mean_and_error(read) if read else (None, None)
    numbers = tuple(_beside(here[0], column.quantity, mean, beside))
    worst = min(here, key=lambda c: (c.state == "done", c.is_usable))
    message = worst.result.message if worst.result else ""
    low, high = interval(here, column.quantity)
    return Entry(worst.state, mean, error, low, high, len(read), paper=numbers, message=message)


def interval(cells: Sequence[Cell], q: Quantity) -> tuple[float, float] | tuple[None, None]:
    """The 95 % interval of a cell's mean over evaluation rows and seeds; of an amount, its least and greatest run."""
    usable = [c.result for c in cells if c.is_usable and c.result]
    if len(usable) != 1:
        return None, None
    if q.by_ratio:
        read = readings(usable[0], q)
        return (min(read), max(read)) if len(read) > 1 else (None, None)
    found = outcomes(usable[0], q)
    if found is None:
        return None, None
    low, high = contrast([(1.0, found)]).interval()
    if math.isinf(low):
        return None, None
    return (max(low, 0.0), min(high, 100.0)) if q.name == "accuracy" else (low, high)


def _agrees(coordinates: Coordinates, place: Coordinates) -> bool:
    return all(coordinates.get(axis, "") == value for axis, value in place.items())


def papers(experiment: Experiment, cells: Sequence[Cell]) -> list[tuple[PaperCell, str]]:
    """The paper's numbers without the axes on which no cell of ours is where the paper is; these make each one's label.

    So a table of another model shows the paper's numbers too, and says which model they are of.
    """
    found = list(experiment.paper_cells())
    ours: dict[str, set[Coordinate]] = {}
    for cell in cells:
        for axis, value in cell.coordinates.items():
            ours.setdefault(axis, set()).add(value)
    axes = {axis for p in found for axis in p.coordinates}
    theirs = {axis: {p.coordinates[axis] for p in found if axis in p.coordinates} for axis in axes}
    apart = {axis for axis, values in theirs.items() if not values & ours.get(axis, set())}
    return [
        (
            p.model_copy(update={"coordinates": {k: v for k, v in p.coordinates.items() if k not in apart}}),
            ", ".join(str(v) for k, v in p.coordinates.items() if k in apart),
        )
        for p in found
    ]


def _beside(cell: Cell, q: Quantity, mean: float | None, numbers: Iterable[tuple[PaperCell, str]]) -> Iterable[Beside]:
    for paper, label in numbers:
        if paper.metric == q.name and _agrees(cell.coordinates, paper.coordinates):
            value = in_our_unit(paper, q)
            if value is not None:
                yield Beside(paper.source, label, value, None if mean is None else mean - value)


def in_our_unit(paper: PaperCell, q: Quantity) -> float | None:
    """The paper's number in the unit of a quantity; None where they are not the same kind of thing."""
    unit, factor = _UNITS.get(paper.unit, ("?", 1.0))
    return paper.value * factor if unit == q.unit else None


def _with_ratios(grid: list[list[Entry]], columns: Sequence[Column]) -> list[list[Entry]]:
    """Amounts also as multiples of the column's first: what is comparable between machines and models."""
    for j, column in enumerate(columns):
        if not column.quantity.by_ratio:
            continue
        ours = next((row[j].mean for row in grid if row[j].mean), None)
        first = {beside.label: beside.value for row in reversed(grid) for beside in row[j].paper}
        for row in grid:
            row[j] = _with_ratio(row[j], ours, first)
    return grid


def _with_ratio(entry: Entry, ours: float | None, first: Mapping[str, float]) -> Entry:
    paper = tuple(replace(b, ratio=b.value / first[b.label] if first[b.label] else None) for b in entry.paper)
    return replace(entry, ratio=entry.mean / ours if entry.mean is not None and ours else None, paper=paper)


def _baselines(
    axes: Sequence[str], columns: Sequence[Column], cells: Sequence[Cell]
) -> Iterable[tuple[str, tuple[float | None, ...]]]:
    """What needs no tuning, where the cells of a column agree on it."""
    for name, label in BASELINES.items():
        numbers = []
        for column in columns:
            place = dict(zip(axes, column.place, strict=True))
            here = [c.result for c in cells if c.result and _agrees(c.coordinates, place)]
            scores: set[float] = {_percent(r.baselines[name]) for r in here if name in r.baselines}
            is_shown = len(scores) == 1 and column.quantity.name == "accuracy"
            numbers.append(scores.pop() if is_shown else None)
        if any(number is not None for number in numbers):
            yield label, tuple(numbers)


def _percent(score: Score) -> float:
    return 100 * score.value
