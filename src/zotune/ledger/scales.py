"""How far a step went, as both versions of the format store it: 1, 0 or -1 times, or not at all."""

from __future__ import annotations

import math
from collections.abc import Sequence

from zotune.ledger.errors import LedgerError

LEFT_OUT = 2
SCALES = (-1, 0, 1, LEFT_OUT)
MAX_PASSES = (1 << 24) - 1


def is_scale(code: int) -> bool:
    """Whether a stored number says how far a step went."""
    return int(code) in SCALES


def codes_of(scales: Sequence[float]) -> list[float]:
    """The stored numbers of a record's scales.

    Raises:
        LedgerError: a step was taken some other number of times.

    >>> codes_of([1.0, math.nan])
    [1.0, 2]
    """
    codes = [LEFT_OUT if math.isnan(scale) else scale for scale in scales]
    if any(code not in SCALES for code in codes):
        raise LedgerError(f"a ledger holds steps taken once, not at all or backwards, not {codes} times.")
    return codes
