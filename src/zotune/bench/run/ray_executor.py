"""The executor for a Ray cluster: each job is a task that starts the worker process on one of the machines.

The runner stores the outcomes, so the machines need no shared disk. If they have one, an interrupted job resumes from
its files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from zotune.bench.run.jobs import Executor, Job, Outcome
from zotune.errors import UsageError

_SECONDS_BETWEEN_LOOKS = 0.5


def ray_executors(
    count: int, environment: Mapping[str, str], *, cpus: int, gpus: float, stopped: Callable[[], bool]
) -> list[Executor]:
    """Return `count` executors; each uses `cpus` processors and `gpus` GPUs of the cluster for one job at a time.

    The cluster is the one that RAY_ADDRESS names, or this machine without the variable.

    Raises:
        UsageError: Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise UsageError("--executor ray needs Ray: pip install 'zotune[cluster]'") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(run_task)

    def execute(job: Job, folder: Path) -> Outcome:
        task = remote.remote(job, str(folder), dict(environment))
        while True:
            ready, _ = ray.wait([task], timeout=_SECONDS_BETWEEN_LOOKS)
            if ready:
                break
            if stopped():
                ray.cancel(task, force=True)
                raise KeyboardInterrupt
        try:
            outcome: Outcome = ray.get(task)
        except ray.exceptions.RayError as error:
            return Outcome("failed", f"the cluster lost the job: {str(error).splitlines()[0]}")
        return outcome

    return [execute] * count


def run_task(job: Job, folder: str, environment: Mapping[str, str]) -> Any:
    """Run a job in a process on the machine that executes the task."""
    from zotune.bench.run.processes import Process

    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    return Process(lambda: False, environment)(job, path)
