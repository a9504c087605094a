"""Staging a folder's new files, so that the old ones are there until the new ones are complete."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
# Folder in which a model is written before it is complete.
STAGING = ".saving"


@contextmanager
def staged_folder(folder: Path) -> Iterator[Path]:
    """Yield a staging folder; when the context ends without an error, its files are moved into `folder`.

    Earlier weight files are removed, because shards could otherwise remain beside a single file.
    """
    staging, is_new = folder / STAGING, not folder.exists()
    staging.mkdir(parents=True, exist_ok=True)
    try:
        yield staging
        new = {file.name for file in staging.iterdir()}
        for file in staging.iterdir():
            file.replace(folder / file.name)
        for old in [old for pattern in _WEIGHTS for old in folder.glob(pattern) if old.name not in new]:
            old.unlink()
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if is_new:
            with suppress(OSError):  # it is not empty if the files are complete
                folder.rmdir()
