"""Writing a file atomically: readers see the old content or the new one, never a part of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zotune.system.scratch_folder import obey_umask, scratch_folder

# No number of a result depends on this module.
COUNTS_FOR_RESULTS = "never"


@contextmanager
def atomic_write(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield the path of a temporary file, which replaces `path` when the context ends without an error.

    After an error the temporary file is removed, and `path` is as it was. A file that has to outlive a power failure
    is synced by its writer: the temporary file inside the context, the folder after it, both by `sync`.

    Args:
        path: the file to write; of a link, the link is replaced and not what it leads to.
        replace: whether an earlier file may be replaced.

    Raises:
        FileExistsError: `replace` is false, and there is something at `path`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic_write(Path(folder) / "a.txt") as temporary:
    ...         _ = temporary.write_text("whole")
    ...     (Path(folder) / "a.txt").read_text(), len(os.listdir(folder))
    ('whole', 1)
    """
    with scratch_folder(path.parent) as folder:
        temporary = folder / path.name
        yield temporary
        obey_umask(folder)
        if replace or not _linked(temporary, path):
            temporary.replace(path)


def _linked(temporary: Path, path: Path) -> bool:
    """Give a whole file its name, unless there is something of that name; return whether the name is a link to it.

    Raises:
        FileExistsError: there is something at `path`.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:
        # A file system without hard links: whoever makes the name first has it; only then it is replaced.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
        return False
    return True


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of files, is on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
