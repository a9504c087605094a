"""Where a run stands, besides its weights and its optimizer: all that further steps and log lines depend on."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Counters:
    """What a run has counted; see `Result`.

    Attributes:
        num_flat: steps in which all probes had the same value, so that nothing was learned.
        held_out, held_out_short: the metric of the last evaluation on the way, and as people read it.
        recent: the losses of the last steps, in single precision as the ledger holds them.
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
