"""The objective of classification and multiple choice: score each candidate by its log-probability.

A candidate's score is the mean log-probability of its tokens after the prompt; the loss is the softmax
cross-entropy over the candidates' scores, the prediction the best score (Malladi et al., 2023, appendix
E; the paper, section 4.1). All of it in float32 or better, whatever the model's precision.

What costs time and changes nothing is left out: candidates that share the tokens the model must read
share one forward pass, the head is computed only at the positions that are scored, and only for the
candidates' own tokens where each candidate is a single token, for then the normaliser cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zotune.errors import UsageError
from zotune.llm.data import Example


@dataclass(frozen=True)
class Candidate:
    """Where a candidate is scored: token `tokens[i]` is predicted at position `positions[i]` of a sequence."""

    sequence: int
    positions: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Encoded:
    """An example as tokens: the distinct sequences the model must read, and its candidates within them."""

    sequences: tuple[tuple[int, ...], ...]
    candidates: tuple[Candidate, ...]
    label: int

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, self.sequences))


@dataclass(frozen=True)
class Batch:
    """Encoded examples as tensors: S sequences of at most L tokens, N scored positions, C candidates.

    Attributes:
        sequences: the token ids of each sequence, unpadded; S tuples.
        input_ids, attention_mask: (S, L), padded on the right.
        positions: (N,) indices into the S·L positions.
        rows, tokens, owners: (M,) for each candidate token, the scored position (index into N) where it is
            predicted, its id, and its candidate (index into C).
        lengths: (C,) tokens of each candidate.
        counts: candidates of each example; labels: (examples,) the right ones.
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

    @property
    def only_single_tokens(self) -> bool:
        """Whether each candidate is one token, and the candidates of an example are scored at one position."""
        return bool(self.lengths.max() == 1) and len(self.positions) == len(self.counts)


class Encoder:
    """Examples to tokens with one tokenizer, once an example."""

    def __init__(self, tokenizer: Any, *, masked: bool, context: int, max_length: int | None) -> None:
        self.tokenizer, self.masked, self.context, self.max_length = tokenizer, masked, context, max_length

    def __call__(self, example: Example, where: str = "an example") -> Encoded:
        """Encode one example; `where` names it in errors.

        Raises:
            UsageError: it is longer than the model's context, or a masked model's word is not one token.
        """
        encode = self._masked if self.masked else self._causal
        found = [encode(example, candidate) for candidate in example.candidates]
        sequences = tuple(dict.fromkeys(sequence for sequence, _, _ in found))
        longest = max(map(len, sequences))
        if longest > self.context:
            raise UsageError(
                f"{where} has {longest} tokens, but the model reads at most {self.context}. "
                f"Cut long prompts from the left with --max-length {self.context}."
            )
        candidates = tuple(Candidate(sequences.index(s), positions, tokens) for s, positions, tokens in found)
        return Encoded(sequences, candidates, example.label)

    def _causal(self, example: Example, candidate: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Tokenised once with its prompt: the option's tokens are those that end after the prompt does."""
        text = self.tokenizer(example.prompt + candidate, return_offsets_mapping=True, verbose=False)
        ids, ends = text["input_ids"], [end for _, end in text["offset_mapping"]]
        option = [i for i, end in enumerate(ends) if end > len(example.prompt)]
        if not option or option[0] == 0:
            raise UsageError(
                f"the candidate {candidate!r} after the prompt {example.prompt!r} leaves nothing to predict it from."
            )
        first, stop = option[0], option[-1] + 1
        # The last token is predicted but never read.
        read, cut = self._cut(tuple(ids[: stop - 1]), first)
        return read, tuple(range(first - 1 - cut, stop - 1 - cut)), tuple(ids[first:stop])

    def _masked(self, example: Example, candidate: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        words = self.tokenizer(candidate, add_special_tokens=False)["input_ids"]
        if len(words) != 1:
            raise UsageError(
                f"a masked language model fills in one token, but {candidate!r} is {len(words)} of them; "
                "choose another word."
            )
        mask = self.tokenizer.mask_token_id
        sentence = f"{example.prompt}{self.tokenizer.mask_token}{example.suffix}"
        text = self.tokenizer(sentence, verbose=False)["input_ids"]
        read, _ = self._cut(tuple(text), len(text) - 1)
        # The last one: the text itself may hold another.
        return read, (max(i for i, token in enumerate(read) if token == mask),), (words[0],)

    def _cut(self, ids: tuple[int, ...], prompt_length: int) -> tuple[tuple[int, ...], int]:
        """At most `max_length` tokens: the first (where it begins the sequence) and the last ones."""
        over = 0 if self.max_length is None else len(ids) - self.max_length
        if over <= 0:
            return ids, 0
        if over >= prompt_length:
            raise UsageError(f"--max-length {self.max_length} leaves no token of the prompt beside the candidate.")
        keep = 1 if ids[0] in (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id) else 0
        return ids[:keep] + ids[keep + over :], over


def collate(examples: Sequence[Encoded], pad_token_id: int, device: torch.device) -> Batch:
    """Tensors for some examples; padding is on the right, where no causal position sees it."""
    sequences = [s for e in examples for s in e.sequences]
    length = max(map(len, sequences))
    first_sequence = 0
    slots: dict[int, int] = {}
    rows: list[int] = []
    tokens: list[int] = []
    owners: list[int] = []
    lengths: list[int] = []
    for e in examples:
        for c in e.candidates:
            for position, token in zip(c.positions, c.tokens, strict=True):
                rows.append(slots.setdefault((first_sequence + c.sequence) * length + position, len(slots)))
                tokens.append(token)
                owners.append(len(lengths))
            lengths.append(len(c.tokens))
        first_sequence += len(e.sequences)

    def tensor(values: Any) -> Tensor:
        return torch.tensor(values, device=device)

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
    )


def scores(logits: Tensor, batch: Batch) -> Tensor:
    """(examples, most candidates) mean log-probabilities from (N, V) logits; absent candidates are -inf."""
    logits = logits.float()
    picked = logits[batch.rows, batch.tokens] - torch.logsumexp(logits, dim=1)[batch.rows]
    total = torch.zeros(len(batch.lengths), dtype=torch.float64, device=picked.device)
    return _by_example(total.index_add(0, batch.owners, picked.double()) / batch.lengths, batch)


def scores_of_single_tokens(logits: Tensor, batch: Batch) -> Tensor:
    """The same up to a constant an example, from (N, K) logits of the candidates' distinct tokens alone."""
    columns = torch.unique(batch.tokens, return_inverse=True)[1]
    return _by_example(logits.float()[batch.rows, columns].double(), batch)


def _by_example(values: Tensor, batch: Batch) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(
        list(torch.split(values, list(batch.counts))), batch_first=True, padding_value=float("-inf")
    )


def losses(score: Tensor, batch: Batch) -> Tensor:
    """(examples,) softmax cross-entropy over the candidates, in double precision."""
    return F.cross_entropy(score, batch.labels, reduction="none")
