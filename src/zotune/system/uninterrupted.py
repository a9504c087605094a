"""Short stretches that no signal may cut in two: handlers wait until their end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_NAMES = ("SIGUSR1", "SIGUSR2", "SIGALRM", "SIGVTALRM", "SIGPROF", "SIGHUP", "SIGTERM", "SIGINT")
_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Within this context Python's signal handlers, Ctrl-C's among them, wait; on leaving they run.

    >>> done = []
    >>> before = signal.signal(signal.SIGTERM, lambda number, frame: done.append("the handler"))
    >>> with uninterrupted():
    ...     signal.raise_signal(signal.SIGTERM)
    ...     done.append("the stretch")
    >>> _ = signal.signal(signal.SIGTERM, before)
    >>> done
    ['the stretch', 'the handler']
    """
    if threading.current_thread() is not threading.main_thread():  # signals run handlers in the main thread only
        yield
        return
    handlers: dict[int, Any] = {s: h for s in _SIGNALS if callable(h := signal.getsignal(s))}
    arrived: list[tuple[int, FrameType | None]] = []
    try:
        for number in handlers:
            signal.signal(number, lambda *which: arrived.append(which))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for which in arrived:
            handlers[which[0]](*which)
