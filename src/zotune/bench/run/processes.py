"""A job in a process of its own: watched for time and memory, ended with all that it started and with its runner.

The worker reads its job from a pipe and listens to its end: when the runner dies, however it does, the pipe closes and
the worker leaves. Memory is what the processes of its session hold resident; a limit on address space would refuse what
torch reserves and never touches.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from zotune.bench.run.jobs import Job, Outcome
from zotune.system.malloc import heap_environment

# The worker's own exit codes: it ran out of memory; it failed and said why.
OUT_OF_MEMORY, FAILED = 3, 1
_SECONDS_BETWEEN_LOOKS = 0.1
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Process:
    """Runs jobs, one after the other; `stopped` says that the runner is to end.

    Attributes:
        environment: variables for the worker beside the runner's own.
        command: what the worker is.
    """

    stopped: Callable[[], bool]
    environment: Mapping[str, str]
    command: tuple[str, ...] = (sys.executable, "-m", "zotune.bench.run.worker")

    def __call__(self, job: Job, folder: Path) -> Outcome:
        """Run a job in `folder`.

        Raises:
            KeyboardInterrupt: the runner is to stop; what the job has written stays.
        """
        found, log = folder / "found.json", folder / "log.txt"
        found.unlink(missing_ok=True)
        with log.open("ab") as said:
            worker = self._start(said)
            try:
                assert worker.stdin is not None
                of_job = {"does": job.does, "options": job.options, "key": job.key}
                _send(worker.stdin, json.dumps({**of_job, "folder": str(folder), "gib": job.limits.gib}) + "\n")
                over = self._watch(worker, job)
            finally:
                _end(worker)
        return over or _outcome(worker.returncode, found, log)

    def _start(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        # The worker finds the package where this one was found, installed or not.
        source = str(Path(__file__).parents[3])
        path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
        return subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, **heap_environment(), "PYTHONPATH": path, **self.environment},
        )

    def _watch(self, worker: subprocess.Popen[bytes], job: Job) -> Outcome | None:
        """Wait for the worker's end; the outcome if it was a limit's doing."""
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
            if most is not None and (taken := resident_bytes(worker.pid)) > most:
                return Outcome("out_of_memory", f"it took {taken / 2**30:.2f} GiB of {job.limits.gib:g}")


def resident_bytes(session: int) -> int:
    """Bytes that the processes of a session hold in memory; 0 where there is no /proc."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # After the name, which may hold blanks and brackets, come state, parent, group, session; 24th: pages.
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session:
            total += int(fields[21]) * _PAGE
    return total


def _send(pipe: IO[bytes], line: str) -> None:
    with suppress(BrokenPipeError):  # it is gone already; its exit code says why
        pipe.write(line.encode())
        pipe.flush()


def _end(worker: subprocess.Popen[bytes]) -> None:
    """End the worker and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    if worker.stdin is not None:
        with suppress(BrokenPipeError):
            worker.stdin.close()


def _outcome(code: int, found: Path, log: Path) -> Outcome:
    if code == 0 and found.is_file():
        return Outcome("done", found=json.loads(found.read_text(encoding="utf-8")))
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
    if code == OUT_OF_MEMORY:
        return Outcome("out_of_memory", lines[-1])
    if code == -signal.SIGKILL:
        return Outcome("out_of_memory", "it was killed, as the system does where memory runs out")
    return Outcome("failed", lines[-1] if code == FAILED else f"exit code {code}: {lines[-1]}")
