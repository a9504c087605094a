"""The lines of metrics.jsonl: appended as they come; after an interruption cut where the run goes on, never doubled."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from zotune.errors import NotWrittenError

Line = dict[str, Any]


class MetricsLog:
    """A run's metrics: at most one line of training and one of evaluation a step."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: dict[tuple[int, bool], Line] = {}

    def cut(self, num_steps: int) -> float:
        """Keep the lines of the first so many steps alone; the seconds that the last of them tells of."""
        kept: dict[tuple[int, bool], Line] = {}
        for line in _whole_lines(self._path):
            key = _key(line)
            if key is None or key[0] > num_steps or key in kept or (kept and key < next(reversed(kept))):
                break
            kept[key] = line
        aside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        aside.write_text("".join(map(_text, kept.values())), encoding="utf-8")
        aside.replace(self._path)
        self._lines = kept
        return max((float(line.get("seconds") or 0.0) for line in kept.values()), default=0.0)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line, unless the step has it already; it reaches the file at once.

        Raises:
            NotWrittenError: the disk is full, or the folder gone.
        """
        if _key(record) in self._lines:
            return
        try:
            # Not made anew: a folder that was removed stays so.
            with self._path.open("r+", encoding="utf-8") as metrics:
                metrics.seek(0, os.SEEK_END)
                metrics.write(_text(record))
        except OSError as error:
            raise NotWrittenError(f"metrics could not be written to {self._path.parent}: {error.strerror}.") from None

    def evaluation(self, step: int) -> Line | None:
        """What an earlier part of the run found on the held-out rows at a step."""
        line = self._lines.get((step, True))
        return None if line is None else line["dev"]

    def sync(self) -> None:
        """Return when all lines are on the disk."""
        with self._path.open("rb") as metrics:
            os.fsync(metrics.fileno())


def plain(value: Any) -> Any:
    """`value` with null for what JSON has no number for: NaN and the infinities."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(line: Mapping[str, Any]) -> str:
    return json.dumps(plain(dict(line)), allow_nan=False) + "\n"


def _key(line: Mapping[str, Any]) -> tuple[int, bool] | None:
    step = line.get("step")
    return (step, "dev" in line) if isinstance(step, int) else None


def _whole_lines(path: Path) -> Iterator[Line]:
    """The lines up to the first that is torn."""
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
