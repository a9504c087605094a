"""Results on stdout: JSON, plain text or a table of names; and the case that the reader of stdout has left.

What is printed may hold text from files, so its control characters are printed as escapes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from zotune.messages import printable, say


class OutputClosedError(Exception):
    """The reader of stdout has left, as `head` does after its last line."""


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    print_text(json.dumps(value, indent=2))


def print_text(text: str) -> None:
    """Print text and a line break.

    Raises:
        OutputClosedError: the reader of stdout has left.
    """
    print_piece(f"{text}\n")


def print_piece(text: str) -> None:
    """Print a piece of a text that goes on, as `print_text` prints a whole one."""
    try:
        print(printable(text), end="", flush=True)  # noqa: T201
    except BrokenPipeError:
        raise OutputClosedError from None


def print_message(message: str) -> None:
    """Print a message to the user on stderr."""
    say(f"zotune: {message}")


def print_table(rows: Mapping[str, str], as_json: bool) -> None:
    """Print names and their descriptions: two aligned columns, or one JSON object."""
    width = max(map(len, rows))
    lines = [f"{name.ljust(width)}  {text}".rstrip() for name, text in rows.items()]
    if as_json:
        print_json(dict(rows))
    else:
        print_text("\n".join(lines))
