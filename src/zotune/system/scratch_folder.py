"""A folder for what is not yet complete, beside its place: new, of an unpredictable name, and gone after any end.

A process holds a lock on each of its scratch folders. The lock ends with the process, however it ends, so the next one
that makes a scratch folder in the same place knows which of those that it finds there are left over, and removes them.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# No number of a result depends on this module.
COUNTS_FOR_RESULTS = "never"

_NAME = re.compile(r"\.zotune-[0-9a-f]{16}")
_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Yield a new folder in `parent`; what is in it when the context ends is removed.

    The folder and the files in it get the permissions that the process's umask allows.

    Raises:
        OSError: `parent` cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as parent:
    ...     with scratch_folder(Path(parent)) as folder:
    ...         _ = (folder / "a.txt").write_text("half")
    ...     os.listdir(parent)
    []
    """
    remove_left_over(parent)
    folder, lock = _make(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_left_over(parent: Path) -> None:
    """Remove the scratch folders of processes that have ended."""
    for folder in left_over(parent, _NAME):
        with suppress(OSError):
            lock = os.open(folder, _OPEN_FOLDER)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def left_over(parent: Path, name: re.Pattern[str] = _NAME) -> list[Path]:
    """Return the folders in `parent` whose whole name matches, without links to folders."""
    with suppress(OSError), os.scandir(parent) as entries:
        return sorted(Path(e.path) for e in entries if name.fullmatch(e.name) and e.is_dir(follow_symlinks=False))
    return []


def make_folder(parent: Path, prefix: str = ".zotune-") -> Path:
    """Make a folder of an unpredictable name, which neither exists nor is a link."""
    while True:
        folder = parent / f"{prefix}{secrets.token_hex(8)}"
        with suppress(FileExistsError):
            folder.mkdir()
            return folder


def obey_umask(folder: Path) -> None:
    """Give all that is in a folder the permissions that the folder itself was made with, without those to run files.

    Some libraries write files that only their owner may read, whatever the umask is.
    """
    mode = stat.S_IMODE(folder.stat().st_mode)
    for path in folder.rglob("*"):
        if not path.is_symlink():
            with suppress(OSError):  # some file systems have no permissions
                path.chmod(mode if path.is_dir() else mode & 0o666)


def _make(parent: Path) -> tuple[Path, int]:
    """Make a folder and lock it."""
    while True:
        folder = make_folder(parent)
        with suppress(FileNotFoundError):
            lock = os.open(folder, _OPEN_FOLDER)
            with suppress(OSError):  # a file system without locks: its left-over folders stay
                fcntl.flock(lock, fcntl.LOCK_EX)
            # Another process may have taken it for a left-over one before it was locked.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), folder.lstat()):
                    return folder, lock
            os.close(lock)
