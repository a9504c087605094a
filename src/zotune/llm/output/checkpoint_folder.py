"""The folders checkpoint-N of a run: each is what the run's own folder would be, had the run ended after N steps.

A folder holds the model for transformers or peft, the state of the callbacks, and what resuming needs: options,
metrics, and the ledger or the optimizer's state. It appears whole, under its name, or not at all.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from zotune.errors import NotWrittenError, UsageError
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.output.model_files import write_model_files
from zotune.system.atomic_write import atomic_write, sync

# The files from which a run goes on. Put into a folder in this order, each state in between can be resumed: whatever is
# ahead of the ledger is cut off.
_RESUME_FILES = ("config.yaml", "ledger.zol", "checkpoint.safetensors", "metrics.jsonl")
_STATE_FILE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def write_checkpoint(lm: LanguageModel, folder: Path, step: int, write_state: Callable[[Path], None]) -> Path:
    """Write the folder checkpoint-N of a run, whose ledger, metrics and optimizer state are on the disk already.

    Args:
        lm: the model.
        folder: folder of the run.
        step: the number N of steps.
        write_state: writes `trainer_state.json` into a folder.

    Returns:
        The path of the folder.

    Raises:
        NotWrittenError: it cannot be written; no part of it remains.
    """
    final, staging = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        write_model_files(lm, staging)
        write_state(staging)
        for name in _RESUME_FILES:
            if (folder / name).exists():
                _link_or_copy(folder / name, staging / name)
        for path in [*staging.iterdir(), staging]:
            sync(path)
        if final.exists():
            _check_is_ours(final)
            shutil.rmtree(final)
        staging.rename(final)
        sync(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise NotWrittenError(f"{final} could not be written: {error}.") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return final


def _link_or_copy(source: Path, target: Path) -> None:
    """Copy a file, or link to one that is only ever replaced as a whole, which takes no room."""
    if source.suffix == ".safetensors":
        try:
            os.link(source, target)
        except OSError:  # the file system has no links
            pass
        else:
            return
    shutil.copyfile(source, target)


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """Return the checkpoints of a run by their steps, in order."""
    found = {int(m[1]): path for path in folder.glob("checkpoint-*") if (m := _NAME.fullmatch(path.name))}
    return {step: found[step] for step in sorted(found) if (found[step] / _STATE_FILE).is_file()}


def remove_old_checkpoints(folder: Path, limit: int | None, best: int | None) -> None:
    """Remove the oldest checkpoints of a run above the limit; the newest one and that of the best step stay."""
    if limit is None:
        return
    steps = list(checkpoints_in(folder))
    kept = {*steps[-1:], *(step for step in steps if step == best)}
    for step in reversed(steps):
        if len(kept) < limit:
            kept.add(step)
    for step in steps:
        if step not in kept:
            shutil.rmtree(folder / f"checkpoint-{step}")


def check_checkpoint(path: Path, output_dir: Path) -> None:
    """Check that a run can go on from a folder.

    Raises:
        UsageError: it is no checkpoint, or the output folder holds another run.
    """
    if not all((path / name).is_file() for name in (_STATE_FILE, "config.yaml")):
        known = ", ".join(p.name for p in checkpoints_in(output_dir).values())
        raise UsageError(
            f"resume_from_checkpoint: {str(path)!r} is no folder checkpoint-N of a run. "
            + (f"{output_dir} holds {known}." if known else f"{output_dir} holds none; --resume needs none either.")
        )
    if (output_dir / "config.yaml").exists() and path.resolve().parent != output_dir.resolve():
        raise UsageError(
            f"{output_dir} holds a run already, and {path} is not one of its checkpoints; choose another --output-dir."
        )


def put_checkpoint(path: Path, output_dir: Path) -> None:
    """Put the files of a checkpoint into the folder of a run, so that it goes on from there.

    Raises:
        UsageError: a file cannot be written.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        for name in _RESUME_FILES:
            if (path / name).is_file():
                with atomic_write(output_dir / name) as temporary:
                    shutil.copyfile(path / name, temporary)
    except OSError as error:
        raise UsageError(f"{path} cannot be put into {output_dir}: {error.strerror}.") from None


def _check_is_ours(path: Path) -> None:
    if not (path / _STATE_FILE).is_file():
        raise OSError("a folder of that name exists, which is no checkpoint; move it")
