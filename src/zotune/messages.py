"""Messages to the person who runs zotune; all on stderr."""

from __future__ import annotations

import sys

# The benchmark's content keys leave out this module: it shows messages, and computes nothing of a result.
COUNTS_FOR_RESULTS = "never"


def say(message: str) -> None:
    """Print a message on stderr."""
    print(message, file=sys.stderr, flush=True)  # noqa: T201
