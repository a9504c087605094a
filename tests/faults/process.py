"""A child process that runs the command line: it is forked from this one, which has imported everything already."""

import os
import resource
import signal
import sys
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from zotune.cli import main as cli

# Bytes of address space that a child may take besides what it inherits.
MEMORY = 3 << 30
SECONDS = 120


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        code: its exit code, or minus the signal that ended it.
        said: what it printed, both streams.
        writes: how many system calls changed files, if they were counted.
    """

    code: int
    said: str
    writes: int = 0

    @property
    def was_killed(self):
        return self.code == -signal.SIGKILL


def fork(work, log):
    """A child that does `work` and exits with what that returns; its id. Both its streams go to a file."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        to = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(to, 1)
        os.dup2(to, 2)
        os.close(to)
        # What captures the streams of this process has files of its own, which are not the child's.
        sys.stdout, sys.stderr = (open(fd, "w", buffering=1, encoding="utf-8", closefd=False) for fd in (1, 2))  # noqa: SIM115
        code = work()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code or 0)


def begin(args, log, prepare=lambda: None):
    """A child that runs the command line; its id."""

    def work():
        limit_memory()
        prepare()
        return cli.run([str(arg) for arg in args])

    return fork(work, log)


def end(pid, log, seconds=SECONDS):
    """Wait for a child's end; one that takes too long is killed, and that is an error."""
    with within(seconds, pid, log):
        status = os.waitpid(pid, 0)[1]
    return Ended(os.waitstatus_to_exitcode(status), said(log))


@contextmanager
def within(seconds, pid, log):
    """Kill a child that takes longer, and fail."""

    def stop(*_):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise AssertionError(f"it did not end within {seconds} s: {said(log)[-2000:]}")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(args, log, prepare=lambda: None):
    """Run the command line to its end."""
    return end(begin(args, log, prepare), log)


def said(log):
    return Path(log).read_text(encoding="utf-8", errors="replace")


def limit_memory(more=MEMORY):
    """Limit this process to `more` bytes besides what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").is_file() else None
    if pages is not None:
        limit = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
