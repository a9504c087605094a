"""How good a model is on some examples: accuracy with its 95 % interval, in batches of similar length."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from zotune.llm.data.tokenization import Batch, Encoded, collate
from zotune.llm.models.load import LanguageModel
from zotune.llm.scoring.intervals import wilson
from zotune.llm.scoring.objectives import CLASSIFICATION, Objective

Scorer = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Measured:
    """What an evaluation found; each metric is a subclass with its own first field.

    Attributes:
        low, high: the metric's 95 % interval.
        num_examples: how many.
        loss: mean of the objective.
        predictions: of each example, in their order.
        seconds: how long it took; num_forwards: forward passes it took.
        values: each example's part in the metric, where that is their mean.
    """

    metric: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    is_fraction: ClassVar[bool] = True
    _of_each_example: ClassVar[tuple[str, ...]] = ("predictions", "values", "scores")

    low: float
    high: float
    num_examples: int
    loss: float
    predictions: tuple[Any, ...]
    seconds: float
    num_forwards: int
    values: tuple[float, ...] = field(default=(), kw_only=True)

    @property
    def value(self) -> float:
        """The metric: in [0, 1] where it is a fraction."""
        raise NotImplementedError

    @property
    def short(self) -> str:
        """The metric in a word."""
        return f"{100 * self.value:.1f} %"

    def summary(self) -> dict[str, Any]:
        """Everything but what there is of each example, the metric first."""
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in self._of_each_example}
        return {self.metric: self.value, **rest}

    def __str__(self) -> str:
        return f"{self.short} ({100 * self.low:.1f} to {100 * self.high:.1f}, n = {self.num_examples})"


@dataclass(frozen=True)
class Evaluation(Measured):
    """How often the best-scored candidate is a right one.

    Attributes:
        accuracy: that fraction, with Wilson's interval; predictions are indices of candidates.
        scores: of each example's candidates, as log-probabilities among them: up to a constant an example, the mean
            log-probability of a candidate's tokens.
    """

    metric = "accuracy"

    accuracy: float
    scores: tuple[tuple[float, ...], ...] = field(default=(), kw_only=True)

    @property
    def value(self) -> float:
        """The accuracy."""
        return self.accuracy


class Measure(Protocol):
    """A way to evaluate: `evaluate` for accuracy, `evaluate_answers` for F1."""

    def __call__(
        self,
        lm: LanguageModel,
        examples: Sequence[Encoded],
        batch_size: int,
        scorer: Scorer | None = None,
        objective: Objective = CLASSIFICATION,
    ) -> Measured:
        """Evaluate all examples."""


def by_length(examples: Sequence[Encoded], batch_size: int) -> Iterator[list[int]]:
    """Indices of the examples in batches, longest first."""
    order = sorted(range(len(examples)), key=lambda i: -examples[i].length)
    for lo in range(0, len(order), batch_size):
        yield order[lo : lo + batch_size]


def evaluate(
    lm: LanguageModel,
    examples: Sequence[Encoded],
    batch_size: int,
    scorer: Scorer | None = None,
    objective: Objective = CLASSIFICATION,
) -> Evaluation:
    """Score all candidates, in batches of examples of similar length; the same as scoring them one by one."""
    began, forwards_before = time.perf_counter(), lm.num_forwards
    score_of = scorer or lm.score
    predictions, total = [0] * len(examples), 0.0
    scores: list[tuple[float, ...]] = [()] * len(examples)
    with torch.no_grad():
        for chosen in by_length(examples, batch_size):
            some = [examples[i] for i in chosen]
            batch = collate(some, lm.pad_token_id, lm.device, exact=objective.exact)
            score = score_of(batch)
            weights = torch.tensor([objective.weight(e) for e in some], dtype=torch.float64, device=score.device)
            total += float((objective.losses(score, batch) * weights).sum())
            found = zip(score.argmax(dim=1).tolist(), score.log_softmax(dim=1).tolist(), batch.counts, strict=True)
            for i, (best, row, count) in zip(chosen, found, strict=True):
                predictions[i], scores[i] = best, tuple(row[:count])
    right = tuple(float(e.is_right(p)) for p, e in zip(predictions, examples, strict=True))
    hits = int(sum(right))
    low, high = wilson(hits, len(examples))
    return Evaluation(
        accuracy=hits / len(examples),
        low=low,
        high=high,
        num_examples=len(examples),
        loss=total / sum(map(objective.weight, examples)),
        predictions=tuple(predictions),
        seconds=time.perf_counter() - began,
        num_forwards=lm.num_forwards - forwards_before,
        values=right,
        scores=tuple(scores),
    )
