"""The runner: cells of any experiments, several at a time, until all are done or it is told to stop.

A cell's result is written when the cell has ended. Its key settles whether it is of today's config and code: a result
with another key is stale, is never taken for the cell's, and is found again. What failed is tried again by the next
call. Runners over one folder share the work: each cell and each job is one's at a time.
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
from typing import Literal, Protocol

from zotune.bench.measure.found import Found, Stopped
from zotune.bench.results.records import CellResult, read_result, result_path, write_result
from zotune.bench.run.content_key import key_of
from zotune.bench.run.jobs import JOBS, Executor, Store, locked
from zotune.bench.spec.experiments import CellSpec

State = Literal["missing", "done", "stale", "failed", "timed_out", "out_of_memory"]
_SECONDS_BETWEEN_TRIES = 0.5


def key_of_cell(spec: CellSpec) -> str:
    """The content key of a cell: what it runs, not what it is called nor what it may take."""
    searched = {"search", "budget"} if spec.kind == "accuracy" else set()
    config = spec.model_dump(mode="json", include={"kind", "seeds", *searched})
    return key_of({**config, **spec.options})


def state_of(results: Path, spec: CellSpec) -> State:
    """How a cell stands in a folder of results."""
    found = read_result(result_path(results, spec.scale, spec.experiment, spec.name))
    if found is None:
        return "missing"
    return "stale" if found.key != key_of_cell(spec) else found.status


def find_cell(spec: CellSpec, store: Store) -> CellResult:
    """Run a cell: its result, however it ended.

    Raises:
        KeyboardInterrupt: the runner is to stop.
    """
    from zotune.bench.measure.kinds import KINDS

    found, ended = Found(), Stopped("done", "")
    try:
        KINDS[spec.kind](spec, store, found)
    except Stopped as stopped:
        ended = stopped
    return CellResult(
        **spec.model_dump(include={"experiment", "scale", "coordinates", "kind"}),
        cell=spec.name,
        key=key_of_cell(spec),
        status=ended.status,
        message=ended.message,
        config=spec.model_dump(mode="json", include={"options", "search", "budget", "seeds"}),
        search=found.search,
        chosen=found.chosen,
        runs=tuple(found.runs),
        baselines=found.baselines,
        environment=found.environment,
        commit=commit(),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


class Display(Protocol):
    """Shows what the runner does; called from its threads, one at a time."""

    def began(self, spec: CellSpec) -> None:
        """A cell is being run."""

    def ended(self, spec: CellSpec, state: State, message: str) -> None:
        """It has ended, or was found done."""


@dataclass
class Runner:
    """Runs cells.

    Attributes:
        results: where results are kept.
        slots: one executor for each cell that runs at a time.
        stop: set by whoever wants it to end; the cells in progress end where they stand.
        keeps_stale: leave results with another key as they are.
    """

    results: Path
    slots: Sequence[Executor]
    stop: threading.Event
    display: Display
    keeps_stale: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, specs: Sequence[CellSpec]) -> dict[str, State]:
        """Run all cells that are not done; the state of each by path, of those alone that there was time for."""
        waiting, states = deque(specs), dict[str, State]()
        threads = [threading.Thread(target=self._work, args=(slot, waiting, states)) for slot in self.slots]
        self._error: BaseException | None = None
        for thread in threads:
            thread.start()
        for thread in threads:
            # A thread is joined in pieces, so that signals reach the main one.
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
                else:  # another runner is at it
                    waiting.append(spec)
                    self.stop.wait(_SECONDS_BETWEEN_TRIES)
        except KeyboardInterrupt:
            self.stop.set()
        except BaseException as error:
            self._error = self._error or error
            self.stop.set()

    def _one(self, spec: CellSpec, slot: Executor) -> State | None:
        """Run a cell unless it is done; None where another runner has it."""
        scale = self.results / spec.scale
        with locked(scale / JOBS / f"{spec.experiment}--{spec.name}.lock") as is_mine:
            if not is_mine():
                return None
            state = state_of(self.results, spec)
            if state == "done" or (state == "stale" and self.keeps_stale):
                self._show(lambda: self.display.ended(spec, state, ""))
                return state
            self._show(lambda: self.display.began(spec))
            result = find_cell(spec, Store(scale, slot, self.stop.is_set))
            write_result(self.results, result)
            self._show(lambda: self.display.ended(spec, result.status, result.message))
            return result.status

    def _show(self, show: Callable[[], None]) -> None:
        with self._lock:
            show()


@cache
def commit() -> str:
    """The commit of the code, with a + where it was changed since; "unknown" where it is not a checkout."""
    here = Path(__file__).parent

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return "unknown"
    return f"{git('rev-parse', 'HEAD')}{'+' if git('status', '--porcelain', '--', str(here.parents[1])) else ''}"
