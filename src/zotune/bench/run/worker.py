"""The process of one job: reads it as a line of JSON, does it, writes what it found as JSON, or says why not.

The runner starts it, as `python -m zotune.bench.run.worker`.
It leaves when its input closes, which is when its runner is gone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from zotune.bench.measure.accuracy import evaluated, trained
from zotune.bench.measure.estimates import estimated
from zotune.bench.measure.step import step_taken
from zotune.bench.run.jobs import Job
from zotune.bench.run.processes import FAILED, OUT_OF_MEMORY
from zotune.cli.main import is_out_of_memory
from zotune.errors import RunError, UsageError, ZotuneError, did_you_mean
from zotune.llm.training.output_folder import environment, write_json
from zotune.system.malloc import tune_malloc

# What a job does, given its options and a folder of its own; what it found, as JSON holds it.
Work = Callable[[dict[str, Any], Path], dict[str, Any]]

WORK: dict[str, Work] = {"train": trained, "evaluate": evaluated, "estimate": estimated, "step": step_taken}
"""Every kind of job by name."""


def do(line: Mapping[str, Any]) -> dict[str, Any]:
    """What a job found, with the machine that found it.

    Raises:
        ZotuneError: it cannot be done, or failed.
    """
    name, folder = str(line["does"]), Path(line["folder"])
    if name not in WORK:
        raise UsageError(f"no job is called {name!r}.{did_you_mean(name, WORK)}")
    if "key" in line and Job(name, dict(line["options"])).key != line["key"]:
        raise RunError("the code or the libraries here are not those that the runner began with; start it again")
    _limit_gpu(line.get("gib"))
    return {**WORK[name](dict(line["options"]), folder), "environment": machine()}


def machine() -> dict[str, str]:
    """Versions, processor and GPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {**environment(), "processor": next(models, "unknown")}


def _limit_gpu(gib: float | None) -> None:
    """Let torch refuse to take more of the GPU; on a CPU the runner watches."""
    import torch

    if gib is not None and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total))


def main() -> int:
    """Do the job on standard input; the exit code."""
    line = json.loads(sys.stdin.readline())
    threading.Thread(target=_leave_with_the_runner, daemon=True).start()
    tune_malloc()
    try:
        found = do(line)
    except (ZotuneError, OSError, MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            _say(f"out of memory: {str(error).splitlines()[0] if str(error) else ''}")
            return OUT_OF_MEMORY
        if not isinstance(error, ZotuneError | OSError):
            raise
        _say(" ".join(str(error).split()))
        return FAILED
    write_json(Path(line["folder"]) / "found.json", found)
    return 0


def _leave_with_the_runner() -> None:
    # Read without Python's buffer, whose lock the main thread would wait for at exit.
    while os.read(0, 1):
        pass
    # The runner made this process the first of a group of its own, in which is all that was started from here.
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(FAILED)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
