"""A folder that one command writes into at a time, and in which it replaces and deletes only what zotune wrote."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from zotune.errors import UsageError, listed
from zotune.llm.output import staging
from zotune.llm.output.manifest import Manifest, digest_of, manifest_of
from zotune.system.scratch_folder import scratch_folder

# No number of a result depends on this module.
COUNTS_FOR_RESULTS = "never"


class BusyError(UsageError):
    """Another command has the lock of a folder."""


class LockedFolder:
    """A folder and its lock, from its construction to `close`; it is made if there is none.

    Attributes:
        path: path of the folder.
        manifest: what zotune wrote there.
    """

    def __init__(self, path: Path) -> None:
        """Lock the folder, and finish what a kill cut short there.

        Raises:
            UsageError: it cannot be written or locked, or another command writes there.
        """
        self.path, self._lock = path, -1
        self._made: list[Path] = []
        try:
            self._lock = self._make_and_lock()
            staging.recover(path)
        except BaseException as error:
            if isinstance(error, BusyError):
                self._made = []  # the folder is now that of the command that has the lock
            self.close()
            if isinstance(error, OSError):
                raise not_written(path, error) from None
            raise
        self.manifest: Manifest = manifest_of(path)

    def _make_and_lock(self) -> int:
        while True:
            missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            self._made = self._made or missing
            try:
                lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:  # a command that was refused has removed it meanwhile
                continue
            try:
                _lock(lock, self.path)
                # A command that was refused may have removed the folder before it was locked.
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(lock), self.path.stat()):
                        return lock
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)

    def check_new(self) -> None:
        """Check that nothing but hidden files is in the folder.

        Raises:
            UsageError: something is.
        """
        names = [*self.manifest.foreign(self.path), *self.manifest.present(self.path)]
        if names:
            raise UsageError(f"{self.path} is not empty ({listed(sorted(names))}); choose another --output-dir.")

    @contextmanager
    def staged(self, *, without: Collection[str] = (), is_whole: bool = False) -> Iterator[Path]:
        """Yield a scratch folder; when the context ends without an error, what is in it is moved into the folder.

        Args:
            without: names of files that zotune wrote, to delete at the same time.
            is_whole: whether the files of earlier runs that were set aside are no longer needed.

        Raises:
            OSError: the files cannot be written; the folder is as it was.
        """
        with scratch_folder(self.path) as new:
            yield new
            before, names = self.manifest, [path.name for path in new.iterdir()]
            # A file that grows goes on growing.
            digests = {n: None if before.files.get(n, "") is None else digest_of(new / n) for n in names}
            after = before.with_files(digests, without)
            self.manifest = replace(after, replaced=()) if is_whole else after
            try:
                staging.swap_in(self.path, new, self.manifest)
            except BaseException:
                self.manifest = manifest_of(self.path)
                raise

    def claim(self, *names: str) -> None:
        """Say that this command writes files or folders of these names, which then grow; others there are renamed."""
        for name in names:
            if name not in self.manifest.files:
                staging.make_way(self.path / name, self.manifest)
        self._write(self.manifest.with_files(dict.fromkeys(names)))

    def remove(self, *names: str) -> None:
        """Delete files or folders if zotune wrote them; each is gone at once, or not at all."""
        with scratch_folder(self.path) as bin_:
            for name in names:
                if self.manifest.owns(self.path / name):
                    (self.path / name).rename(bin_ / name)
        self._write(self.manifest.with_files({}, without=names))

    def start_over(self, *names: str) -> None:
        """Set aside all that zotune wrote, and claim names; `go_back` undoes this."""
        aside = staging.set_aside(self.path, self.manifest)
        self._write(Manifest(dict.fromkeys(names), (*self.manifest.replaced, *([aside] if aside else []))))

    def go_back(self) -> None:
        """Delete all that was written since `start_over`, and return what it set aside."""
        staging.go_back(self.path, self.manifest)
        self.manifest = manifest_of(self.path)

    def _write(self, manifest: Manifest) -> None:
        staging.write_manifest(self.path, manifest)
        self.manifest = manifest

    def close(self) -> None:
        """Release the lock; a folder that was made and is still empty is removed."""
        with suppress(OSError):  # it is not empty
            for folder in self._made:
                folder.rmdir()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def new_folder(path: Path) -> Iterator[LockedFolder]:
    """Yield a locked folder without visible files.

    Raises:
        UsageError: it has some, cannot be written, or another command writes there.
    """
    with LockedFolder(path) as folder:
        folder.check_new()
        yield folder


def tidy(path: Path) -> None:
    """Finish what a kill cut short in a folder that is only read, unless a command is writing there."""
    with suppress(UsageError, OSError):
        if staging.is_cut_short(path):
            LockedFolder(path).close()


def not_written(path: Path, error: OSError) -> UsageError:
    """Return the error of a folder that cannot be written."""
    return UsageError(f"the output folder {str(path)!r} cannot be written: {error.strerror}.")


def _lock(lock: int, path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BusyError(
            f"another run is writing to {str(path)!r}; wait until it ends, or choose another --output-dir."
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF):
            raise
        raise UsageError(
            f"the file system of {str(path)!r} has no file locks ({error.strerror}), without which two commands could "
            "write there at once; choose an --output-dir on another file system."
        ) from None
