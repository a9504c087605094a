"""The progress display of a runner on stderr: a live table on a terminal, else one line for each cell."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from zotune.bench.spec.schema import CellSpec
from zotune.bench.spec.vocabulary import State
from zotune.llm.training.progress import clock
from zotune.messages import printable, say


class Progress:
    """A context that shows which cells have started and ended, and the time left.

    The time left is the expected time of the remaining cells, scaled by the ratio of measured to expected time of the
    cells that have ended.
    """

    def __init__(self, minutes: Mapping[str, float], num_slots: int) -> None:
        """Prepare the display; `minutes` are the expected minutes of each cell by its path."""
        self._left, self._slots = dict(minutes), num_slots
        self._all = len(self._left)
        self._running: dict[str, float] = {}
        self._ended: dict[str, int] = {}
        self._expected = self._measured = 0.0
        console = Console(stderr=True)
        self._live = Live(console=console, get_renderable=self._table) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def began(self, spec: CellSpec) -> None:
        """Show that a cell has started."""
        self._running[spec.path] = time.monotonic()

    def ended(self, spec: CellSpec, state: State, message: str) -> None:
        """Show that a cell has ended, or that it was already done."""
        expected = self._left.pop(spec.path, 0.0)
        self._ended[state] = self._ended.get(state, 0) + 1
        start = self._running.pop(spec.path, None)
        if start is None:
            return
        seconds = time.monotonic() - start
        self._expected, self._measured = self._expected + 60 * expected, self._measured + seconds
        line = f"{spec.path}: {state}{f', {message}' if message else ''} ({clock(seconds)})"
        if self._live is None:
            done = self._all - len(self._left)
            say(f"[{done}/{self._all}] {line}; {clock(self._seconds_left())} left")
        else:
            self._live.console.print(printable(line), markup=False, highlight=False)

    def _seconds_left(self) -> float:
        pace = self._measured / self._expected if self._expected else 1.0
        return 60 * sum(self._left.values()) * pace / self._slots

    def _table(self) -> Table:
        ended = ", ".join(f"{count} {state}" for state, count in sorted(self._ended.items())) or "none ended"
        title = f"{self._all} cells: {ended}; {clock(self._seconds_left())} left"
        table = Table("cell", "running for", title=title, title_justify="left")
        for path, start in list(self._running.items()):
            table.add_row(path, clock(time.monotonic() - start))
        return table
