"""Jobs on the machines of a Ray cluster: each a task that starts the worker's process where it lands.

The runner keeps what comes back, so machines need no disk in common; where they have one, an interrupted job goes on
from what it had written.
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
    """So many executors, each of which keeps `cpus` processors and `gpus` GPUs of the cluster busy at a time.

    The cluster is the one that RAY_ADDRESS names, else this machine.

    Raises:
        UsageError: Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise UsageError("--executor ray needs Ray: pip install 'zotune[cluster]'") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(run_there)

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
            found: Outcome = ray.get(task)
        except ray.exceptions.RayError as error:
            return Outcome("failed", f"the cluster lost it: {str(error).splitlines()[0]}")
        return found

    return [execute] * count


def run_there(job: Job, folder: str, environment: Mapping[str, str]) -> Any:
    """Run a job on the machine that this is called on."""
    from zotune.bench.run.processes import Process

    here = Path(folder)
    here.mkdir(parents=True, exist_ok=True)
    return Process(lambda: False, environment)(job, here)
