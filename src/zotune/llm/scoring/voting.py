"""The answers that most of several models give: a vote on each row's candidates.

Source: Gan and Isola, 2026 (Neural Thickets), whose random points vote.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from zotune.errors import UsageError
from zotune.llm.data.tokenization import Encoded
from zotune.llm.scoring.accuracy import AccuracyEvaluation, Evaluation
from zotune.methods.randopt import counted


def elected(voters: Sequence[Evaluation], examples: Sequence[Encoded]) -> AccuracyEvaluation:
    """The evaluation of what most voters answer to each example; of equally frequent answers the first counts.

    Args:
        voters: an evaluation of each, on these examples.
        examples: with candidates.

    Returns:
        The accuracy of the majority. `loss` is the mean of the voters' losses, `num_ties` the examples with several
        most frequent answers; `scores` are left out, for a majority has none.

    Raises:
        UsageError: the voters were not asked to choose among candidates.
    """
    chosen = [v.predictions for v in voters if isinstance(v, AccuracyEvaluation)]
    if len(chosen) < len(voters):
        raise UsageError(
            f"--vote counts choices among candidates, but these rows are judged by {voters[0].metric}. Leave it out: "
            "then the weights that the run saved are measured."
        )
    counts = counted(torch.tensor(chosen))
    best = counts.argmax(dim=0).tolist()
    return AccuracyEvaluation.of(
        best,
        examples,
        loss=sum(v.loss for v in voters) / len(voters),
        seconds=sum(v.seconds for v in voters),
        num_forwards=sum(v.num_forwards for v in voters),
        num_ties=int(((counts == counts.amax(dim=0)).sum(dim=0) > 1).sum()),
    )
