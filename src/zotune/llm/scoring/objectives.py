"""Objectives made of candidates' scores: classification, teacher forcing, accuracy.

A candidate's score is the mean log-probability of its tokens after the prompt; the prediction is the candidate with
the best score (Malladi et al., 2023, appendix E; the paper, section 4.1). The loss is the softmax cross-entropy over
the candidates' scores, or for teacher forcing the cross-entropy of the right candidate's tokens. Scores and losses are
computed in float32 or better, whatever the precision of the model.

Unneeded work is skipped: the head is computed only at the scored positions, and only for the candidates' tokens if
each candidate is a single token, because the normaliser then cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from zotune.llm.data.collator import Batch, on_device
from zotune.llm.data.tokenization import Candidate, Encoded
from zotune.llm.models.candidate_scores import losses


class Objective(Protocol):
    """An objective to minimise: a weighted mean over examples of a loss of their candidates' scores."""

    name: str
    exact: bool
    """Whether scores must be log-probabilities, not only up to a constant per example."""

    def reads(self, example: Encoded) -> Encoded:
        """Return the part of an example that its loss depends on, which is all that training computes."""

    def weight(self, example: Encoded) -> int:
        """Return the example's weight in a mean."""

    def losses(self, score: Tensor, batch: Batch) -> Tensor:
        """Return (examples,) losses in float64 from (examples, candidates) scores."""


class Classification:
    """Softmax cross-entropy over the candidates' scores; each example counts once."""

    name, exact = "classification", False

    def reads(self, example: Encoded) -> Encoded:
        """Return the whole example: all candidates are scored."""
        return example

    def weight(self, example: Encoded) -> int:
        """Return 1."""
        return 1

    def losses(self, score: Tensor, batch: Batch) -> Tensor:
        """Return the cross-entropies."""
        return losses(score, batch)


class TeacherForcing:
    """Cross-entropy of the tokens of the right candidate; each token counts once, so longer candidates weigh more.

    Over a batch it is the mean over all of these tokens (Malladi et al., 2023, appendix E).
    """

    name, exact = "teacher forcing", True

    def reads(self, example: Encoded) -> Encoded:
        """Return the example with its right candidate only."""
        right = example.candidates[example.label]
        only = Candidate(0, right.positions, right.tokens)
        return replace(example, sequences=(example.sequences[right.sequence],), candidates=(only,), label=0)

    def weight(self, example: Encoded) -> int:
        """Return the number of tokens of the right candidate."""
        return len(example.candidates[example.label].tokens)

    def losses(self, score: Tensor, batch: Batch) -> Tensor:
        """Return the negated score of the right candidate."""
        return -score.gather(1, batch.labels[:, None])[:, 0]


class Accuracy:
    """Minus 1 if the best candidate is a right one, else 0; the mean is minus the accuracy, and has no gradient."""

    name, exact = "accuracy", False

    def reads(self, example: Encoded) -> Encoded:
        """Return the whole example: all candidates are scored."""
        return example

    def weight(self, example: Encoded) -> int:
        """Return 1."""
        return 1

    def losses(self, score: Tensor, batch: Batch) -> Tensor:
        """Return -1 or 0 for each example, NaN without finite scores; of equal scores the first counts as the best."""
        best = score.max(dim=1, keepdim=True)
        hits = batch.right.gather(1, best.indices)[:, 0].double()
        return torch.where(best.values[:, 0].isfinite(), -hits, torch.nan)


CLASSIFICATION, TEACHER_FORCING, ACCURACY = Classification(), TeacherForcing(), Accuracy()

OBJECTIVES: dict[str, Objective] = {
    "classification": CLASSIFICATION,
    "teacher_forcing": TEACHER_FORCING,
    "accuracy": ACCURACY,
}
"""The objectives made of candidates' scores, by the value of the option `objective`."""


def mean_loss(objective: Objective, score: Tensor, batch: Batch, examples: Sequence[Encoded]) -> Tensor:
    """Return the value of the objective: the mean of a batch's losses by the examples' weights."""
    weights = on_device([objective.weight(e) for e in examples], score.device, torch.float64)
    return (objective.losses(score, batch) * weights).sum() / weights.sum()
