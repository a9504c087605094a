"""The mean log-loss of the scored tokens of texts, and its exponential, the perplexity."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from zotune.llm.data.collator import collate
from zotune.llm.data.tokenization import Encoded
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.scoring.accuracy import Evaluation, Scorer, batches_by_length
from zotune.llm.scoring.finite import check_scores
from zotune.llm.scoring.intervals import ratio_interval
from zotune.llm.scoring.objectives import TEACHER_FORCING, Objective


@dataclass(frozen=True, repr=False)
class LogLossEvaluation(Evaluation):
    """The mean of -ln p over all scored tokens, in nats per token; lower is better.

    Attributes:
        log_loss: that mean, with the interval of a ratio of two sums over examples; predictions are the means of the
            examples.
        perplexity: exponential of the log-loss.
    """

    metric = "log_loss"
    higher_is_better = False
    is_fraction = False

    log_loss: float
    perplexity: float

    @property
    def value(self) -> float:
        """The log-loss."""
        return self.log_loss

    @property
    def short(self) -> str:
        """The log-loss as short text."""
        return f"{self.log_loss:.4f} nats a token"

    def __str__(self) -> str:
        return (
            f"{self.short} ({self.low:.4f} to {self.high:.4f}, n = {self.num_examples}), "
            f"perplexity {self.perplexity:.4g}"
        )


def evaluate_log_loss(
    lm: LanguageModel,
    examples: Sequence[Encoded],
    batch_size: int,
    scorer: Scorer | None = None,
    objective: Objective = TEACHER_FORCING,
) -> LogLossEvaluation:
    """Evaluate the log-loss of the right candidates' tokens, in batches of examples of similar length.

    Raises:
        NonFiniteScoreError: the log-loss of an example is NaN or infinite.
    """
    start, forwards_before = time.perf_counter(), lm.num_forwards
    batches = list(batches_by_length(examples, batch_size))

    def scored(indices: Sequence[int]) -> list[float]:
        some = [examples[i] for i in indices]
        batch = collate(some, lm.pad_token_id, lm.device, exact=objective.exact)
        losses = objective.losses((scorer or lm.score)(batch), batch)
        check_scores(-losses[:, None], some)
        return losses.tolist()

    with torch.no_grad():
        found = lm.mesh.map(scored, batches)
    means = [0.0] * len(examples)
    for indices, losses in zip(batches, found, strict=True):
        for i, loss in zip(indices, losses, strict=True):
            means[i] = loss
    tokens = [objective.weight(e) for e in examples]
    mean = sum(m * n for m, n in zip(means, tokens, strict=True)) / sum(tokens)
    low, high = ratio_interval([m * n for m, n in zip(means, tokens, strict=True)], tokens)
    return LogLossEvaluation(
        log_loss=mean,
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        low=low,
        high=high,
        num_examples=len(examples),
        loss=mean,
        predictions=tuple(means),
        seconds=time.perf_counter() - start,
        num_forwards=lm.num_forwards - forwards_before,
    )
