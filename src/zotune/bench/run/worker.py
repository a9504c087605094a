"""The worker process of one job: it reads the job as a line of JSON, does it, and writes the results as JSON.

The runner starts it as `python -m zotune.bench.run.worker`, or with `--fork`, which forks a worker for each job of its
standard input. It exits when its standard input closes, which happens when the runner ends.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from zotune.bench.keys.code_hash import code_stamp
from zotune.bench.keys.content_key import PACKAGE, code_of
from zotune.bench.measure.accuracy import evaluated, trained
from zotune.bench.measure.estimates import estimated
from zotune.bench.measure.step import step_taken
from zotune.bench.run.fork_server import serve
from zotune.bench.run.jobs import Job
from zotune.bench.run.processes import FAILED, MEASURES_ITS_PROCESS, OUT_OF_MEMORY
from zotune.errors import RunError, UsageError, ZotuneError, did_you_mean, is_out_of_memory
from zotune.llm.output.environment import environment
from zotune.llm.output.json_files import write_json
from zotune.system.malloc import tune_malloc

# Does a job, given its options and a folder of its own; returns JSON values.
Work = Callable[[dict[str, Any], Path], dict[str, Any]]

WORK: dict[str, Work] = {"train": trained, "evaluate": evaluated, "estimate": estimated, "step": step_taken}
"""The function of every job by its name."""

_OTHER_CODE = (
    "the code or the libraries differ from those with which the runner started, so the result would have the wrong "
    "key; start the runner again"
)


def do(line: Mapping[str, Any], stamp: object = None) -> dict[str, Any]:
    """Do a job and return its results with a description of the machine.

    Args:
        line: the job.
        stamp: the stamp of the code when this process began; without one it has just begun.

    Raises:
        ZotuneError: the job is invalid, or it failed.
    """
    name, folder = str(line["does"]), Path(line["folder"])
    if name not in WORK:
        raise UsageError(f"no job is called {name!r}.{did_you_mean(name, WORK)}")
    is_other = stamp not in (None, code_stamp(PACKAGE))
    if is_other or ("key" in line and Job(name, dict(line["options"])).key != line["key"]):
        raise RunError(_OTHER_CODE)
    _limit_gpu(line.get("gib"))
    return {**WORK[name](dict(line["options"]), folder), "environment": machine()}


def machine() -> dict[str, str]:
    """The versions of the libraries, the processor and the GPU."""
    return {**environment(), "processor": processor()}


def processor() -> str:
    """The name of the processor; "unknown" where the system does not say."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(models, "unknown")


def _limit_gpu(gib: float | None) -> None:
    """Limit torch's memory on the GPU; on a CPU the runner enforces the limit."""
    import torch

    if gib is not None and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total))


def main(*arguments: str) -> int:
    """Do the job that is read from standard input, or with `--fork` each of them in a process; return the exit code."""
    tune_malloc()
    if arguments == ("--fork",):
        stamp = code_stamp(PACKAGE)
        _prepare()
        return serve(partial(_work, stamp=stamp))
    return _work(json.loads(sys.stdin.readline()))


def _work(line: Mapping[str, Any], stamp: object = None) -> int:
    """Do a job as `do` does and write its results; return the exit code."""
    threading.Thread(target=_exit_with_runner, daemon=True).start()
    try:
        found = do(line, stamp)
    except (ZotuneError, OSError, MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            _print_error(f"out of memory: {str(error).splitlines()[0] if str(error) else ''}")
            return OUT_OF_MEMORY
        if not isinstance(error, ZotuneError | OSError):
            raise
        _print_error(" ".join(str(error).split()))
        return FAILED
    write_json(Path(line["folder"]) / "found.json", found)
    return 0


def _prepare() -> None:
    """Import what the jobs import, and read the code for their keys: each forked worker would do it again."""
    for name in ("peft", "transformers", "zotune.llm.training.train", "zotune.llm.training.evaluation"):
        importlib.import_module(name)
    # Workers are not forked where there is a GPU.
    for name in WORK.keys() - MEASURES_ITS_PROCESS:
        code_of({"does": name, "device": "cpu"})


def _exit_with_runner() -> None:
    # Read without Python's buffer, whose lock the main thread would wait for at exit.
    while os.read(0, 1):
        pass
    # The runner started this process as the leader of a process group, which holds all processes started from here.
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(FAILED)


def _print_error(message: str) -> None:
    print(message, file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
