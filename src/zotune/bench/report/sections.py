"""A section of the report: one experiment at a scale, its cells as they stand, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from zotune.bench.report.choose_figures import figures
from zotune.bench.report.figures import Figure
from zotune.bench.results.records import Scale, read_result, result_path
from zotune.bench.results.tables import Cell, Table, table
from zotune.bench.results.verdicts import Verdict, verdicts
from zotune.bench.run.runner import state_of
from zotune.bench.spec.experiments import CellSpec, Experiment, cells, find


@dataclass(frozen=True)
class Section:
    """One experiment."""

    name: str
    experiment: Experiment
    cells: tuple[Cell, ...]
    table: Table
    figures: tuple[Figure, ...]
    verdicts: tuple[Verdict, ...]


def section(name: str, results: Path, scale: Scale, run_as: Callable[[CellSpec], CellSpec]) -> Section | None:
    """The section on an experiment; None where it has no such scale.

    Raises:
        UsageError: the experiment or one of its results cannot be read.
    """
    stem, experiment = find(name)
    if scale not in experiment.scale:
        return None
    found = [_as_it_stands(results, run_as(spec)) for spec in cells(stem, experiment, scale)]
    return assembled(stem, experiment, found)


def _as_it_stands(results: Path, spec: CellSpec) -> Cell:
    found = read_result(result_path(results, spec.scale, spec.experiment, spec.name))
    return Cell(dict(spec.coordinates), state_of(results, spec), found)


def assembled(name: str, experiment: Experiment, found: Sequence[Cell]) -> Section:
    """The section that follows from cells."""
    shown = table(name, experiment, found)
    return Section(
        name=name,
        experiment=experiment,
        cells=tuple(found),
        table=shown,
        figures=tuple(figures(name, experiment, found, shown)),
        verdicts=tuple(verdicts(experiment.claims, found)),
    )
