"""Messages to the person who runs zotune; all on stderr."""

from __future__ import annotations

import sys


def say(message: str) -> None:
    """Print a message on stderr."""
    print(message, file=sys.stderr, flush=True)  # noqa: T201
