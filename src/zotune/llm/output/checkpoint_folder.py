"""The folders checkpoint-N of a run: each is what the run's own folder would be, had the run ended after N steps.

A folder holds the model for transformers or peft, the state of the callbacks, and what resuming needs: options,
metrics, and the ledger or the optimizer's state. It appears whole, under its name, or not at all.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from zotune.errors import NotWrittenError, UsageError
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.output.manifest import CONFIG, Manifest, digest_of
from zotune.llm.output.model_files import is_write_error, write_model_files
from zotune.llm.output.output_folder import CHECKPOINT, RUN_FILES, OutputFolder
from zotune.llm.output.staging import write_manifest

_STATE_FILE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def write_checkpoint(
    lm: LanguageModel,
    output: OutputFolder,
    step: int,
    write_state: Callable[[Path], None],
    weights: dict[str, Any] | None = None,
) -> None:
    """Write the folder checkpoint-N of a run, whose ledger, metrics and optimizer state are on the disk already.

    Args:
        lm: the model.
        output: folder of the run.
        step: the number N of steps.
        write_state: writes `trainer_state.json` into a folder.
        weights: those of a model in shards, gathered.

    Raises:
        NotWrittenError: it cannot be written; no part of it remains.
    """
    name = f"checkpoint-{step}"
    try:
        with output.staged() as staging:
            folder = staging / name
            folder.mkdir()
            write_model_files(lm, folder, state=weights)
            write_state(folder)
            for file in RUN_FILES:
                if (output.path / file).exists():
                    _link_or_copy(output.path / file, folder / file)
            write_manifest(folder, Manifest({path.name: digest_of(path) for path in folder.iterdir()}))
    except Exception as error:
        if not is_write_error(error):
            raise
        raise NotWrittenError(f"{output.path / name} could not be written: {error}.") from None


def _link_or_copy(source: Path, target: Path) -> None:
    """Copy a file, or link to the one that is only ever replaced as a whole, which takes no room."""
    if source.name == CHECKPOINT:
        try:
            os.link(source, target)
        except OSError:  # the file system has no links
            pass
        else:
            return
    shutil.copyfile(source, target)


def steps_of(names: Iterable[str]) -> list[int]:
    """Return the steps of the checkpoints among some names, in order.

    >>> steps_of(["checkpoint-10", "checkpoint-9", "checkpoint.safetensors", "checkpoint-x"])
    [9, 10]
    """
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))


def remove_old_checkpoints(output: OutputFolder, limit: int | None, best: int | None) -> None:
    """Remove the oldest checkpoints of a run above the limit; the newest one and that of the best step stay."""
    if limit is None:
        return
    steps = steps_of(output.names)
    kept = {*steps[-1:], *(step for step in steps if step == best)}
    for step in reversed(steps):
        if len(kept) < limit:
            kept.add(step)
    old = [f"checkpoint-{step}" for step in steps if step not in kept]
    if old:
        output.remove(*old)


def check_checkpoint(path: Path, output_dir: Path) -> None:
    """Check that a folder is a checkpoint of a run.

    Raises:
        UsageError: it is none; the message names those in the output folder.
    """
    if (path / _STATE_FILE).is_file() and (path / CONFIG).is_file():
        return
    names = [p.name for p in output_dir.glob("checkpoint-*")] if output_dir.is_dir() else []
    known = ", ".join(f"checkpoint-{step}" for step in steps_of(names))
    raise UsageError(
        f"resume_from_checkpoint: {str(path)!r} is no folder checkpoint-N of a run. "
        + (f"{output_dir} holds {known}." if known else f"{output_dir} holds none; --resume needs none either.")
    )
