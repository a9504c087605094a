"""The local executor: each job runs in a process whose time and memory are limited, and which ends with its runner.

A job whose time or memory is the result has a new process. The others are forked from a process that has imported the
libraries (`fork_server`).

The worker reads its job from a pipe and exits when the pipe closes, which happens when the runner ends in any way. The
memory limit applies to the resident memory of all processes of the worker's session; a limit on address space would
refuse memory that torch reserves and never touches.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from zotune.bench.keys.content_key import PACKAGE
from zotune.bench.run.fork_server import ForkedWorker, ForkServer
from zotune.bench.run.jobs import Job, Outcome
from zotune.errors import RunError
from zotune.system.child_python import python, python_path
from zotune.system.malloc import heap_environment

# Exit codes of the worker: it ran out of memory; it failed and printed the reason.
OUT_OF_MEMORY, FAILED = 3, 1
# Jobs whose time and memory are results of their own: what a server has imported must not count among them.
MEASURES_ITS_PROCESS = frozenset({"step"})
_WORKER = tuple(python("-m", "zotune.bench.run.worker"))
_SECONDS_BETWEEN_LOOKS = 0.5
_PAGE = os.sysconf("SC_PAGE_SIZE")


Worker = subprocess.Popen[bytes] | ForkedWorker


@dataclass(frozen=True)
class Process:
    """Runs jobs one after another.

    Attributes:
        stopped: returns whether the runner is stopping.
        environment: environment variables for the worker besides the runner's own.
        command: command line of the worker.
        source: source folder of another checkout whose code is run; without it, the worker refuses other code.
        forks: fork the workers of jobs that allow it. Not where there is a GPU: a process that has looked for GPUs must
            not be forked.
    """

    stopped: Callable[[], bool]
    environment: Mapping[str, str]
    command: tuple[str, ...] = _WORKER
    source: Path | None = None
    forks: bool = False

    def __call__(self, job: Job, folder: Path) -> Outcome:
        """Run a job in `folder`.

        Raises:
            KeyboardInterrupt: the runner is stopping; the files of the job stay.
        """
        found, log = folder / "found.json", folder / "log.txt"
        found.unlink(missing_ok=True)
        of_job = {"does": job.does, "options": job.options, **({} if self.source else {"key": job.key})}
        try:
            worker = self._start({**of_job, "folder": str(folder), "gib": job.limits.gib}, job.environment, log)
        except RunError as error:
            return Outcome("failed", str(error))
        try:
            over = self._watch(worker, job)
        finally:
            _end(worker)
        return over or _outcome(worker.returncode, found, log)

    def _start(self, line: dict[str, Any], environment: Mapping[str, str], log: Path) -> Worker:
        if self.forks and not environment and line["does"] not in MEASURES_ITS_PROCESS:
            return self._server.start(line, log)
        with log.open("ab") as output:
            worker = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=self._variables(environment),
            )
        assert worker.stdin is not None
        _send(worker.stdin, json.dumps(line) + "\n")
        return worker

    @cached_property
    def _server(self) -> ForkServer:
        return ForkServer((*self.command, "--fork"), self._variables({}))

    def _variables(self, environment: Mapping[str, str]) -> dict[str, str]:
        # The worker imports the same package as this process, installed or not.
        path = python_path(self.source or PACKAGE.parent)
        return {**os.environ, **heap_environment(), "PYTHONPATH": path, **self.environment, **environment}

    def _watch(self, worker: Worker, job: Job) -> Outcome | None:
        """Wait for the worker's end; return the outcome if a limit ended it, else None."""
        until = time.monotonic() + 60 * job.limits.minutes
        most = None if job.limits.gib is None else job.limits.gib * 2**30
        while True:
            try:
                worker.wait(_SECONDS_BETWEEN_LOOKS)
                return None
            except subprocess.TimeoutExpired:
                pass
            if self.stopped():
                raise KeyboardInterrupt
            if time.monotonic() > until:
                return Outcome("timed_out", f"it took more than {job.limits.minutes:g} minutes")
            if most is not None and (resident := resident_bytes(worker.pid)) > most:
                return Outcome("out_of_memory", f"it took {resident / 2**30:.2f} GiB of {job.limits.gib:g}")


def resident_bytes(session: int) -> int:
    """Resident bytes of all processes of a session; 0 on systems without /proc."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # Behind the name, which may hold blanks and brackets: state, parent, group, session, …; 22nd: pages.
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session:
            total += int(fields[21]) * _PAGE
    return total


def _send(pipe: IO[bytes], line: str) -> None:
    with suppress(BrokenPipeError):  # the worker has exited already; its exit code says why
        pipe.write(line.encode())
        pipe.flush()


def _end(worker: Worker) -> None:
    """Kill the worker and all processes that it started."""
    with suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    if worker.returncode is None:
        # A worker that has just been forked has no session yet.
        with suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    if worker.stdin is not None:
        with suppress(BrokenPipeError):
            worker.stdin.close()


def _outcome(code: int | None, found: Path, log: Path) -> Outcome:
    if code == 0 and found.is_file():
        return Outcome("done", found=json.loads(found.read_text(encoding="utf-8")))
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it printed no message"]
    if code == OUT_OF_MEMORY:
        return Outcome("out_of_memory", lines[-1])
    if code == -signal.SIGKILL:
        return Outcome("out_of_memory", "it was killed, as the system does when memory runs out")
    return Outcome("failed", lines[-1] if code == FAILED else f"exit code {code}: {lines[-1]}")
