"""Scores of candidates from logits, and the loss made of these scores; all in float32 or better.

A candidate's score is the mean log-probability of its tokens after the prompt (Malladi et al., 2023, appendix E;
the paper, section 4.1).

With one direction an example each row meets its own weights (`zotune.estimate.per_example`). A causal model without
virtual tokens reads a row alone as it does in a batch padded on the right, so the rows run as copies of a batch of one:
as many at a time as their logits have room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from zotune.errors import UsageError
from zotune.estimate.per_example.objective import EachRow
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
    return means_of_single_tokens(logits.float()[batch.rows, batch.distinct[1]], batch)


def means_of_single_tokens(logits: Tensor, batch: Batch) -> Tensor:
    """Return these scores from the (C,) logits of the candidates' only scored tokens.

    The means are over all tokens of a candidate; those that all candidates of an example share add a constant.
    """
    return by_example(logits.double() / batch.lengths, batch)


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


@dataclass
class RowsAlone:
    """How the rows of a batch are computed one by one, while a language model scores it.

    Attributes:
        each: computes rows alone, at one or several points.
        owners: the example of each row.
    """

    each: EachRow
    owners: Sequence[int]
    _row: Tensor | None = field(default=None, repr=False)

    def own(self, values: Tensor) -> Tensor:
        """Return what belongs to the row that is computed, (1, …), of values of all rows, (rows, …)."""
        return values if self._row is None else values[self._row]

    @contextmanager
    def _at(self, row: Tensor) -> Iterator[None]:
        self._row = row
        try:
            yield
        finally:
            self._row = None

    def scores(
        self, batch: Batch, logits: Callable[[Batch, Tensor | None], Tensor], only: Tensor | None, at_once: int
    ) -> Tensor:
        """Return the (points, examples, candidates) scores of a batch.

        Args:
            batch: padded on the right.
            logits: of a batch of one row at its scored positions, of the tokens `only` or of all.
            only: the distinct tokens of all candidates, where scores up to a constant suffice.
            at_once: logits of all tokens that may be computed at a time.
        """
        places = _Places.of(batch, batch.tokens if only is None else batch.distinct[1])

        def of_row(row: Tensor) -> Tensor:
            positions, rows, tokens = (each[row][0] for each in (places.positions, places.rows, places.tokens))
            ids, mask = batch.input_ids[row], batch.attention_mask[row]
            one = replace(batch, input_ids=ids, attention_mask=mask, positions=positions)
            with self._at(row):
                found = logits(one, only)
            return log_probabilities(found, rows, tokens) if only is None else found.float()[rows, tokens]

        size = max(1, at_once // places.positions.shape[1])
        rows = torch.arange(len(self.owners), device=batch.input_ids.device)
        parts = [self.each(of_row, [some], [self.owners[i] for i in some.tolist()]) for some in torch.split(rows, size)]
        values = torch.cat(parts, dim=1).flatten(1)[:, places.index]
        if only is not None:
            return torch.stack([means_of_single_tokens(own, batch) for own in values])
        return torch.stack([scores_of_tokens(own, batch) for own in values])


@dataclass(frozen=True)
class _Places:
    """What a batch's rows score, as rectangles: what a row has less of is filled up with zeros.

    Attributes:
        positions: (S, n) scored positions of each row.
        rows, tokens: (S, m) for each candidate token of a row, its scored position (index into n) and its id, or its
            place among the batch's distinct tokens.
        index: (M,) where each candidate token of the batch is in the flattened (S, m).
    """

    positions: Tensor
    rows: Tensor
    tokens: Tensor
    index: Tensor

    @classmethod
    def of(cls, batch: Batch, tokens: Tensor) -> _Places:
        length, count = batch.input_ids.shape[1], batch.input_ids.shape[0]
        slots: list[dict[int, int]] = [{} for _ in range(count)]
        found: list[list[tuple[int, int]]] = [[] for _ in range(count)]
        at: list[tuple[int, int]] = []
        positions = batch.positions.tolist()
        for place, token in zip(batch.rows.tolist(), tokens.tolist(), strict=True):
            row, position = divmod(positions[place], length)
            own = slots[row]
            at.append((row, len(found[row])))
            found[row].append((own.setdefault(position, len(own)), token))
        width = max(map(len, found))

        def rectangle(rows: Sequence[Sequence[int]]) -> Tensor:
            most = max(map(len, rows))
            return on_device([[*row, *[0] * (most - len(row))] for row in rows], batch.input_ids.device)

        return cls(
            rectangle([list(own) for own in slots]),
            rectangle([[place for place, _ in own] for own in found]),
            rectangle([[token for _, token in own] for own in found]),
            on_device([row * width + number for row, number in at], batch.input_ids.device),
        )


def check_rows_alone(*, causal: bool, padded: bool, virtual_tokens: bool) -> None:
    """Refuse models of which it is not known that they read a row alone as within a batch.

    Raises:
        UsageError: the model is no causal one, has virtual tokens, or padding might change its results.
    """
    reason = (
        "needs a causal language model without a classification head"
        if not causal
        else "does not go with virtual tokens (tuning prefix or prompt)"
        if virtual_tokens
        else "needs a model whose results padding is known to leave alone, which is not known of this one"
        if not padded
        else None
    )
    if reason is not None:
        raise UsageError(f"directions_per_batch {reason}. Leave it out; --num-queries takes more directions a step.")
