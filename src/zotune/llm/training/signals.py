"""Handling Ctrl-C and SIGTERM: the first ends the run after the step in progress, the second ends it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from zotune.messages import say


@dataclass
class StopRequest:
    """The signal that asked the run to stop, or None."""

    signal: int | None = None


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Within this context the first Ctrl-C or SIGTERM ends the run after its step, the second one at once."""
    stop = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        if stop.signal is not None:
            raise KeyboardInterrupt
        stop.signal = number
        say("stopping after this step (a second signal, such as Ctrl-C, stops at once) …")

    with signal_handler(note):
        yield stop


@contextmanager
def signal_handler(note: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Within this context Ctrl-C and SIGTERM call `note`; the previous handlers are restored afterwards."""
    if threading.current_thread() is not threading.main_thread():
        # Python allows signal handlers in the main thread only.
        yield
        return
    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
