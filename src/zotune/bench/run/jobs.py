"""Jobs: the single runs that cells consist of, each in a process of its own, each kept when it has ended well.

Cells of several tables share jobs (the plain method is the first row of three of them), and a cell that was interrupted
finds those of its jobs that had ended. A job is known by the hash of its options, code and libraries.
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
from typing import Any

from zotune.bench.results.records import Status
from zotune.bench.run.content_key import key_of
from zotune.bench.spec.experiments import Limits

# Where finished jobs and what jobs in progress write are kept, below a scale's results; nothing of it is a result.
JOBS = ".jobs"


@dataclass(frozen=True)
class Job:
    """What one process does.

    Attributes:
        does: the worker's name of it: train, evaluate, quality, ….
        options: JSON; all that its result depends on.
        limits: what it may take, on which its result does not depend.
    """

    does: str
    options: dict[str, Any]
    limits: Limits = field(default_factory=Limits)

    @cached_property
    def key(self) -> str:
        """The hash by which it is known."""
        return key_of({"does": self.does, **self.options})


@dataclass(frozen=True)
class Outcome:
    """How a job ended, and what it found (nothing unless it is done)."""

    status: Status
    message: str = ""
    found: dict[str, Any] = field(default_factory=dict)


# Runs a job in a folder of its own, which may hold what an interrupted attempt left.
Executor = Callable[[Job, Path], Outcome]


class Store:
    """The jobs of a scale, below a folder that several runners may share."""

    def __init__(self, folder: Path, executor: Executor, stopped: Callable[[], bool] = lambda: False) -> None:
        self._folder, self._executor, self._stopped = folder / JOBS, executor, stopped

    def __call__(self, job: Job) -> Outcome:
        """The outcome of a job: the one that is kept, or that of running it now. Only jobs that are done are kept.

        Raises:
            KeyboardInterrupt: the runner is to stop.
        """
        kept, work = self._folder / f"{job.key}.json", self._folder / job.key
        with self._alone(job.key):
            if kept.is_file():
                return Outcome("done", found=json.loads(kept.read_text(encoding="utf-8")))
            work.mkdir(parents=True, exist_ok=True)
            outcome = self._executor(job, work)
            if outcome.status == "done":
                aside = kept.with_suffix(f".{os.getpid()}")
                aside.write_text(json.dumps(outcome.found), encoding="utf-8")
                aside.replace(kept)
            # What an attempt left that was interrupted (which raised before this) or ran out of time serves the next.
            if outcome.status != "timed_out":
                shutil.rmtree(work, ignore_errors=True)
            return outcome

    @contextmanager
    def _alone(self, key: str) -> Iterator[None]:
        """Wait until no other runner, and no other cell of this one, is at the job."""
        with locked(self._folder / f"{key}.lock") as is_mine:
            while not is_mine():
                if self._stopped():
                    raise KeyboardInterrupt
                time.sleep(0.2)
            yield


@contextmanager
def locked(path: Path) -> Iterator[Callable[[], bool]]:
    """A function that tries to take a lock; it is given back when the context or the process ends, however it does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
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
