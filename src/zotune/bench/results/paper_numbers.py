"""The paper's numbers beside ours, and its claims judged by its own numbers."""

from __future__ import annotations

from collections.abc import Sequence

from zotune.bench.results.cells import Cell
from zotune.bench.results.quantities import Quantity, quantity
from zotune.bench.results.records import CellResult, RunRecord, Score
from zotune.bench.results.verdicts import Finding, finding_of_values
from zotune.bench.spec.schema import Experiment, PaperCell
from zotune.bench.spec.vocabulary import Coordinate

# From the paper's units to ours; its GB are GiB, since it gives 48 of them for the weights of OPT-13B.
_UNITS = {"%": "%", "GB": "GiB", "GiB": "GiB", "s": "s", "A100s": "", "": ""}


def paper_numbers(experiment: Experiment, cells: Sequence[Cell]) -> list[tuple[PaperCell, str]]:
    """The paper's numbers, each with a label, which names its values on axes where no cell of ours has them.

    These axes are left out of its coordinates, so that a table of another model shows the paper's numbers too and says
    which model they belong to.
    """
    numbers = list(experiment.paper_cells())
    ours: dict[str, set[Coordinate]] = {}
    for cell in cells:
        for axis, value in cell.coordinates.items():
            ours.setdefault(axis, set()).add(value)
    axes = {axis for p in numbers for axis in p.coordinates}
    theirs = {axis: {p.coordinates[axis] for p in numbers if axis in p.coordinates} for axis in axes}
    apart = {axis for axis, values in theirs.items() if not values & ours.get(axis, set())}
    return [
        (
            p.model_copy(update={"coordinates": {k: v for k, v in p.coordinates.items() if k not in apart}}),
            ", ".join(str(v) for k, v in p.coordinates.items() if k in apart),
        )
        for p in numbers
    ]


def in_our_unit(paper: PaperCell, q: Quantity) -> float | None:
    """The paper's number in the unit of a quantity; None if the units are not comparable."""
    return paper.value if _UNITS.get(paper.unit) == q.unit else None


def paper_findings(experiment: Experiment) -> list[Finding | None]:
    """Judge every claim of an experiment by the paper's own numbers, without regard to their errors.

    None for a claim whose cells the paper gives no numbers for.
    """
    cells = _paper_cells(experiment)
    return [finding_of_values(claim, cells) for claim in experiment.claims]


def _paper_cells(experiment: Experiment) -> list[Cell]:
    """The paper's numbers as cells of one run each; numbers of several quantities at one place are one cell."""
    places: dict[tuple[tuple[str, Coordinate], ...], dict[str, float]] = {}
    for number in experiment.paper_cells():
        q = quantity(number.metric)
        value = in_our_unit(number, q)
        if value is not None:
            places.setdefault(tuple(number.coordinates.items()), {})[number.metric] = value
    return [_cell(dict(place), values) for place, values in places.items()]


def _cell(coordinates: dict[str, Coordinate], values: dict[str, float]) -> Cell:
    score = Score(value=values["accuracy"] / 100, num_examples=1) if "accuracy" in values else None
    measured = {k: v * (2**30 if quantity(k).unit == "GiB" else 1) for k, v in values.items() if k != "accuracy"}
    run = RunRecord(seed=0, test=score, measured=measured)
    result = CellResult(
        experiment="paper",
        scale="paper",
        cell="--".join(map(str, coordinates.values())),
        coordinates=coordinates,
        kind="accuracy" if score else "memory",
        key="",
        status="done",
        config={},
        runs=(run,),
    )
    return Cell(coordinates, "done", result)
