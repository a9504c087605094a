"""Jobs: the single runs that cells consist of, each in a process of its own; the outcome of a finished job is cached.

Cells of several tables share jobs (the plain method is the first row of three tables), and a cell that was interrupted
reuses its finished jobs. The key of a job is a hash of its options, the code and the libraries.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from zotune.bench.keys.content_key import key_of
from zotune.bench.spec.schema import Limits
from zotune.bench.spec.vocabulary import Status
from zotune.system.atomic_write import atomic_write

# The folder of cached outcomes and of files of jobs in progress, below a scale's results; it holds no results.
JOBS = ".jobs"
# A full run with one seed; a trial of the search; a few steps that test whether a batch fits; the untuned model.
Role = Literal["run", "trial", "probe", "baseline"]


@dataclass(frozen=True)
class Job:
    """The work of one process.

    Attributes:
        does: name of the work: train, evaluate, estimate or step.
        options: JSON values; everything that the outcome depends on.
        limits: time and memory, on which the outcome does not depend.
        role: purpose of the job in its cell, on which the outcome does not depend.
        environment: environment variables of the job's process, such as the number of threads.
    """

    does: str
    options: dict[str, Any]
    limits: Limits = field(default_factory=Limits)
    role: Role = field(default="run", compare=False)
    environment: dict[str, str] = field(default_factory=dict, compare=False)

    @cached_property
    def key(self) -> str:
        """The content key, under which the outcome is cached."""
        return key_of({"does": self.does, **self.options})


@dataclass(frozen=True)
class Outcome:
    """How a job ended; `found` holds its results as JSON values and is empty unless the job is done."""

    status: Status
    message: str = ""
    found: dict[str, Any] = field(default_factory=dict)


# Runs a job in a folder of its own, which may hold files of an interrupted attempt.
Executor = Callable[[Job, Path], Outcome]


class Store:
    """The cache of a scale's jobs, in a folder that several runners may share."""

    def __init__(self, folder: Path, executor: Executor, stopped: Callable[[], bool] = lambda: False) -> None:
        self._folder, self._executor, self._stopped = folder / JOBS, executor, stopped

    def __call__(self, job: Job) -> Outcome:
        """Return the cached outcome of a job, or run the job; only outcomes of jobs that are done are cached.

        Raises:
            KeyboardInterrupt: the runner is stopping.
        """
        cached, work = self._folder / f"{job.key}.json", self._folder / job.key
        with self._alone(job.key):
            if (found := _cached(cached)) is not None:
                # A runner that was killed here has left the job's files.
                shutil.rmtree(work, ignore_errors=True)
                return Outcome("done", found=found)
            work.mkdir(parents=True, exist_ok=True)
            outcome = self._executor(job, work)
            if outcome.status == "done":
                with atomic_write(cached) as temporary:
                    temporary.write_text(json.dumps(outcome.found), encoding="utf-8")
            # An attempt that was interrupted (it raised above) or timed out leaves its files, and the next resumes it.
            if outcome.status != "timed_out":
                shutil.rmtree(work, ignore_errors=True)
            return outcome

    @contextmanager
    def _alone(self, key: str) -> Iterator[None]:
        """Wait for the lock of a job, which another runner or another cell of this runner may hold."""
        with locked(self._folder / f"{key}.lock") as is_mine:
            while not is_mine():
                if self._stopped():
                    raise KeyboardInterrupt
                time.sleep(0.2)
            yield


def _cached(path: Path) -> dict[str, Any] | None:
    """Return the results of a job in a file; None without one, and of a damaged one, whose job is run again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found else None


@contextmanager
def locked(path: Path) -> Iterator[Callable[[], bool]]:
    """Yield a function that tries to take a file lock; the lock is released when the context or the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:

        def try_lock() -> bool:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

        yield try_lock
    finally:
        os.close(handle)
