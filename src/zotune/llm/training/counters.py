"""The counters of a run: its state beside weights and optimizer, on which later steps and log lines depend."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Counters:
    """The counters of a run; see `Result`.

    Attributes:
        num_flat: steps in which all probes had the same value, so that the weights did not change.
        held_out, held_out_short: metric of the last evaluation during the run, as a number and as text.
        recent: losses of the last steps, in single precision as in the ledger.
        callbacks: what the callbacks leave to a resumed run, see `Events.exported`.
    """

    step: int = 0
    num_skipped: int = 0
    skipped_in_a_row: int = 0
    num_forwards: int = 0
    num_flat: int = 0
    seconds: float = 0.0
    held_out: float | None = None
    held_out_short: str | None = None
    recent: list[float] = field(default_factory=list)
    callbacks: dict[str, Any] = field(default_factory=dict)
