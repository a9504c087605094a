"""The words that specifications and results share: scales, kinds of cells, states, coordinates and amounts."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

SCALES = ("smoke", "cpu", "paper")
Scale = Literal["smoke", "cpu", "paper"]
# The subject of a cell: a tuned model's accuracy; peak memory of the process; seconds per step; memory by formula
# beside the measured memory; the error of a gradient estimate.
Kind = Literal["accuracy", "memory", "time", "theory", "quality"]
Status = Literal["done", "failed", "timed_out", "out_of_memory"]
# Status of a cell's stored result, or why there is none that is current.
State = Literal["missing", "done", "stale", "failed", "timed_out", "out_of_memory"]
# The options in which results of one kind agree, for `zotune bench verify`: all but amounts, or method and tuning.
Alike = Literal["options", "method"]
Coordinate = str | int | float

_AMOUNTS = frozenset({"num_forwards", "forward_equivalents", "layer_passes", "num_tokens", "seconds", "peak_memory"})
_AMOUNT_WORDS = frozenset({"bytes", "seconds"})


class Record(BaseModel):
    """A frozen model that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def is_amount(quantity: str) -> bool:
    """Whether a quantity is an amount (passes, tokens, seconds, bytes) or a ratio `A/B`; these compare by their ratio.

    >>> is_amount("peak_memory"), is_amount("formula_bytes"), is_amount("a/b"), is_amount("accuracy")
    (True, True, True, False)
    """
    return "/" in quantity or quantity in _AMOUNTS or not _AMOUNT_WORDS.isdisjoint(quantity.split("_"))
