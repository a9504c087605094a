"""A folder for what is not yet complete, beside its place: new, of an unpredictable name, and gone after any end.

A process holds a lock on each of its scratch folders. The lock ends with the process, however it ends, so the next one
that makes a scratch folder in the same place knows which of those that it finds there are left over, and removes them.
Locks of other machines cannot be seen, so a name says which machine made it; those of others go after a day.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

# No number of a result depends on this module.
COUNTS_FOR_RESULTS = "never"

_PREFIX = ".zotune-"
_SECONDS_ELSEWHERE = 24 * 3600.0
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
    for folder in made_folders(parent):
        with suppress(OSError):
            if machine() not in folder.name and time.time() - folder.stat().st_mtime < _SECONDS_ELSEWHERE:
                continue
            lock = os.open(folder, _OPEN_FOLDER)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


@cache
def machine() -> str:
    """Return a tag of this machine since it was started: processes with the same tag see each other's locks."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    name = boot.read_text(encoding="ascii") if boot.is_file() else platform.node()
    return hashlib.blake2b(name.encode(), digest_size=4).hexdigest()


def made_folders(parent: Path, prefix: str = _PREFIX) -> list[Path]:
    """Return the folders in `parent` that `make_folder` made with a prefix, without links to folders."""
    name = re.compile(rf"{re.escape(prefix)}[0-9a-f]{{8}}-[0-9a-f]{{16}}")
    with suppress(OSError), os.scandir(parent) as entries:
        return sorted(Path(e.path) for e in entries if name.fullmatch(e.name) and e.is_dir(follow_symlinks=False))
    return []


def make_folder(parent: Path, prefix: str = _PREFIX) -> Path:
    """Make a folder of an unpredictable name, which neither exists nor is a link."""
    while True:
        folder = parent / f"{prefix}{machine()}-{secrets.token_hex(8)}"
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
