"""How surprised a model is by texts: mean log-loss of the scored tokens and its exponential, the perplexity."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from zotune.llm.data.tokenization import Encoded, collate
from zotune.llm.models.load import LanguageModel
from zotune.llm.scoring.accuracy import Measured, Scorer, by_length
from zotune.llm.scoring.intervals import ratio_interval
from zotune.llm.scoring.objectives import TEACHER_FORCING, Objective


@dataclass(frozen=True)
class LogLossEvaluation(Measured):
    """The mean over all scored tokens of -ln p, in nats a token; the lower the better.

    Attributes:
        log_loss: that mean; its interval is that of a ratio of two sums over examples. Predictions are each example's
            own mean.
        perplexity: its exponential.
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
        """The log-loss in a word."""
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
    """The log-loss of the right candidates' tokens, in batches of examples of similar length."""
    began, forwards_before = time.perf_counter(), lm.num_forwards
    means = [0.0] * len(examples)
    with torch.no_grad():
        for chosen in by_length(examples, batch_size):
            batch = collate([examples[i] for i in chosen], lm.pad_token_id, lm.device, exact=objective.exact)
            found = objective.losses((scorer or lm.score)(batch), batch)
            for i, loss in zip(chosen, found.tolist(), strict=True):
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
        seconds=time.perf_counter() - began,
        num_forwards=lm.num_forwards - forwards_before,
    )
