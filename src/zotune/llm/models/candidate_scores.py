"""Scores of candidates from logits, and the loss made of these scores; all in float32 or better.

A candidate's score is the mean log-probability of its tokens after the prompt (Malladi et al., 2023, appendix E;
the paper, section 4.1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zotune.llm.data.collator import Batch, on_device


def scores(logits: Tensor, batch: Batch) -> Tensor:
    """Return (examples, most candidates) mean log-probabilities from (N, V) logits; missing candidates are -inf."""
    return scores_of_tokens(log_probabilities(logits, batch.rows, batch.tokens), batch)


def log_probabilities(logits: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """Return (M,) log-probabilities in float32 of the `tokens` (M,) at the `rows` (M,) of (N, V) logits."""
    logits = logits.float()
    return logits[rows, tokens] - torch.logsumexp(logits, dim=1)[rows]


def scores_of_tokens(log_probs: Tensor, batch: Batch) -> Tensor:
    """Return (examples, most candidates) means of the (M,) log-probabilities of the candidates' tokens."""
    total = torch.zeros(len(batch.lengths), dtype=torch.float64, device=log_probs.device)
    return by_example(total.index_add(0, batch.owners, log_probs.double()) / batch.lengths, batch)


def scores_of_single_tokens(logits: Tensor, batch: Batch) -> Tensor:
    """Return these scores up to a constant per example, from (N, K) logits of the candidates' distinct tokens alone."""
    return by_example(logits.float()[batch.rows, batch.distinct[1]].double(), batch)


def by_example(values: Tensor, batch: Batch) -> Tensor:
    """Return (examples, most candidates) of the (C,) values of candidates; missing ones are -inf."""
    counts = on_device(batch.counts, values.device, torch.long)[:, None]
    place = torch.arange(max(batch.counts), device=values.device)
    # A candidate that an example does not have is read from one more value, behind the others.
    index = torch.where(place < counts, counts.cumsum(0) - counts + place, len(values))
    return torch.cat([values, values.new_full((1,), float("-inf"))])[index]


def losses(score: Tensor, batch: Batch) -> Tensor:
    """Return the (examples,) softmax cross-entropy over the candidates, in float64."""
    return F.cross_entropy(score, batch.labels, reduction="none")
