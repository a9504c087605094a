"""The display of a run in progress: a live line on a terminal, plain lines elsewhere. All on stderr."""

from __future__ import annotations

import sys
import time
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from zotune.messages import Lossy, printable, say

# The benchmark's content keys leave out this module: it shows a run, and computes nothing of its result.
COUNTS_FOR_RESULTS = "never"
_SECONDS_BETWEEN_LINES = 10.0
_WINDOW = 30.0


@dataclass(frozen=True)
class Status:
    """The state of a run: step, recent mean loss, forward passes, seconds, peak memory in bytes, held-out metric.

    `num_flat` counts the steps in which all probes had the same value, so that the weights did not change.
    """

    step: int
    max_steps: int
    loss: float
    num_forwards: int
    seconds: float
    peak_memory: int
    held_out: str | None = None
    num_flat: int = 0

    def line(self, before: Status) -> str:
        """Describe the state; speed and time left are those since the status `before`, if that is an earlier one."""
        steps, elapsed, speed = self.step - before.step, self.seconds - before.seconds, ""
        if steps > 0 and elapsed > 0:
            rate, left = (
                (self.num_forwards - before.num_forwards) / elapsed,
                elapsed / steps * (self.max_steps - self.step),
            )
            speed = f"{rate:.1f} forwards/s · {clock(left)} left · "
        held_out = "" if self.held_out is None else f" · held-out {self.held_out}"
        flat = f" · {self.num_flat} steps without a difference" if self.num_flat else ""
        return (
            f"step {self.step}/{self.max_steps} · loss {self.loss:.4f} · {speed}"
            f"peak {self.peak_memory / 2**20:.0f} MiB{held_out}{flat}"
        )


def clock(seconds: float) -> str:
    """Format a duration in hours, minutes and seconds.

    >>> clock(75), clock(4000)
    ('1:15', '1:06:40')
    """
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


class Display:
    """A context that shows the latest `Status`, and single messages above it."""

    def __init__(self, max_steps: int) -> None:
        stream: Any = Lossy(sys.stderr)
        self._console = Console(file=stream, highlight=False)
        self._live = self._console.is_terminal
        self._bar = Progress(
            BarColumn(bar_width=20), TextColumn("{task.description}"), console=self._console, transient=True
        )
        self._task = self._bar.add_task("starting", total=max_steps)
        self._last_line = time.monotonic()
        self._recent: deque[Status] = deque()

    def __enter__(self) -> Self:
        if self._live:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._bar.stop()

    def update(self, status: Status) -> None:
        """Show a status: always on a terminal, elsewhere at most every ten seconds and at the last step."""
        before = self._since(status)
        if self._live:
            self._bar.update(self._task, completed=status.step, description=status.line(before))
        elif status.step == status.max_steps or time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            say(status.line(before))

    def _since(self, status: Status) -> Status:
        """Return the status of about half a minute before, or the first one since this process began.

        The first steps of a run fill caches and take longer, and those before a resume were of another process.
        """
        self._recent.append(status)
        while len(self._recent) > 2 and status.seconds - self._recent[1].seconds >= _WINDOW:
            self._recent.popleft()
        return self._recent[0]

    def say(self, message: str) -> None:
        """Print a line that stays above the progress bar."""
        self._console.print(printable(message), markup=False) if self._live else say(message)
