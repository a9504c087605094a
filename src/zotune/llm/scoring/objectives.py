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
import torch.nn.functional as F
from torch import Tensor

from zotune.llm.data.tokenization import Batch, Candidate, Encoded, on_device


def scores(logits: Tensor, batch: Batch) -> Tensor:
    """(examples, most candidates) mean log-probabilities from (N, V) logits; absent candidates are -inf."""
    return scores_of_tokens(log_probabilities(logits, batch.rows, batch.tokens), batch)


def log_probabilities(logits: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """(M,) log-probabilities in float32 of the `tokens` (M,) at the `rows` (M,) of (N, V) logits."""
    logits = logits.float()
    return logits[rows, tokens] - torch.logsumexp(logits, dim=1)[rows]


def scores_of_tokens(picked: Tensor, batch: Batch) -> Tensor:
    """(examples, most candidates) means of (M,) log-probabilities of the candidates' tokens."""
    total = torch.zeros(len(batch.lengths), dtype=torch.float64, device=picked.device)
    return _by_example(total.index_add(0, batch.owners, picked.double()) / batch.lengths, batch)


def scores_of_single_tokens(logits: Tensor, batch: Batch) -> Tensor:
    """The same up to a constant an example, from (N, K) logits of the candidates' distinct tokens alone."""
    return _by_example(logits.float()[batch.rows, batch.distinct[1]].double(), batch)


def _by_example(values: Tensor, batch: Batch) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(
        list(torch.split(values, list(batch.counts))), batch_first=True, padding_value=float("-inf")
    )


def losses(score: Tensor, batch: Batch) -> Tensor:
    """(examples,) softmax cross-entropy over the candidates, in double precision."""
    return F.cross_entropy(score, batch.labels, reduction="none")


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
