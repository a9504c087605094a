"""Collating tokenised examples into batches of tensors, padded on the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from zotune.llm.data.tokenization import Encoded


@dataclass(frozen=True)
class Batch:
    """Tokenised examples as tensors: S sequences of at most L tokens, N scored positions, C candidates.

    Attributes:
        sequences: the token ids of each sequence, unpadded; S tuples.
        input_ids, attention_mask: (S, L), padded on the right.
        positions: (N,) indices into the S·L positions.
        rows, tokens, owners: (M,) for each candidate token, the scored position (index into N) where it is
            predicted, its id, and its candidate (index into C).
        lengths: (C,) tokens of each candidate, those left out of `tokens` included.
        counts: candidates of each example; labels: (examples,) indices of the right ones.
        right: (examples, most candidates) whether each candidate counts as right.
        exact: whether scores must be log-probabilities, not only up to a constant per example.
    """

    sequences: tuple[tuple[int, ...], ...]
    input_ids: Tensor
    attention_mask: Tensor
    positions: Tensor
    rows: Tensor
    tokens: Tensor
    owners: Tensor
    lengths: Tensor
    counts: tuple[int, ...]
    labels: Tensor
    right: Tensor
    exact: bool = False

    @cached_property
    def distinct(self) -> tuple[Tensor, Tensor]:
        """The distinct ids of the candidates' tokens, (K,), and the index among them of each token, (M,)."""
        ids, places = torch.unique(self.tokens, return_inverse=True)
        return ids, places

    # Cached, as the distinct tokens are: each evaluation would wait for the GPU.
    @cached_property
    def only_single_tokens(self) -> bool:
        """Whether a single token of each candidate is scored, and those of an example share one position."""
        return len(self.tokens) == len(self.lengths) and len(self.positions) == len(self.counts)

    @property
    def needs_only_candidates(self) -> bool:
        """Whether the logits of the candidates' tokens suffice, because the normaliser cancels."""
        return not self.exact and self.only_single_tokens


def on_device(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor of numbers on a device, copied from pinned memory so that the host does not wait for the GPU."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def collate(examples: Sequence[Encoded], pad_token_id: int, device: torch.device, *, exact: bool = False) -> Batch:
    """Collate examples into a batch, padded on the right, where no causal position attends to padding.

    Tokens that all candidates of an example share, at the same places, add the same to all its scores. Unless scores
    must be exact they are left out: many tokenizers write every number with a token for the space before it.
    """
    sequences = [s for e in examples for s in e.sequences]
    length = max(map(len, sequences))
    most = max(len(e.candidates) for e in examples)
    first_sequence = 0
    slots: dict[int, int] = {}
    rows: list[int] = []
    tokens: list[int] = []
    owners: list[int] = []
    lengths: list[int] = []
    for e in examples:
        scored = slice(-1, None) if e.differ_in_last_token and not exact else slice(None)
        for c in e.candidates:
            for position, token in zip(c.positions[scored], c.tokens[scored], strict=True):
                rows.append(slots.setdefault((first_sequence + c.sequence) * length + position, len(slots)))
                tokens.append(token)
                owners.append(len(lengths))
            lengths.append(len(c.tokens))
        first_sequence += len(e.sequences)

    def tensor(values: Any) -> Tensor:
        return on_device(values, device)

    return Batch(
        sequences=tuple(sequences),
        input_ids=tensor([list(s) + [pad_token_id] * (length - len(s)) for s in sequences]),
        attention_mask=tensor([[1] * len(s) + [0] * (length - len(s)) for s in sequences]),
        positions=tensor(list(slots)),
        rows=tensor(rows),
        tokens=tensor(tokens),
        owners=tensor(owners),
        lengths=tensor(lengths),
        counts=tuple(len(e.candidates) for e in examples),
        labels=tensor([e.label for e in examples]),
        right=tensor([[e.is_right(i) for i in range(most)] for e in examples]),
        exact=exact,
    )
