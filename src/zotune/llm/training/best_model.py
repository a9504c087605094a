"""Which step of a run is best, by its held-out rows alone; its weights are kept and come back to the bit.

Rows that are reported on take no part: choosing by them would make the report optimistic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from zotune.errors import RunError, UsageError
from zotune.llm.config.selection import SelectionOptions
from zotune.llm.data.tokenization import Encoded
from zotune.llm.models.cache_storage import File, Kept, Memory
from zotune.llm.scoring.accuracy import Measured
from zotune.messages import say

# Tuned numbers up to so many bytes are kept in memory, more of them in a file of the output folder.
MAX_MEMORY = 256 * 2**20


def is_better(found: Measured, best: Measured | None, by: Literal["loss", "metric"]) -> bool:
    """Whether an evaluation beats the best one before it: of equals the earlier stays, and NaN beats nothing."""
    value = _merit(found, by)
    return not math.isnan(value) and (best is None or value > _merit(best, by))


def _merit(found: Measured, by: Literal["loss", "metric"]) -> float:
    """What is to be as high as it can."""
    if by == "loss":
        return -found.loss
    return found.value if found.higher_is_better else -found.value


class Selection:
    """The best evaluation of a run so far, and where asked for the tuned weights as they were then.

    Args:
        options: what is best, whether its weights are kept, and how long to wait for a better one.
        tuned: the parameters that the run changes.
        folder: where they are kept if they are large: in a file without a name, which no crash leaves behind.

    Attributes:
        step, best: when the best evaluation was, and what it found; None before the first.
        waited: evaluations since then.
    """

    def __init__(self, options: SelectionOptions, tuned: Sequence[nn.Parameter], folder: Path) -> None:
        self._options, self._tuned, self._folder = options, tuple(tuned), folder
        self._weights = Kept()
        self.step: int | None = None
        self.best: Measured | None = None
        self.waited = 0

    @property
    def is_over(self) -> bool:
        """Whether patience has run out."""
        patience = self._options.early_stopping_patience
        return patience is not None and self.waited >= patience

    def see(self, step: int, found: Measured) -> None:
        """Take note of the evaluation after `step`.

        Raises:
            RunError: the weights are a new best and there is no room to keep them.
        """
        if not self._options.selects:
            return
        if not is_better(found, self.best, self._options.metric_for_best_model):
            self.waited += 1
            return
        if self._options.load_best_model_at_end:
            self._weights = self._copy()
        self.step, self.best, self.waited = step, found, 0

    def restore(self) -> None:
        """Put the best step's weights back, where they were kept."""
        if self.step is None or not self._options.load_best_model_at_end:
            return
        with torch.no_grad():
            for i, p in enumerate(self._tuned):
                kept = self._weights.get((i,))
                assert kept is not None
                p.copy_(kept)

    def _copy(self) -> Kept:
        """The tuned weights as they are now."""
        num_bytes = sum(8 * -(-p.nbytes // 8) for p in self._tuned)
        kept = Kept([Memory(num_bytes) if num_bytes <= MAX_MEMORY else File(num_bytes, self._folder)])
        for i, p in enumerate(self._tuned):
            if not kept.put((i,), p.detach()):
                raise RunError(
                    f"the best model so far could not be kept in {self._folder}: it takes {num_bytes / 1e6:.0f} MB. "
                    "Make room, choose another --output-dir, or leave out --load-best-model-at-end."
                )
        return kept


def check_rows(options: SelectionOptions, dev: Sequence[Encoded], test: Sequence[Encoded]) -> None:
    """Say where the rows that choose the best step are those that are reported on.

    Raises:
        UsageError: there are none to choose by.
    """
    if not options.selects:
        return
    if not dev:
        raise UsageError("there is no held-out row to choose the best step by: give --num-dev above 0.")
    if test and set(test) <= set(dev):
        say(
            "the rows that choose the best step are also those that are reported on, which makes the report "
            "optimistic; give --eval-file for rows that chose nothing"
        )
