"""Tables of results: our means with their standard errors over seeds, and the paper's numbers.

A table is a grid of entries, made from an experiment's results by its axes. `zotune.bench.report.formats` writes it as
text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from zotune.bench.results.cells import Cell, Coordinates, Place, agrees
from zotune.bench.results.intervals import contrast
from zotune.bench.results.paper_numbers import in_our_unit, paper_numbers
from zotune.bench.results.quantities import QUANTITIES, Quantity, label_of, outcomes, quantity, run_values
from zotune.bench.results.records import Score, mean_and_error
from zotune.bench.spec.schema import Experiment, PaperCell
from zotune.bench.spec.vocabulary import State

# Rows of an accuracy table without tuning.
BASELINES = {"zero_shot": "untuned model", "majority": "majority class"}


@dataclass(frozen=True)
class PaperNumber:
    """A number of the paper next to ours.

    Attributes:
        source: the table or figure of the paper.
        label: the coordinates in which it differs from our cell ("opt-1.3b"), or empty.
        value: the number in our unit.
        difference: our number minus the paper's; None if we have none.
        ratio: the number divided by the paper's first number in the column; None if there is no such number.
    """

    source: str
    label: str
    value: float
    difference: float | None
    ratio: float | None = None


@dataclass(frozen=True)
class Entry:
    """One entry of a table.

    Attributes:
        state: state of the cell; None if the experiment has no cell here.
        mean, error: mean and standard error over seeds; `error` is None for a single seed, both are without a result.
        low, high: the 95 % interval over evaluation rows and seeds; None where it is not known.
        values: the numbers of the runs.
        sources: the files of the results, below the folder of results.
        ratio: the mean divided by the first mean of the column.
        paper: the paper's numbers for the same coordinates.
        message: why a cell has no result.
    """

    state: State | None
    mean: float | None = None
    error: float | None = None
    low: float | None = None
    high: float | None = None
    values: tuple[float, ...] = ()
    sources: tuple[str, ...] = ()
    ratio: float | None = None
    paper: tuple[PaperNumber, ...] = ()
    message: str = ""

    @property
    def num_seeds(self) -> int:
        """Number of runs."""
        return len(self.values)


@dataclass(frozen=True)
class Column:
    """Coordinates of a column, and the quantity of its entries."""

    place: Place
    quantity: Quantity


@dataclass(frozen=True)
class Table:
    """A table of results.

    Attributes:
        row_axes, column_axes: names of the axes.
        rows: coordinates of the rows, in order.
        entries: the entries by row and column.
        baselines: further rows, each with a label and a number or None for each column.
        metric: the metric that the quantity `accuracy` stands for.
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
        """The heading of a column: its coordinates, and the quantity if the columns have several."""
        several = len({c.quantity.name for c in self.columns}) > 1
        # A quantity says what kind of cell it is of.
        named = zip(self.column_axes, column.place, strict=True)
        parts = [str(value) for axis, value in named if axis != "kind" or not several]
        if several or not parts:
            parts.append(label_of(column.quantity, self.metric))
        return ", ".join(parts)


def table(name: str, experiment: Experiment, cells: Sequence[Cell]) -> Table:
    """The table of an experiment by its layout; cells with equal coordinates on the layout's axes share an entry."""
    rows_of, columns_of = experiment.layout.rows, experiment.layout.columns
    quantities = _quantities(experiment, cells)
    rows = _places(rows_of, cells)
    every = [Column(place, q) for place in _places(columns_of, cells) for q in quantities]
    columns = tuple(column for column in every if _is_known(column, columns_of, experiment.kind, cells))
    of_paper = paper_numbers(experiment, cells)
    grid: list[list[Entry]] = []
    for row in rows:
        there = dict(zip(rows_of, row, strict=True))
        places = [{**there, **dict(zip(columns_of, column.place, strict=True))} for column in columns]
        grid.append([_entry(place, column, cells, of_paper) for place, column in zip(places, columns, strict=True)])
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
    """The metric of the runs: accuracy, unless all of them have the same other metric."""
    metrics = {run.test.metric for c in cells if c.result for run in c.result.runs if run.test is not None}
    return metrics.pop() if len(metrics) == 1 else "accuracy"


def _quantities(experiment: Experiment, cells: Sequence[Cell]) -> tuple[Quantity, ...]:
    """The quantities of the layout, or by default those of the kind of cell."""
    if experiment.layout.y:
        return tuple(map(quantity, experiment.layout.y))
    if experiment.kind == "accuracy":
        return (quantity("accuracy"),)
    runs = [run for cell in cells if cell.result for run in cell.result.runs]
    names = dict.fromkeys(name for run in runs for name in (*run.measured, *run.values))
    return tuple(map(quantity, names)) or (quantity("peak_memory"), quantity("seconds"))


def _places(axes: Sequence[str], cells: Sequence[Cell]) -> tuple[Place, ...]:
    """The combinations of values that some cell has, in the order of the cells; sorted if all values are numbers."""
    places = tuple(dict.fromkeys(tuple(c.coordinates.get(axis, "") for axis in axes) for c in cells))
    are_numbers = all(isinstance(value, int | float) for place in places for value in place)
    return tuple(sorted(places, key=lambda place: tuple(map(float, place)))) if are_numbers else places


def _is_known(column: Column, axes: Sequence[str], kind: str, cells: Sequence[Cell]) -> bool:
    """Whether some cell of a column has its quantity or can get it; only cells of kind accuracy have an accuracy."""
    place = dict(zip(axes, column.place, strict=True))
    here = [c for c in cells if agrees(c.coordinates, place) and shows(c, column.quantity)]
    if not here:
        return False
    usable = [c.result for c in here if c.is_usable and c.result]
    if usable or (column.quantity.name in QUANTITIES and column.quantity.name != "accuracy"):
        return not usable or any(run_values(result, column.quantity) for result in usable)
    are_accurate = any(c.coordinates.get("kind", kind) == "accuracy" for c in here)
    return (column.quantity.name == "accuracy") == are_accurate


def shows(cell: Cell, q: Quantity) -> bool:
    """Whether a cell shows a quantity: where cells differ in kind, those of kind accuracy show their accuracy alone."""
    kind = cell.coordinates.get("kind")
    return kind is None or (kind == "accuracy") == (q.name == "accuracy")


def _entry(
    place: Coordinates, column: Column, cells: Sequence[Cell], of_paper: Sequence[tuple[PaperCell, str]]
) -> Entry:
    here = [c for c in cells if agrees(c.coordinates, place)]
    if not here:
        return Entry(None)
    values = [value for c in here if c.is_usable and c.result for value in run_values(c.result, column.quantity)]
    mean, error = mean_and_error(values) if values else (None, None)
    numbers = tuple(_paper_numbers_at(here[0], column.quantity, mean, of_paper))
    worst = min(here, key=lambda c: (c.state == "done", c.is_usable))
    message = worst.result.message if worst.result else ""
    low, high = interval(here, column.quantity)
    sources = tuple(c.source for c in here if c.is_usable)
    return Entry(worst.state, mean, error, low, high, tuple(values), sources, paper=numbers, message=message)


def interval(cells: Sequence[Cell], q: Quantity) -> tuple[float, float] | tuple[None, None]:
    """The 95 % interval of a cell's mean over evaluation rows and seeds; for an amount, its least and greatest run."""
    usable = [c.result for c in cells if c.is_usable and c.result]
    if len(usable) != 1:
        return None, None
    if q.by_ratio:
        values = run_values(usable[0], q)
        return (min(values), max(values)) if len(values) > 1 else (None, None)
    of_cell = outcomes(usable[0], q)
    if of_cell is None:
        return None, None
    low, high = contrast([(1.0, of_cell)]).interval()
    if math.isinf(low):
        return None, None
    return (max(low, 0.0), min(high, 100.0)) if q.name == "accuracy" else (low, high)


def _paper_numbers_at(
    cell: Cell, q: Quantity, mean: float | None, numbers: Iterable[tuple[PaperCell, str]]
) -> Iterable[PaperNumber]:
    for paper, label in numbers:
        if paper.metric == q.name and agrees(cell.coordinates, paper.coordinates):
            value = in_our_unit(paper, q)
            if value is not None:
                yield PaperNumber(paper.source, label, value, None if mean is None else mean - value)


def _with_ratios(grid: list[list[Entry]], columns: Sequence[Column]) -> list[list[Entry]]:
    """The grid with each amount also as a multiple of its column's first, which compares across machines and models."""
    for j, column in enumerate(columns):
        if not column.quantity.by_ratio:
            continue
        ours = next((row[j].mean for row in grid if row[j].mean), None)
        first = {number.label: number.value for row in reversed(grid) for number in row[j].paper}
        for row in grid:
            row[j] = _with_ratio(row[j], ours, first)
    return grid


def _with_ratio(entry: Entry, ours: float | None, first: Mapping[str, float]) -> Entry:
    paper = tuple(replace(b, ratio=b.value / first[b.label] if first[b.label] else None) for b in entry.paper)
    return replace(entry, ratio=entry.mean / ours if entry.mean is not None and ours else None, paper=paper)


def _baselines(
    axes: Sequence[str], columns: Sequence[Column], cells: Sequence[Cell]
) -> Iterable[tuple[str, tuple[float | None, ...]]]:
    """The rows of the untuned model and the majority class, where the cells of a column agree on them."""
    for name, label in BASELINES.items():
        numbers = []
        for column in columns:
            place = dict(zip(axes, column.place, strict=True))
            here = [c.result for c in cells if c.result and agrees(c.coordinates, place)]
            scores: set[float] = {_percent(r.baselines[name]) for r in here if name in r.baselines}
            is_shown = len(scores) == 1 and column.quantity.name == "accuracy"
            numbers.append(scores.pop() if is_shown else None)
        if any(number is not None for number in numbers):
            yield label, tuple(numbers)


def _percent(score: Score) -> float:
    return 100 * score.value
