"""Ending a run early and well: the first Ctrl-C or SIGTERM after the step in progress, a second one at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from zotune.messages import say


@dataclass
class Stop:
    """The signal that asked for the end, if one has."""

    signal: int | None = None


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Let the first Ctrl-C or SIGTERM end the run after its step; a second one ends it at once."""
    stop = Stop()

    def note(number: int, frame: FrameType | None) -> None:
        if stop.signal is not None:
            raise KeyboardInterrupt
        stop.signal = number
        say("stopping after this step (once more to stop at once) …")

    with listening(note):
        yield stop


@contextmanager
def listening(note: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM call `note`, and what heard them before do so again afterwards."""
    if threading.current_thread() is not threading.main_thread():
        # Python lets only the main thread listen to signals.
        yield
        return
    kept = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
