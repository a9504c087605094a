"""Accuracy with its 95 % interval, in batches of examples of similar length."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from zotune.llm.models import LanguageModel
from zotune.llm.objective import Batch, Encoded, collate, losses

Scorer = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Evaluation:
    """How a model did on some examples.

    Attributes:
        accuracy: fraction of examples whose best-scored candidate is the right one.
        low, high: its 95 % interval (Wilson).
        num_examples: how many.
        loss: mean softmax cross-entropy over the candidates.
        predictions: the best-scored candidate of each example, in their order.
        seconds: how long it took; num_forwards: forward passes it took.
    """

    accuracy: float
    low: float
    high: float
    num_examples: int
    loss: float
    predictions: tuple[int, ...]
    seconds: float
    num_forwards: int

    def summary(self) -> dict[str, Any]:
        """Everything but the single predictions."""
        return {k: v for k, v in asdict(self).items() if k != "predictions"}

    def __str__(self) -> str:
        return f"{100 * self.accuracy:.1f} % ({100 * self.low:.1f} to {100 * self.high:.1f}, n = {self.num_examples})"


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a success rate.

    >>> [round(end, 3) for end in wilson(80, 100)]
    [0.711, 0.867]
    """
    from scipy.stats import binomtest

    interval = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def evaluate(
    lm: LanguageModel, examples: Sequence[Encoded], batch_size: int, scorer: Scorer | None = None
) -> Evaluation:
    """Score all examples, longest first within equal batches; the same as scoring them one by one."""
    began, forwards_before = time.perf_counter(), lm.num_forwards
    score_of = scorer or lm.score
    order = sorted(range(len(examples)), key=lambda i: -examples[i].length)
    predictions, total = [0] * len(examples), 0.0
    with torch.no_grad():
        for lo in range(0, len(order), batch_size):
            chosen = order[lo : lo + batch_size]
            batch = collate([examples[i] for i in chosen], lm.pad_token_id, lm.device)
            score = score_of(batch)
            total += float(losses(score, batch).sum())
            for i, best in zip(chosen, score.argmax(dim=1).tolist(), strict=True):
                predictions[i] = best
    hits = sum(p == e.label for p, e in zip(predictions, examples, strict=True))
    n = len(examples)
    return Evaluation(
        hits / n,
        *wilson(hits, n),
        num_examples=n,
        loss=total / n,
        predictions=tuple(predictions),
        seconds=time.perf_counter() - began,
        num_forwards=lm.num_forwards - forwards_before,
    )
