"""What a cell is about: for each kind, the schema of its options and what finds it, job by job."""

from __future__ import annotations

from collections.abc import Callable

from zotune.bench.measure.accuracy import accuracy
from zotune.bench.measure.found import Found, Stopped
from zotune.bench.results.records import Kind
from zotune.bench.run.jobs import Job, Outcome
from zotune.bench.spec.experiments import CellSpec

# Finds a cell: runs its jobs, puts what they found where it is kept as it comes. Raises Stopped where it cannot go on.
Find = Callable[[CellSpec, Callable[[Job], Outcome], Found], None]


def each_seed(does: str) -> Find:
    """One job a seed, and nothing to choose."""

    def find(spec: CellSpec, execute: Callable[[Job], Outcome], found: Found) -> None:
        for seed in spec.seeds:
            outcome = execute(Job(does, {**spec.options, "seed": seed}, spec.limits))
            if outcome.status != "done":
                raise Stopped(outcome.status, f"seed {seed}: {outcome.message}")
            found.add(outcome)

    return find


KINDS: dict[Kind, Find] = {
    "accuracy": accuracy,
    "quality": each_seed("estimate"),
    **dict.fromkeys(("memory", "time", "theory"), each_seed("step")),
}
"""Every kind of cell by name."""
