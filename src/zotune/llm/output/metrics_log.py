"""The metrics of a run in metrics.jsonl: appended line by line, and truncated when a run resumes, never repeated."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from zotune.errors import NotWrittenError
from zotune.llm.output.json_files import json_safe
from zotune.system.atomic_write import atomic_write

Line = dict[str, Any]


class MetricsLog:
    """The metrics of a run: at most one line of training and one of evaluation per step."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: dict[tuple[int, bool], Line] = {}

    @property
    def has_lines(self) -> bool:
        """Whether an earlier part of the run recorded anything."""
        return any(True for _ in _whole_lines(self._path))

    @property
    def last_step(self) -> int:
        """The last step that an earlier part of the run recorded; 0 if there is none."""
        return max((key[0] for line in _whole_lines(self._path) if (key := line_key(line)) is not None), default=0)

    def truncate(self, num_steps: int) -> float:
        """Remove the lines after step `num_steps`; return the training seconds recorded in the remaining ones."""
        lines: dict[tuple[int, bool], Line] = {}
        for line in _whole_lines(self._path):
            key = line_key(line)
            if key is None or key[0] > num_steps or key in lines or (lines and key < next(reversed(lines))):
                break
            lines[key] = line
        with atomic_write(self._path) as temporary:
            temporary.write_text("".join(map(_text, lines.values())), encoding="utf-8")
        self._lines = lines
        return max((float(line.get("seconds") or 0.0) for line in lines.values()), default=0.0)

    def append(self, record: Mapping[str, Any]) -> None:
        """Append a line at once, unless the step has such a line already.

        Raises:
            NotWrittenError: the disk is full, or the folder no longer exists.
        """
        if line_key(record) in self._lines:
            return
        try:
            # The file is not created again if its folder was removed.
            with self._path.open("r+", encoding="utf-8") as metrics:
                metrics.seek(0, os.SEEK_END)
                metrics.write(_text(record))
        except OSError as error:
            raise NotWrittenError(f"metrics could not be written to {self._path.parent}: {error.strerror}.") from None

    def evaluation(self, step: int) -> Line | None:
        """Return the held-out evaluation at a step by an earlier part of the run, or None."""
        line = self._lines.get((step, True))
        return None if line is None else line["dev"]

    def lines(self) -> list[Line]:
        """Return all lines in order."""
        return list(_whole_lines(self._path))

    @property
    def earlier(self) -> tuple[Line, ...]:
        """The lines of an earlier part of the run."""
        return tuple(self._lines.values())

    def sync(self) -> None:
        """Wait until all lines are on the disk."""
        with self._path.open("rb") as metrics:
            os.fsync(metrics.fileno())


def _text(line: Mapping[str, Any]) -> str:
    return json.dumps(json_safe(dict(line)), allow_nan=False) + "\n"


def line_key(line: Mapping[str, Any]) -> tuple[int, bool] | None:
    """Return the step of a line, and whether it is one of an evaluation; None for a line of neither kind."""
    step = line.get("step")
    return (step, "dev" in line) if isinstance(step, int) else None


def _whole_lines(path: Path) -> Iterator[Line]:
    """Yield the lines up to the first incomplete one."""
    if not path.is_file():
        return
    for text in path.read_bytes().split(b"\n")[:-1]:
        try:
            line = json.loads(text)
        except ValueError:
            return
        if not isinstance(line, dict):
            return
        yield line
