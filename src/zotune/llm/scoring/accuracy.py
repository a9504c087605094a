"""The accuracy of a model on some examples, with its 95 % interval; examples are batched by length."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from zotune.errors import UsageError
from zotune.llm.data.collator import Batch, collate
from zotune.llm.data.tokenization import Encoded
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.scoring.finite import check_scores
from zotune.llm.scoring.intervals import wilson
from zotune.llm.scoring.objectives import CLASSIFICATION, Objective

Scorer = Callable[[Batch], Tensor]


@dataclass(frozen=True, repr=False)
class Evaluation:
    """The result of an evaluation; each metric is a subclass with a field of its own.

    Attributes:
        low, high: 95 % interval of the metric.
        num_examples: number of examples.
        loss: mean of the objective.
        predictions: prediction for each example, in order.
        seconds: duration; num_forwards: number of forward passes.
        values: value of each example, if the metric is their mean.
        more: further metrics by name, of the option `compute_metrics`.
    """

    metric: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    is_fraction: ClassVar[bool] = True
    # The metric in words, where its name does not say which one it is.
    title: ClassVar[str] = ""
    _not_in_summary: ClassVar[tuple[str, ...]] = ("predictions", "values", "scores", "more")

    low: float
    high: float
    num_examples: int
    loss: float
    predictions: tuple[Any, ...] = field(repr=False)
    seconds: float
    num_forwards: int
    values: tuple[float, ...] = field(default=(), kw_only=True, repr=False)
    more: Mapping[str, float] = field(default_factory=dict, kw_only=True)

    @property
    def value(self) -> float:
        """The value of the metric; in [0, 1] if it is a fraction."""
        raise NotImplementedError

    @property
    def short(self) -> str:
        """The value as short text."""
        return f"{100 * self.value:.1f} %"

    def summary(self) -> dict[str, Any]:
        """Return all fields except those with an entry per example, and further metrics; the metric comes first."""
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in self._not_in_summary}
        return {self.metric: self.value, **rest, **self.more}

    @property
    def line(self) -> str:
        """The metric by name with its interval, and the loss unless that is the metric."""
        loss = "" if self.loss == self.value else f", loss {self.loss:.4f}"
        return f"{self.named}{loss}"

    @property
    def named(self) -> str:
        """The metric by name with its interval."""
        return f"{self.title or self.metric.replace('_', '-')} {self}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.line}>"

    def __str__(self) -> str:
        return f"{self.short} ({100 * self.low:.1f} to {100 * self.high:.1f}, n = {self.num_examples})"


@dataclass(frozen=True, repr=False)
class AccuracyEvaluation(Evaluation):
    """The fraction of examples whose best-scored candidate is a right one.

    Attributes:
        accuracy: that fraction, with Wilson's interval; predictions are indices of candidates.
        scores: normalised log-probabilities of each example's candidates: up to a constant per example, the mean
            log-probabilities of their tokens.
        num_ties: examples with several best candidates, of which the first is the prediction.
    """

    metric = "accuracy"

    accuracy: float
    scores: tuple[tuple[float, ...], ...] = field(default=(), kw_only=True, repr=False)
    num_ties: int = field(default=0, kw_only=True)

    @classmethod
    def of(cls, predictions: Sequence[int], examples: Sequence[Encoded], **others: Any) -> Self:
        """The accuracy of some predictions, an index of a candidate for each example; `others` are attributes."""
        is_right = tuple(float(e.is_right(p)) for p, e in zip(predictions, examples, strict=True))
        hits = int(sum(is_right))
        low, high = wilson(hits, len(examples))
        return cls(
            accuracy=hits / len(examples),
            low=low,
            high=high,
            num_examples=len(examples),
            predictions=tuple(predictions),
            values=is_right,
            **others,
        )

    @property
    def value(self) -> float:
        """The accuracy."""
        return self.accuracy

    def __str__(self) -> str:
        ties = f"; {self.num_ties} with equal best scores, of which the first counts" if self.num_ties else ""
        return super().__str__() + ties


class Measure(Protocol):
    """An evaluation function, such as `evaluate_accuracy`, or `evaluate_answers` for F1."""

    def __call__(
        self,
        lm: LanguageModel,
        examples: Sequence[Encoded],
        batch_size: int,
        scorer: Scorer | None = None,
        objective: Objective = CLASSIFICATION,
    ) -> Evaluation:
        """Evaluate all examples in batches."""


def batches_by_length(examples: Sequence[Encoded], batch_size: int) -> Iterator[list[int]]:
    """Yield batches of indices of the examples, the longest examples first.

    Raises:
        UsageError: there is no example, so that no metric has a value.
    """
    if not examples:
        raise UsageError("there is no row to evaluate on; give at least one.")
    if batch_size < 1:
        raise UsageError(f"the batch size of an evaluation must be at least 1, got {batch_size}.")
    order = sorted(range(len(examples)), key=lambda i: -examples[i].length)
    for lo in range(0, len(order), batch_size):
        yield order[lo : lo + batch_size]


def evaluate_accuracy(
    lm: LanguageModel,
    examples: Sequence[Encoded],
    batch_size: int,
    scorer: Scorer | None = None,
    objective: Objective = CLASSIFICATION,
) -> AccuracyEvaluation:
    """Evaluate the accuracy, in batches of examples of similar length.

    The result is the same as for one example at a time, up to the rounding of batched matrix products.

    Raises:
        NonFiniteScoreError: an example has no candidate with a finite score, or one whose score is NaN.
    """
    start, forwards_before = time.perf_counter(), lm.num_forwards
    batches = list(batches_by_length(examples, batch_size))
    score_of = partial(_scored, lm, scorer or lm.score, objective)
    with torch.no_grad():
        found = lm.mesh.map(lambda indices: score_of([examples[i] for i in indices]), batches)
    predictions = [0] * len(examples)
    scores: list[tuple[float, ...]] = [()] * len(examples)
    for indices, batch in zip(batches, found, strict=True):
        for i, best, row in zip(indices, batch.best, batch.scores, strict=True):
            predictions[i], scores[i] = best, row
    return AccuracyEvaluation.of(
        predictions,
        examples,
        loss=sum(batch.loss for batch in found) / sum(map(objective.weight, examples)),
        seconds=time.perf_counter() - start,
        num_forwards=lm.num_forwards - forwards_before,
        scores=tuple(scores),
        num_ties=sum(batch.num_ties for batch in found),
    )


class _Scored(NamedTuple):
    """What a batch adds to an evaluation: each example's best candidate and scores, the sum of losses, the ties."""

    best: list[int]
    scores: list[tuple[float, ...]]
    loss: float
    num_ties: int


def _scored(lm: LanguageModel, scorer: Scorer, objective: Objective, examples: Sequence[Encoded]) -> _Scored:
    batch = collate(examples, lm.pad_token_id, lm.device, exact=objective.exact)
    score = scorer(batch)
    check_scores(score, examples)
    weights = torch.tensor([objective.weight(e) for e in examples], dtype=torch.float64, device=score.device)
    return _Scored(
        score.argmax(dim=1).tolist(),
        [tuple(row[:n]) for row, n in zip(score.log_softmax(dim=1).tolist(), batch.counts, strict=True)],
        float((objective.losses(score, batch) * weights).sum()),
        int(((score == score.amax(dim=1, keepdim=True)).sum(dim=1) > 1).sum()),
    )
