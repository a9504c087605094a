"""A run that writes nothing: what takes the place of its output folder, its metrics file and its journal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from zotune.ledger import StepRecord
from zotune.llm.config.run import TrainConfig
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.output.metrics_log import Line, MetricsLog
from zotune.llm.output.output_folder import OutputFolder
from zotune.llm.scoring.accuracy import Evaluation
from zotune.llm.training.counters import Counters


class MetricsInMemory:
    """The metrics of a run as a list; see `MetricsLog`."""

    has_lines = False
    earlier: tuple[Line, ...] = ()

    def __init__(self) -> None:
        self._lines: list[Line] = []

    def truncate(self, num_steps: int) -> float:
        """Do nothing: no run in memory is resumed."""
        return 0.0

    def append(self, record: Mapping[str, Any]) -> None:
        """Append a line."""
        self._lines.append(dict(record))

    def evaluation(self, step: int) -> Line | None:
        """Return None: there is no earlier part of the run."""
        return None

    def sync(self) -> None:
        """Do nothing."""

    def lines(self) -> list[Line]:
        """Return all lines in order."""
        return list(self._lines)


class MemoryOutput:
    """The output of a run without a folder, which keeps its metrics and leaves the model to its owner.

    It has the names of `OutputFolder` that a run uses.
    """

    path = None
    is_resumed = False

    def __init__(self) -> None:
        self.metrics = MetricsInMemory()

    def begin(self) -> None:
        """Do nothing: there is no folder to prepare."""

    def record_search(self, config: TrainConfig, search: dict[str, Any]) -> None:
        """Do nothing: the search was shown."""

    def check_free_space(self, lm: LanguageModel) -> None:
        """Do nothing: no room is needed."""

    def save_model(self, lm: LanguageModel) -> None:
        """Do nothing: the model is in memory."""

    def finish(self, results: dict[str, Any], config: TrainConfig, lm: LanguageModel, test: Evaluation | None) -> None:
        """Do nothing: the results are returned."""

    def close(self) -> None:
        """Do nothing: nothing is locked."""


Output = OutputFolder | MemoryOutput
Metrics = MetricsLog | MetricsInMemory


class NoJournal:
    """The journal of a run that is neither recorded nor resumed; see `Journal`."""

    has_ledger = was_stopped = False

    def check(self) -> None:
        """Do nothing: there is nothing that the run would have to agree with."""

    def restore(self, counters: Counters, note: Callable[[StepRecord], None]) -> None:
        """Do nothing: there is no earlier part of the run."""

    def save(self, counters: Counters) -> None:
        """Do nothing: without a folder there are no checkpoints."""

    def close(self) -> None:
        """Do nothing: no file is open."""
