"""The executors of the jobs that run at a time, which share the processors and GPUs, and how signals stop them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from zotune.llm.training.signals import signal_handler
from zotune.messages import say


def slots(jobs: int, executor: str, gpus_per_job: float, stop: threading.Event) -> list[Any]:
    """Return one executor for each of the jobs that run at the same time.

    Args:
        jobs: how many jobs run at a time.
        executor: "local", or "ray" for a cluster.
        gpus_per_job: with ray, how many GPUs a job uses.
        stop: an event that ends the jobs.

    Raises:
        UsageError: Ray is not installed.
    """
    from zotune.bench.run.processes import Process
    from zotune.bench.run.ray_executor import ray_executors

    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, processors // jobs)
    # Two pools of spinning threads on the same cores would stall each other.
    environment = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    if executor == "ray":
        return ray_executors(jobs, environment, cpus=threads, gpus=gpus_per_job, stopped=stop.is_set)
    num_gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    assigns_gpus = jobs > 1 and num_gpus > 1 and "CUDA_VISIBLE_DEVICES" not in os.environ
    gpu_of = [{"CUDA_VISIBLE_DEVICES": str(i % num_gpus)} if assigns_gpus else {} for i in range(jobs)]
    return [Process(stop.is_set, {**environment, **gpu}, forks=not num_gpus) for gpu in gpu_of]


@contextmanager
def stopped_by_signals(stop: threading.Event) -> Iterator[list[int]]:
    """Let Ctrl-C and SIGTERM set `stop`, and give the list of the signals received so far."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if not received:
            say("stopping; finished cells are saved, and the same command goes on from here …")
        received.append(number)
        stop.set()

    with signal_handler(note):
        yield received
