"""A run that writes nothing: what takes the place of its output folder, its metrics file and its journal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from zotune.ledger import StepRecord
from zotune.llm.config.run import TrainConfig
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.output.metrics_log import Line, MetricsLog, line_key
from zotune.llm.output.model_files import whole_state
from zotune.llm.output.output_folder import OutputFolder
from zotune.llm.scoring.accuracy import Evaluation
from zotune.llm.training.counters import Counters
from zotune.model.streaming import settle
from zotune.system.processes import Processes


class MetricsInMemory:
    """The metrics of a run as a list; see `MetricsLog`.

    Attributes:
        earlier: the lines of an earlier part of the run, which the process that writes has read.
    """

    has_lines = False

    def __init__(self) -> None:
        self.earlier: tuple[Line, ...] = ()
        self._lines: list[Line] = []

    def append(self, record: Mapping[str, Any]) -> None:
        """Append a line, unless an earlier part of the run has it."""
        if line_key(record) not in map(line_key, self.earlier):
            self._lines.append(dict(record))

    def evaluation(self, step: int) -> Line | None:
        """Return the held-out evaluation at a step by an earlier part of the run, or None."""
        return next((line["dev"] for line in self.earlier if line_key(line) == (step, True)), None)

    def lines(self) -> list[Line]:
        """Return all lines in order."""
        return [*self.earlier, *self._lines]


class MemoryOutput:
    """The output of a run without a folder, which keeps its metrics and leaves the model to its owner.

    It has the names of `OutputFolder` that a run uses.

    Attributes:
        scratch: the folder for large copies of weights; None: they are in memory.
    """

    path = None
    scratch: Path | None = None
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
        """Bring streamed weights up to date; all others are in memory."""
        settle(lm.module)

    def finish(self, results: dict[str, Any], config: TrainConfig, lm: LanguageModel, test: Evaluation | None) -> None:
        """Do nothing: the results are returned."""

    def close(self) -> None:
        """Do nothing: nothing is locked."""


class FollowerOutput(MemoryOutput):
    """The output of a process beside the one that writes the run's folder.

    Args:
        folder: the run's folder, if this machine sees it: large copies of weights go to files without a name in it.
        is_resumed: whether that one resumes a run.
    """

    def __init__(self, folder: Path, *, is_resumed: bool) -> None:
        super().__init__()
        self.scratch = folder if folder.is_dir() else None
        self.is_resumed = is_resumed

    def save_model(self, lm: LanguageModel) -> None:
        """Take part in gathering a model in shards, which another process writes."""
        whole_state(lm)


Output = OutputFolder | MemoryOutput
Metrics = MetricsLog | MetricsInMemory


def open_output(config: TrainConfig, processes: Processes) -> Output:
    """Open the folder of a run in the first of its processes, and an output in memory in the others.

    Raises:
        UsageError: as `OutputFolder`, in all processes.
    """
    folders: list[OutputFolder] = []

    def opened() -> bool:
        folders.append(OutputFolder(config))
        return folders[0].is_resumed

    is_resumed = processes.first(opened)
    return folders[0] if folders else FollowerOutput(config.output_dir, is_resumed=is_resumed)


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
