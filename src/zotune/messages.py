"""Messages to the person who runs zotune; all on stderr."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

# The benchmark's content keys leave out this module: it shows messages, and computes nothing of a result.
COUNTS_FOR_RESULTS = "never"


# What a write to a full disk, a closed pipe, a closed stream or, in a signal handler, to a stream being written raises.
_NOT_WRITTEN = (OSError, ValueError, RuntimeError)


class Lossy:
    """A text stream that drops what cannot be written, for no run should end for a message that nobody reads.

    Args:
        stream: the stream to write to; None, as `sys.stderr` is in a process without one, drops everything.

    >>> Lossy(None).write("unread")
    6
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text, or drop it; return its length."""
        if self._stream is not None:
            with suppress(*_NOT_WRITTEN):
                self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write some texts."""
        self.write("".join(lines))

    def flush(self) -> None:
        """Write what is buffered, or leave it."""
        if self._stream is not None:
            with suppress(*_NOT_WRITTEN):
                self._stream.flush()

    def isatty(self) -> bool:
        """Whether it is a terminal; a closed stream is none."""
        with suppress(*_NOT_WRITTEN):
            return self._stream is not None and bool(self._stream.isatty())
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def say(message: str) -> None:
    """Print a message on stderr; if it cannot be printed there, it is dropped."""
    print(message, file=Lossy(sys.stderr), flush=True)
