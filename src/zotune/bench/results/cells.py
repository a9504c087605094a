"""A cell of an experiment as reports see it, and the selection of cells by their coordinates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from zotune.bench.results.records import CellResult
from zotune.bench.spec.vocabulary import Coordinate, State

Place = tuple[Coordinate, ...]
Coordinates = Mapping[str, Coordinate]


@dataclass(frozen=True)
class Cell:
    """A cell of an experiment: its coordinates, its state and its result, if there is one."""

    coordinates: Coordinates
    state: State
    result: CellResult | None = None

    @property
    def is_usable(self) -> bool:
        """Whether it has numbers to show: the result is done, and may be stale."""
        return self.result is not None and self.result.status == "done" and bool(self.result.runs)

    @property
    def source(self) -> str:
        """The file of its result below the folder of results; empty if it has none."""
        return "" if self.result is None else f"{self.result.scale}/{self.result.experiment}/{self.result.cell}.json"


def agrees(coordinates: Coordinates, place: Coordinates) -> bool:
    """Whether coordinates have the values of a place on all of its axes; an axis that is lacking counts as empty."""
    return all(coordinates.get(axis, "") == value for axis, value in place.items())


def matches(cell: Cell, selection: Mapping[str, Coordinate | tuple[Coordinate, ...]]) -> bool:
    """Whether a cell matches a selection (values, patterns, or tuples of both) on all of its axes."""
    return all(axis in cell.coordinates and _is(cell.coordinates[axis], v) for axis, v in selection.items())


def _is(value: Coordinate, wanted: Coordinate | tuple[Coordinate, ...]) -> bool:
    if isinstance(wanted, tuple | list):
        return any(_is(value, one) for one in wanted)
    return fnmatchcase(str(value), wanted) if isinstance(wanted, str) else value == wanted


# Names ----------------------------------------------------------------------------------------------------


def place_of(cell: Cell, axes: Sequence[str]) -> Place:
    """The values of a cell on some axes; empty text where it lacks one."""
    return tuple(cell.coordinates.get(axis, "") for axis in axes)


def varying(axes: Sequence[str], cells: Sequence[Cell]) -> list[str]:
    """The axes on which cells differ."""
    return [axis for axis in axes if len({c.coordinates.get(axis) for c in cells}) > 1]


def label_of_cell(cell: Cell, axes: Sequence[str]) -> str:
    """The values of a cell on those axes that it has, as text."""
    return ", ".join(str(cell.coordinates[axis]) for axis in axes if axis in cell.coordinates)


def name_of(cell: Cell) -> str:
    """All values of a cell, as text."""
    return label_of_cell(cell, list(cell.coordinates))
