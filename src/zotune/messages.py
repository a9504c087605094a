"""Messages to the person who runs zotune, all on stderr; and text from files, made safe for where it is shown."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from typing import Any

# The benchmark's content keys leave out this module: it shows messages, and computes nothing of a result.
COUNTS_FOR_RESULTS = "never"


# What a write to a full disk, a closed pipe, a closed stream or, in a signal handler, to a stream being written raises.
_NOT_WRITTEN = (OSError, ValueError, RuntimeError)
# What a terminal obeys or hides, but for line breaks and tabs: control characters, marks that turn the direction of
# writing, line separators, byte order marks, halves of characters.
_CONTROLS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_MARKDOWN = re.compile(r"[\\`*\[\]<>|~&]|(?<![^\W_])_|_(?![^\W_])")


def printable(text: str) -> str:
    r"""Return text whose control characters are shown as escapes, so that no terminal obeys them.

    Text from files, and messages about it, may hold sequences that rewrite the screen, the clipboard or the title of a
    terminal. Line breaks and tabs stay.

    >>> print(printable("a\x1b[2Jb"))
    a\x1b[2Jb
    """
    return _CONTROLS.sub(_escape, text)


def one_line(text: str) -> str:
    r"""Return text as `printable` does, with line breaks and tabs as escapes too, so that it forges no further line.

    >>> print(one_line("a\nb"))
    a\nb
    """
    return re.sub("[\n\t]", _escape, printable(text))


def markdown_text(text: str) -> str:
    r"""Return text that Markdown, and HTML in it, shows as it is: no link, tag, emphasis or column comes of it.

    >>> print(markdown_text("my_rows <b> | [x](y)"))
    my_rows \<b\> \| \[x\](y)
    """
    return _MARKDOWN.sub(r"\\\g<0>", one_line(text))


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


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
    """Print a message on stderr, its control characters as escapes; if it cannot be printed there, it is dropped."""
    print(printable(message), file=Lossy(sys.stderr), flush=True)
