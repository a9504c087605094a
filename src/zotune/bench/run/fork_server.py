"""Workers that are forked from a process which has imported the libraries, so that a job starts in milliseconds.

The imports take some four seconds of a processor, of jobs that often take ten. Each executor has a server of its own:
a process that imports, computes nothing (threads of a computation would not survive a fork), and forks for one job at a
time. It writes the process number of each worker and later its exit code. A worker is a session of its own, as one that
is started anew is; both end with the runner.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from zotune.errors import RunError

# The exit code of a worker whose server ended before it: that of a process which was killed.
_LOST = -9


class ForkServer:
    """A process of which copies do jobs; it starts with the first.

    Args:
        command: command line that runs `serve`.
        environment: all environment variables of the process.
    """

    def __init__(self, command: tuple[str, ...], environment: Mapping[str, str]) -> None:
        self._command, self._environment = command, environment
        self._server: subprocess.Popen[bytes] | None = None

    def start(self, job: Mapping[str, Any], log: Path) -> ForkedWorker:
        """Start a worker.

        Args:
            job: the worker's job, JSON values.
            log: file to which the worker's output is appended.

        Raises:
            RunError: the server does not start, or ended.
        """
        if self._server is None or self._server.poll() is not None:
            self._server = _started(self._command, self._environment)
            weakref.finalize(self, _end, self._server)
        return ForkedWorker(self._server, job, log)


class ForkedWorker:
    """A worker, with the part of `subprocess.Popen` that the runner uses.

    Attributes:
        pid: number of the process, which leads a session.
        returncode: exit code; negative for a signal; None until it is known.
    """

    stdin = None

    def __init__(self, server: subprocess.Popen[bytes], job: Mapping[str, Any], log: Path) -> None:
        assert server.stdin is not None
        assert server.stdout is not None
        self._answers = server.stdout
        self.returncode: int | None = None
        try:
            server.stdin.write(json.dumps({"job": dict(job), "log": str(log)}).encode() + b"\n")
            self.pid = int(self._answers.readline())
        except (BrokenPipeError, ValueError):
            code = server.wait()
            raise RunError(f"the process that starts the benchmark's workers ended (exit code {code})") from None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the worker's end.

        Raises:
            subprocess.TimeoutExpired: it did not end within `timeout` seconds.
        """
        if self.returncode is None:
            if not select.select([self._answers], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("the worker", timeout or 0.0)
            self.returncode = int(self._answers.readline() or _LOST)
        return self.returncode


def serve(work: Callable[[Mapping[str, Any]], int]) -> int:
    """Fork a worker for each job that is read from standard input, until it ends.

    Args:
        work: does a job in the worker; returns the worker's exit code.

    Returns:
        The exit code, of the server or of a worker: each returns from here.
    """
    with os.fdopen(os.dup(0), encoding="utf-8") as lines:
        for line in iter(lines.readline, ""):
            asked = json.loads(line)
            worker = os.fork()
            if not worker:
                os.setsid()
                _write_to(asked["log"])
                return work(asked["job"])
            _answer(worker)
            _answer(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]))
    return 0


def _answer(number: int) -> None:
    os.write(1, b"%d\n" % number)


def _write_to(log: str) -> None:
    """Let this process's output go to a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def _started(command: tuple[str, ...], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    # A session of its own: the runner answers Ctrl-C, and ends the workers itself.
    return subprocess.Popen(
        command,
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=dict(environment),
    )


def _end(server: subprocess.Popen[bytes]) -> None:
    """End a server: it ends with its input."""
    for pipe in (server.stdin, server.stdout):
        if pipe is not None:
            pipe.close()
    until = time.monotonic() + 10
    while server.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    server.kill()
    server.wait()
