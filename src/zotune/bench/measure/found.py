"""What a cell has found so far, and how it stops where it cannot go on."""

from __future__ import annotations

from dataclasses import dataclass, field

from zotune.bench.results.records import Chosen, RunRecord, Score, Status, Trial
from zotune.bench.run.jobs import Outcome


class Stopped(Exception):  # noqa: N818 - not an error of the program: a cell that ended otherwise than well
    """A cell cannot go on: how it ended, and why."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


@dataclass
class Found:
    """The parts of a result, as they come."""

    search: tuple[Trial, ...] = ()
    chosen: Chosen | None = None
    runs: list[RunRecord] = field(default_factory=list)
    baselines: dict[str, Score] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def add(self, outcome: Outcome) -> None:
        """A job that made a run has ended well."""
        self.runs.append(RunRecord.model_validate(outcome.found["run"]))
        self.environment = outcome.found["environment"]
