"""The part of a cell's result that is known so far, and the exception that ends a cell early."""

from __future__ import annotations

from dataclasses import dataclass, field

from zotune.bench.results.records import Chosen, RunRecord, Score, Trial
from zotune.bench.run.jobs import Outcome
from zotune.bench.spec.vocabulary import Status


class CellStopped(Exception):  # noqa: N818 - not an error of the program: the cell's result records how it ended
    """A cell cannot go on; `status` and `message` say how it ended and why."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


@dataclass
class PartialResult:
    """The parts of a cell's result, filled in job by job."""

    search: tuple[Trial, ...] = ()
    chosen: Chosen | None = None
    runs: list[RunRecord] = field(default_factory=list)
    baselines: dict[str, Score] = field(default_factory=dict)
    baseline_right: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def add_run(self, outcome: Outcome) -> None:
        """Add the run of a job that is done."""
        self.runs.append(RunRecord.model_validate(outcome.found["run"]))
        self.environment = outcome.found["environment"]
