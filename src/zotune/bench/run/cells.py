"""The procedure for each kind of cell: which jobs it needs, and how their outcomes become a result."""

from __future__ import annotations

from collections.abc import Callable

from zotune.bench.run.accuracy_cells import accuracy
from zotune.bench.run.jobs import Job, Outcome
from zotune.bench.run.partial_result import CellStopped, PartialResult
from zotune.bench.spec.schema import CellSpec
from zotune.bench.spec.vocabulary import Kind

# Runs the jobs of a cell and fills in its result. Raises CellStopped if the cell cannot go on.
Procedure = Callable[[CellSpec, Callable[[Job], Outcome], PartialResult], None]


def each_seed(does: str) -> Procedure:
    """The procedure of cells without a search: one job for each seed."""

    def run_cell(spec: CellSpec, execute: Callable[[Job], Outcome], result: PartialResult) -> None:
        for seed in spec.seeds:
            outcome = execute(Job(does, {**spec.options, "seed": seed}, spec.limits))
            if outcome.status != "done":
                raise CellStopped(outcome.status, f"seed {seed}: {outcome.message}")
            result.add_run(outcome)

    return run_cell


KINDS: dict[Kind, Procedure] = {
    "accuracy": accuracy,
    "quality": each_seed("estimate"),
    **dict.fromkeys(("memory", "time", "theory"), each_seed("step")),
}
"""The procedure of every kind of cell by its name."""
