"""The runner: it runs the cells of any experiments, several at a time, until all are done or it is stopped.

The result of a cell is written when the cell has ended. A result whose key differs from the cell's key today (config,
code or libraries changed) is stale; the runner does not use it and runs the cell again. The next call retries cells
that failed. Several runners may share a folder of results: locks give each cell and each job to one of them at a time.
"""

from __future__ import annotations

import subprocess
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Protocol

from zotune.bench.keys.content_key import PACKAGE, key_of
from zotune.bench.results.records import CellResult, read_result, result_path, write_result
from zotune.bench.run.jobs import JOBS, Executor, Store, locked
from zotune.bench.run.partial_result import CellStopped, PartialResult
from zotune.bench.spec.schema import CellSpec
from zotune.bench.spec.vocabulary import State

_SECONDS_BETWEEN_TRIES = 0.5


def key_of_cell(spec: CellSpec) -> str:
    """The content key of a cell, from everything that its result depends on; its name and limits do not count."""
    searched = {"search", "budget"} if spec.kind == "accuracy" else set()
    config = spec.model_dump(mode="json", include={"kind", "seeds", *searched})
    return key_of({**config, **spec.options})


def state_of(results: Path, spec: CellSpec) -> State:
    """The state of a cell in a folder of results."""
    result = read_result(result_path(results, spec.scale, spec.experiment, spec.name))
    if result is None:
        return "missing"
    return "stale" if result.key != key_of_cell(spec) else result.status


def lock_of(results: Path, spec: CellSpec) -> Path:
    """The lock file of a cell; only the holder of its lock may write the cell's result."""
    return results / spec.scale / JOBS / f"{spec.experiment}--{spec.name}.lock"


def find_cell(spec: CellSpec, store: Store) -> CellResult:
    """Run a cell and return its result, also if it failed.

    Raises:
        KeyboardInterrupt: the runner is stopping.
    """
    from zotune.bench.run.cells import KINDS

    partial, ended = PartialResult(), CellStopped("done", "")
    try:
        KINDS[spec.kind](spec, store, partial)
    except CellStopped as stopped:
        ended = stopped
    return CellResult(
        **spec.model_dump(include={"experiment", "scale", "coordinates", "kind"}),
        cell=spec.name,
        key=key_of_cell(spec),
        status=ended.status,
        message=ended.message,
        config=spec.model_dump(mode="json", include={"options", "search", "budget", "seeds"}),
        search=partial.search,
        chosen=partial.chosen,
        runs=tuple(partial.runs),
        baselines=partial.baselines,
        baseline_right=partial.baseline_right,
        environment=partial.environment,
        commit=commit(),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


class Display(Protocol):
    """Shows the runner's progress; its methods are called from the runner's threads, one at a time."""

    def began(self, spec: CellSpec) -> None:
        """Show that a cell has started."""

    def ended(self, spec: CellSpec, state: State, message: str) -> None:
        """Show that a cell has ended, or that it was already done."""


@dataclass
class Runner:
    """Runs cells.

    Attributes:
        results: folder of the results.
        slots: the executors; each runs one cell at a time.
        stop: an event that stops the runner when it is set; cells in progress are interrupted.
        keeps_stale: keep stale results instead of running their cells again.
    """

    results: Path
    slots: Sequence[Executor]
    stop: threading.Event
    display: Display
    keeps_stale: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, specs: Sequence[CellSpec]) -> dict[str, State]:
        """Run all cells that are not done.

        Returns:
            The state of each cell by its path; cells that were not reached before a stop are left out.
        """
        waiting, states = deque(specs), dict[str, State]()
        threads = [threading.Thread(target=self._work, args=(slot, waiting, states)) for slot in self.slots]
        self._error: BaseException | None = None
        for thread in threads:
            thread.start()
        for thread in threads:
            # Joined with a timeout, so that the main thread receives signals.
            while thread.is_alive():
                thread.join(0.2)
        if self._error is not None:
            raise self._error
        return states

    def _work(self, slot: Executor, waiting: deque[CellSpec], states: dict[str, State]) -> None:
        try:
            while not self.stop.is_set():
                try:
                    spec = waiting.popleft()
                except IndexError:
                    return
                state = self._one(spec, slot)
                if state is not None:
                    states[spec.path] = state
                else:  # another runner works on it
                    waiting.append(spec)
                    self.stop.wait(_SECONDS_BETWEEN_TRIES)
        except KeyboardInterrupt:
            self.stop.set()
        except BaseException as error:
            self._error = self._error or error
            self.stop.set()

    def _one(self, spec: CellSpec, slot: Executor) -> State | None:
        """Run a cell unless it is done; None if another runner holds its lock."""
        with locked(lock_of(self.results, spec)) as is_mine:
            if not is_mine():
                return None
            state = state_of(self.results, spec)
            if state == "done" or (state == "stale" and self.keeps_stale):
                self._show(lambda: self.display.ended(spec, state, ""))
                return state
            self._show(lambda: self.display.began(spec))
            result = find_cell(spec, Store(self.results / spec.scale, slot, self.stop.is_set))
            write_result(self.results, result)
            self._show(lambda: self.display.ended(spec, result.status, result.message))
            return result.status

    def _show(self, show: Callable[[], None]) -> None:
        with self._lock:
            show()


@cache
def commit(package: Path = PACKAGE) -> str:
    """The commit of a package's code, with a + if it has uncommitted changes; "unknown" outside a checkout."""

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", *args], cwd=package, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return "unknown"
    return f"{git('rev-parse', 'HEAD')}{'+' if git('status', '--porcelain', '--', '.') else ''}"
