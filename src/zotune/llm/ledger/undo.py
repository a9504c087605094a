"""Undoing steps: a run's folder as it was after an earlier step, from which `--resume` continues."""

from __future__ import annotations

import shutil
from itertools import count
from pathlib import Path

from zotune.ledger import read
from zotune.ledger.files import DamagedLedgerError
from zotune.ledger.files import locked as locked_ledger
from zotune.llm.ledger.rebuild import find_ledger, rebuild
from zotune.llm.output.locked_folder import LockedFolder
from zotune.llm.output.manifest import LEDGER
from zotune.llm.output.metrics_log import MetricsLog
from zotune.llm.output.model_files import old_weights
from zotune.llm.output.output_folder import CHECKPOINT, METRICS
from zotune.messages import say

# Files that say how the run ended.
_OF_ITS_END = ("results.json", "README.md", "report.html")


def undo(folder: Path, num_steps: int, base: str | None = None, device: str | None = None) -> None:
    """Restore weights, ledger and metrics of a run's folder at an earlier step.

    Weights, ledger and metrics change at once, after all weights were computed and checked. Results, model card and
    page go: they tell of the steps that are taken back.

    Raises:
        LedgerError: there are fewer steps, or the ledger is damaged before that step.
        UsageError: another command writes into the folder.
    """
    ledger = find_ledger(folder, num_steps)
    with LockedFolder(folder) as locked, locked_ledger(folder / LEDGER):
        # The ledger may have grown until the folder was locked.
        ledger = find_ledger(folder, num_steps)
        rebuilt = rebuild(ledger, base, device)
        stale = [CHECKPOINT, *_OF_ITS_END, *old_weights(locked.manifest.files)]
        with locked.staged(without=stale) as staging:
            rebuilt.write(staging)
            (staging / LEDGER).write_bytes(ledger.to_bytes())
            if (folder / METRICS).is_file():
                shutil.copyfile(folder / METRICS, staging / METRICS)
                MetricsLog(staging / METRICS).truncate(num_steps)
            if is_damaged(folder / LEDGER):
                names = (f"{LEDGER}.damaged{number or ''}" for number in count())
                kept = next(name for name in names if not (folder / name).exists())
                shutil.copyfile(folder / LEDGER, staging / kept)
                say(f"{folder / LEDGER} is damaged in the middle; it is kept as {folder / kept}")


def is_damaged(path: Path) -> bool:
    """Whether good records follow a bad one in a ledger: they are not lost when it is replaced."""
    try:
        read(path)
    except DamagedLedgerError:
        return True
    return False
