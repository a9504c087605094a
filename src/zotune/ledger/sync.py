"""Syncing a file soon after a write, whether or not another write follows.

A write that comes a second after the last sync syncs at once. A timer covers the write that nothing follows: a run may
measure for an hour after a step.
"""

from __future__ import annotations

import os
import threading
import time


class LateSync:
    """Syncs an open file at most `seconds` after each write that it is told of.

    Args:
        file: a file descriptor, open until `close`.
        seconds: how long a write may wait.
    """

    def __init__(self, file: int, seconds: float) -> None:
        self._file, self._seconds = file, seconds
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._waits_since: float | None = None
        self._error: OSError | None = None

    def note(self) -> None:
        """Note a write; sync now if an earlier one has waited long enough, else a little later.

        Raises:
            OSError: the file was removed, or it or an earlier write could not be synced.
        """
        now = time.monotonic()
        with self._lock:
            error, self._error = self._error, None
            if error is not None:
                raise error
            if self._waits_since is None:
                self._waits_since = now
            if now - self._waits_since >= self._seconds:
                self._sync()
            elif self._timer is None:
                self._timer = threading.Timer(self._seconds, self._sync_late)
                self._timer.daemon = True
                self._timer.start()

    def sync(self) -> None:
        """Sync now.

        Raises:
            OSError: as `note`.
        """
        with self._lock:
            self._sync()

    def close(self) -> None:
        """Sync now, and never later: the file is about to be closed."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            self._file, file = -1, self._file
            os.fdatasync(file)

    def _sync(self) -> None:
        if not os.fstat(self._file).st_nlink:
            raise FileNotFoundError(2, "the file was removed")
        os.fdatasync(self._file)
        self._waits_since = None

    def _sync_late(self) -> None:
        with self._lock:
            self._timer = None
            if self._file < 0 or self._waits_since is None:
                return
            try:
                self._sync()
            except OSError as error:
                self._error = error
