"""Tracking the best step of a run by its held-out rows, and restoring the weights of that step bit for bit.

The evaluation rows are not used, because selecting by them would make the report too optimistic.
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
from zotune.llm.models.activation_storage.tiers import ActivationStore, FileTier, MemoryTier
from zotune.llm.scoring.accuracy import Evaluation
from zotune.messages import say
from zotune.model.mapped_memory import release
from zotune.model.shards import local
from zotune.model.streaming import settle_tensors

# Tuned weights of up to this many bytes are stored in memory, larger ones in a file of the output folder.
MAX_MEMORY = 256 * 2**20


def is_better(evaluation: Evaluation, best: Evaluation | None, by: Literal["loss", "metric"]) -> bool:
    """Whether an evaluation is better than the best one before it; equal values and NaN are not."""
    value = _merit(evaluation, by)
    return not math.isnan(value) and (best is None or value > _merit(best, by))


def _merit(evaluation: Evaluation, by: Literal["loss", "metric"]) -> float:
    """Return the value to maximise."""
    if by == "loss":
        return -evaluation.loss
    return evaluation.value if evaluation.higher_is_better else -evaluation.value


class BestModelTracker:
    """The best evaluation of a run so far and, if asked for, a copy of the tuned weights at that step.

    Args:
        options: the criterion, whether to store the weights, and the patience of early stopping.
        tuned: the tuned parameters.
        folder: folder for a copy that is too large for memory; its file has no name, so a crash leaves nothing behind.
            None: each copy is in memory.

    Attributes:
        step, best: step and result of the best evaluation; None before the first one.
        num_waited: evaluations since then.
    """

    def __init__(self, options: SelectionOptions, tuned: Sequence[nn.Parameter], folder: Path | None) -> None:
        self._options, self._tuned, self._folder = options, tuple(tuned), folder
        self._weights = ActivationStore()
        self.step: int | None = None
        self.best: Evaluation | None = None
        self.num_waited = 0

    @property
    def is_exhausted(self) -> bool:
        """Whether the patience of early stopping is exhausted."""
        patience = self._options.early_stopping_patience
        return patience is not None and self.num_waited >= patience

    def observe(self, step: int, evaluation: Evaluation) -> None:
        """Compare the evaluation after `step` with the best one, and store the weights if it is better.

        Raises:
            RunError: there is no room to store the weights.
        """
        if not self._options.selects:
            return
        if not is_better(evaluation, self.best, self._options.metric_for_best_model):
            self.num_waited += 1
            return
        if self._options.load_best_model_at_end:
            self._weights = copy_weights(
                self._tuned,
                self._folder,
                "Make room, choose another --output-dir, or leave out --load-best-model-at-end.",
            )
        self.step, self.best, self.num_waited = step, evaluation, 0

    def restore(self) -> None:
        """Restore the weights of the best step, if they were stored."""
        if self.step is None or not self._options.load_best_model_at_end:
            return
        restore_weights(self._tuned, self._weights)


def copy_weights(tuned: Sequence[nn.Parameter], folder: Path | None, remedy: str) -> ActivationStore:
    """Return a copy of weights: in memory up to `MAX_MEMORY` bytes, else in a file without a name in `folder`, if any.

    Raises:
        RunError: there is no room; the message ends with `remedy`.
    """
    settle_tensors(tuned)
    tuned = [local(p) for p in tuned]
    num_bytes = sum(8 * -(-p.nbytes // 8) for p in tuned)
    on_disk = folder if num_bytes > MAX_MEMORY else None
    store = ActivationStore([MemoryTier(num_bytes) if on_disk is None else FileTier(num_bytes, on_disk)])
    for i, p in enumerate(tuned):
        is_stored = store.put((i,), p.detach())
        release(p.detach())
        if not is_stored:
            raise RunError(
                f"a copy of the tuned weights could not be stored in {folder or 'memory'}: it takes "
                f"{num_bytes / 1e6:.0f} MB. {remedy}"
            )
    return store


@torch.no_grad()
def restore_weights(tuned: Sequence[nn.Parameter], store: ActivationStore) -> None:
    """Set weights to their copies, bit for bit."""
    settle_tensors(tuned)
    for i, p in enumerate(tuned):
        weights = store.get((i,))
        assert weights is not None
        local(p).copy_(weights)
        release(p.detach())


def check_rows(options: SelectionOptions, dev: Sequence[Encoded], test: Sequence[Encoded]) -> None:
    """Warn if the rows that select the best step are also the evaluation rows.

    Raises:
        UsageError: there are no held-out rows to select by.
    """
    if not options.selects:
        return
    if not dev:
        raise UsageError("there is no held-out row to select the best step by: give --num-dev above 0.")
    if test and set(test) <= set(dev):
        say(
            "the rows that select the best step are also the evaluation rows, which makes the report too "
            "optimistic; give other evaluation rows"
        )
