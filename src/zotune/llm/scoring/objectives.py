"""The objectives: candidates are scored by their log-probability, and the scores make the loss.

A candidate's score is the mean log-probability of its tokens after the prompt, the prediction the best
score (Malladi et al., 2023, appendix E; the paper, section 4.1). The loss is the softmax cross-entropy
over the candidates' scores, or teacher forcing: the cross-entropy of the right candidate's own tokens.
All of it in float32 or better, whatever the model's precision.

What costs time and changes nothing is left out: the head is computed only at the positions that are
scored, and only for the candidates' own tokens where each candidate is a single token, for then the
normaliser cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from zotune.llm.data.collator import Batch, on_device
from zotune.llm.data.tokenization import Candidate, Encoded
from zotune.llm.models.logprobs import losses


class Objective(Protocol):
    """What is minimised: a mean over examples, made of their candidates' scores."""

    name: str
    exact: bool
    """Whether scores must be log-probabilities, not only up to a constant an example."""

    def reads(self, example: Encoded) -> Encoded:
        """The part of an example that its loss depends on: all that training has to compute."""

    def weight(self, example: Encoded) -> int:
        """The example's share in a mean."""

    def losses(self, score: Tensor, batch: Batch) -> Tensor:
        """(examples,) losses, float64, from (examples, candidates) scores."""


class Classification:
    """Softmax cross-entropy over the candidates' scores; each example counts once."""

    name, exact = "classification", False

    def reads(self, example: Encoded) -> Encoded:
        """All candidates."""
        return example

    def weight(self, example: Encoded) -> int:
        """One."""
        return 1

    def losses(self, score: Tensor, batch: Batch) -> Tensor:
        """As `losses`."""
        return losses(score, batch)


class TeacherForcing:
    """Token cross-entropy of the right candidate alone; each of its tokens counts once, so that long ones weigh more.

    Over a batch it is the sum over all of these tokens by their number (Malladi et al., 2023, appendix E).
    """

    name, exact = "teacher forcing", True

    def reads(self, example: Encoded) -> Encoded:
        """The right candidate."""
        right = example.candidates[example.label]
        alone = Candidate(0, right.positions, right.tokens)
        return replace(example, sequences=(example.sequences[right.sequence],), candidates=(alone,), label=0)

    def weight(self, example: Encoded) -> int:
        """The right candidate's tokens."""
        return len(example.candidates[example.label].tokens)

    def losses(self, score: Tensor, batch: Batch) -> Tensor:
        """The right candidate's score, negated."""
        return -score.gather(1, batch.labels[:, None])[:, 0]


class Accuracy:
    """Minus 1 where the best candidate is a right one, else 0: their mean is minus the accuracy. Without a gradient."""

    name, exact = "accuracy", False

    def reads(self, example: Encoded) -> Encoded:
        """All candidates."""
        return example

    def weight(self, example: Encoded) -> int:
        """One."""
        return 1

    def losses(self, score: Tensor, batch: Batch) -> Tensor:
        """Of equal scores the first is the best."""
        return -batch.right.gather(1, score.argmax(dim=1, keepdim=True))[:, 0].double()


CLASSIFICATION, TEACHER_FORCING, ACCURACY = Classification(), TeacherForcing(), Accuracy()

OBJECTIVES: dict[str, Objective] = {
    "classification": CLASSIFICATION,
    "teacher_forcing": TEACHER_FORCING,
    "accuracy": ACCURACY,
}
"""The objectives made of candidates' scores, by the name of the option."""


def mean_losses(
    objective: Objective, score: Tensor, batch: Batch, examples: Sequence[Encoded], copies: int = 1
) -> Tensor:
    """(copies,) the objective's value: means by the examples' weights, of a batch of so many copies of the examples."""
    weights = on_device([objective.weight(e) for e in examples], score.device, torch.float64)
    each = objective.losses(score, batch).view(copies, len(examples))
    return (each * weights).sum(dim=1) / weights.sum()


def mean_loss(objective: Objective, score: Tensor, batch: Batch, examples: Sequence[Encoded]) -> Tensor:
    """The mean of a batch's losses by the examples' weights: the objective's value."""
    return mean_losses(objective, score, batch, examples)[0]
