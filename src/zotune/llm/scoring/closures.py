"""Closures of the mean loss of candidates' scores: what a step of training evaluates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zotune.estimate.objective import Batched
from zotune.estimate.per_example.objective import EachRow, PerExample
from zotune.llm.data.collator import collate
from zotune.llm.data.tokenization import Encoded
from zotune.llm.models.candidate_scores import RowsAlone
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.scoring.accuracy import Scorer
from zotune.llm.scoring.objectives import Objective, mean_loss


def candidate_loss(
    lm: LanguageModel,
    objective: Objective,
    scorer: Scorer,
    examples: Sequence[Encoded],
    step: int,
    places: Sequence[int],
) -> Batched:
    """Return a closure of the mean loss of candidates' scores, for as many probes per forward pass as fit."""
    batch = collate(examples, lm.pad_token_id, lm.device, exact=objective.exact)

    def value(copies: int) -> Tensor:
        lm.num_forwards += copies - 1
        return mean_loss(objective, scorer(batch), batch, examples)

    return Batched(value, lm.copies_at_once(batch), f"the {objective.name} loss")


def candidate_loss_per_example(
    lm: LanguageModel,
    objective: Objective,
    scorer: Scorer,
    examples: Sequence[Encoded],
    step: int,
    places: Sequence[int],
) -> PerExample:
    """As `candidate_loss`, as an objective of single examples."""
    batch = collate(examples, lm.pad_token_id, lm.device, exact=objective.exact)
    owners = [i for i, example in enumerate(examples) for _ in example.sequences]

    def losses(each: EachRow) -> Tensor:
        lm.rows_alone = RowsAlone(each, owners)
        try:
            scores = scorer(batch)
        finally:
            lm.rows_alone = None
        return torch.stack([objective.losses(score, batch) for score in scores])

    weights = tuple(float(objective.weight(example)) for example in examples)
    name, most = f"the {objective.name} loss", lm.copies_at_once(batch)
    return PerExample(losses, weights, lambda: mean_loss(objective, scorer(batch), batch, examples), most, name)
