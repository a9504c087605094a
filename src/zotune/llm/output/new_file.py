"""The file that a command is asked to write beside others: it must be a new one, in a folder that is there."""

from __future__ import annotations

import os
from pathlib import Path

from zotune.errors import UsageError
from zotune.system.scratch_folder import remove_left_over


def check_new_file(option: str, path: Path) -> None:
    """Check, before a model is loaded, that a file can be made; what a killed command left beside it is removed.

    Args:
        option: the option that names the file, for messages.
        path: the file.

    Raises:
        UsageError: its folder is missing, or there is something of its name.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     check_new_file("--output-file", Path(folder) / "answers.jsonl")
    """
    if not path.parent.is_dir():
        raise UsageError(f"{option}: there is no folder {str(path.parent)!r}; create it first.")
    remove_left_over(path.parent)
    if os.path.lexists(path):
        raise UsageError(f"{option}: the file {str(path)!r} exists; remove it or name another.")
