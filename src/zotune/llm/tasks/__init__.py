"""The public tasks, one file each, and the conversion of rows to examples.

Start with `task` (a task and its splits) and one task such as `sst2`; `user_data` does the same for the user's own
rows (`zotune.llm.rows`), and `load_data` turns either into tokens. The tasks are those of the paper and all others of
Malladi et al. (2023).
"""

from zotune.errors import UsageError, did_you_mean
from zotune.llm.config.data import DataOptions
from zotune.llm.tasks.boolq import BOOLQ
from zotune.llm.tasks.cb import CB
from zotune.llm.tasks.copa import COPA
from zotune.llm.tasks.drop import DROP
from zotune.llm.tasks.mnli import MNLI
from zotune.llm.tasks.multirc import MULTIRC
from zotune.llm.tasks.record import RECORD
from zotune.llm.tasks.rte import RTE
from zotune.llm.tasks.snli import SNLI
from zotune.llm.tasks.squad import SQUAD
from zotune.llm.tasks.sst2 import SST2
from zotune.llm.tasks.sst5 import SST5
from zotune.llm.tasks.task import Task
from zotune.llm.tasks.trec import TREC
from zotune.llm.tasks.wic import WIC
from zotune.llm.tasks.winogrande import WINOGRANDE
from zotune.llm.tasks.wsc import WSC

_PAPER = (SST2, RTE, COPA, WINOGRANDE, MULTIRC)
_OTHERS = (SST5, SNLI, MNLI, TREC, CB, BOOLQ, WSC, WIC, RECORD, SQUAD, DROP)

TASKS: dict[str, Task] = {task.name: task for task in (*_PAPER, *_OTHERS)}
"""The tasks by name, for the command line, the docs and the tests."""


def find_task(name: str) -> Task:
    """Return the task of a name.

    Raises:
        UsageError: there is no such task; the message suggests the nearest name.
    """
    if name not in TASKS:
        raise UsageError(f"there is no task {name!r}.{did_you_mean(name, TASKS)}")
    return TASKS[name]


def head_labels(options: DataOptions) -> tuple[str, ...]:
    """Return the labels of a masked model's new classification head; none if the model keeps its own head."""
    return () if options.task is None or options.prompt == "aligned" else find_task(options.task).labels
