"""A section of the report: one experiment at a scale, its cells, and the table, figures and verdicts made from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from zotune.bench.report.choose_figures import figures
from zotune.bench.report.figures import Figure
from zotune.bench.results.cells import Cell
from zotune.bench.results.paper_numbers import paper_findings
from zotune.bench.results.passes import Race, races
from zotune.bench.results.published import Restated, restated
from zotune.bench.results.ranking import Ranking, rankings
from zotune.bench.results.records import read_result, result_path
from zotune.bench.results.tables import Table, table
from zotune.bench.results.verdicts import Finding, Verdict, adjusted, verdicts
from zotune.bench.run.runner import state_of
from zotune.bench.spec.resolve import cells, find
from zotune.bench.spec.schema import CellSpec, Experiment
from zotune.bench.spec.vocabulary import Scale


@dataclass(frozen=True)
class Section:
    """The report on one experiment.

    Attributes:
        on_paper: what the paper's own numbers say about each claim; None where it gives none.
        rankings: the methods of each column, the best first, where the layout asks for them.
        races: the methods of each place on their way to targets, where the experiment has targets.
        restated: what the methods' authors claim, judged in each place.
    """

    name: str
    scale: Scale
    experiment: Experiment
    cells: tuple[Cell, ...]
    table: Table
    figures: tuple[Figure, ...]
    verdicts: tuple[Verdict, ...]
    on_paper: tuple[Finding | None, ...]
    rankings: tuple[Ranking, ...]
    races: tuple[Race, ...] = ()
    restated: tuple[Restated, ...] = ()


def read_section(name: str, results: Path, scale: Scale, run_as: Callable[[CellSpec], CellSpec]) -> Section | None:
    """Read the results of an experiment and make its section; None if the experiment lacks the scale.

    Args:
        name: name of an experiment, or path of a TOML file.
        results: folder of the results.
        scale: the scale to report on.
        run_as: maps a cell of the experiment to the cell that was run, for instance with another source of data.

    Raises:
        UsageError: the experiment or one of its results cannot be read.
    """
    stem, experiment = find(name)
    if scale not in experiment.scale:
        return None
    every = [_read_cell(results, run_as(spec)) for spec in cells(stem, experiment, scale)]
    return make_section(stem, experiment, every, scale)


def _read_cell(results: Path, spec: CellSpec) -> Cell:
    result = read_result(result_path(results, spec.scale, spec.experiment, spec.name))
    return Cell(dict(spec.coordinates), state_of(results, spec), result)


def make_section(name: str, experiment: Experiment, cells: Sequence[Cell], scale: Scale = "cpu") -> Section:
    """Make the section of an experiment from its cells."""
    of_cells = table(name, experiment, cells)
    layout = experiment.layout
    return Section(
        name=name,
        scale=scale,
        experiment=experiment,
        cells=tuple(cells),
        table=of_cells,
        figures=tuple(figures(name, experiment, cells, of_cells)),
        verdicts=tuple(verdicts(experiment.claims, cells)),
        on_paper=tuple(paper_findings(experiment)),
        rankings=tuple(rankings(cells, layout.columns, layout.ranked)) if layout.ranked else (),
        races=() if experiment.passes is None else tuple(races(experiment.passes, cells)),
        restated=() if experiment.passes is None else tuple(restated(experiment.passes, cells)),
    )


def counted_together(sections: Sequence[Section]) -> list[Section]:
    """The sections of a report, whose verdicts are marked by whether they stay when all claims are counted."""
    every = iter(adjusted([verdict for section in sections for verdict in section.verdicts]))
    return [replace(section, verdicts=tuple(next(every) for _ in section.verdicts)) for section in sections]
