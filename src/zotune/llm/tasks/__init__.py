"""The tasks by name, one file each."""

from zotune.errors import UsageError, did_you_mean
from zotune.llm.data import Task
from zotune.llm.tasks.sst2 import SST2

TASKS: dict[str, Task] = {task.name: task for task in (SST2,)}
"""Every task by name: feeds the command line, the docs and the tests."""


def find_task(name: str) -> Task:
    """The task of a name.

    Raises:
        UsageError: there is none; the message suggests the nearest.
    """
    if name not in TASKS:
        raise UsageError(f"there is no task {name!r}.{did_you_mean(name, TASKS)}")
    return TASKS[name]
