"""Examples as tokens, and batches of them: what the model must read, and where its candidates are scored.

Each prompt is tokenised with its candidate, so that a token which spans both counts for the candidate.
Candidates that share the tokens the model must read share one sequence, and so one forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from zotune.errors import UsageError
from zotune.llm.data.examples import Example


@dataclass(frozen=True)
class Candidate:
    """Where a candidate is scored: token `tokens[i]` is predicted at position `positions[i]` of a sequence."""

    sequence: int
    positions: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Encoded:
    """An example as tokens: the distinct sequences the model must read, and its candidates within them.

    Attributes:
        label, also_right, answers: as the example's.
        prompt: where the answer is generated, the tokens to generate it from; text: the whole prompt in words.
    """

    sequences: tuple[tuple[int, ...], ...]
    candidates: tuple[Candidate, ...]
    label: int
    also_right: tuple[int, ...] = ()
    answers: tuple[str, ...] = ()
    prompt: tuple[int, ...] = ()
    text: str = ""

    @property
    def length(self) -> int:
        """Tokens of the longest sequence, or of a prompt without candidates."""
        return max(map(len, self.sequences or (self.prompt,)))

    def is_right(self, prediction: int) -> bool:
        """Whether a candidate is one of the right ones."""
        return prediction == self.label or prediction in self.also_right


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
        right: (examples, most candidates) which ones count as right.
        exact: whether scores must be log-probabilities; else a constant an example may be missing from them.
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
        """The ids among the candidates' tokens, (K,), and which of them each token is, (M,)."""
        ids, places = torch.unique(self.tokens, return_inverse=True)
        return ids, places

    # Kept, as the distinct tokens are: a GPU would have to be waited for in each forward pass.
    @cached_property
    def only_single_tokens(self) -> bool:
        """Whether each candidate is one token, and the candidates of an example are scored at one position."""
        return bool(self.lengths.max() == 1) and len(self.positions) == len(self.counts)

    @property
    def needs_only_candidates(self) -> bool:
        """Whether logits of the candidates' own tokens are enough: the normaliser cancels."""
        return not self.exact and self.only_single_tokens


class Encoder:
    """Examples to tokens with one tokenizer, once an example.

    Args:
        masked, classifies: what the model does: fill in masks, or classify whole sequences by a head.
        context: how many tokens the model reads at most.
        max_length: where to cut longer prompts, from the left (a classification head's texts from the right).
        new_tokens: room to leave behind a prompt that an answer is generated from.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        masked: bool,
        context: int,
        max_length: int | None,
        classifies: bool = False,
        new_tokens: int = 50,
    ) -> None:
        self.tokenizer, self.context, self.max_length, self.new_tokens = tokenizer, context, max_length, new_tokens
        self._encode = self._pair if classifies else self._masked if masked else self._causal

    def __call__(self, example: Example, where: str = "an example") -> Encoded:
        """Encode one example; `where` names it in errors.

        Raises:
            UsageError: it is longer than the model's context, or a masked model's word is not one token.
        """
        encode = self._spans if example.spans else self._encode
        try:
            found = [encode(example, candidate) for candidate in example.candidates]
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None
        sequences = tuple(dict.fromkeys(sequence for sequence, _, _ in found))
        prompt = self._prompt(example) if example.answers or not example.candidates else ()
        longest = max([*map(len, sequences), len(prompt) + self.new_tokens if prompt else 0])
        if longest > self.context:
            raise UsageError(
                f"{where} has {longest} tokens, but the model reads at most {self.context}. "
                f"Cut long prompts from the left with --max-length {self.context}."
            )
        candidates = tuple(Candidate(sequences.index(s), positions, tokens) for s, positions, tokens in found)
        text = example.prompt if prompt else ""
        return Encoded(sequences, candidates, example.label, example.also_right, example.answers, prompt, text)

    def _prompt(self, example: Example) -> tuple[int, ...]:
        """What an answer is generated from, with room left for it."""
        # A chat's template has put the special tokens.
        ids = tuple(self.tokenizer(example.prompt, add_special_tokens=not example.spans, verbose=False)["input_ids"])
        return self._cut(ids, len(ids), self.new_tokens)[0]

    def _causal(self, example: Example, candidate: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Tokenised once with its prompt: the option's tokens are those that end after the prompt does."""
        text = self.tokenizer(example.prompt + candidate, return_offsets_mapping=True, verbose=False)
        ids, ends = text["input_ids"], [end for _, end in text["offset_mapping"]]
        option = [i for i, end in enumerate(ends) if end > len(example.prompt)]
        if not option:
            raise UsageError(f"the candidate {candidate!r} is no token to this tokenizer; choose other words.")
        if option[0] == 0:
            raise UsageError(
                f"the candidate {candidate!r} after the prompt {example.prompt!r} leaves nothing to predict it from."
            )
        first, stop = option[0], option[-1] + 1
        # The last token is predicted but never read.
        read, cut = self._cut(tuple(ids[: stop - 1]), first)
        return read, tuple(range(first - 1 - cut, stop - 1 - cut)), tuple(ids[first:stop])

    def _spans(self, example: Example, candidate: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """A chat, whose template has put the special tokens: the scored tokens are those that reach into a span."""
        text = self.tokenizer(example.prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = tuple(text["input_ids"]), text["offset_mapping"]
        scored = [
            i for i, (start, end) in enumerate(offsets) if any(start < hi and end > lo for lo, hi in example.spans)
        ]
        if not scored or scored[0] == 0:
            raise UsageError("the scored turns leave nothing to predict them from, or are no token to this tokenizer.")
        read, cut = self._cut(ids[: scored[-1]], scored[0])
        return read, tuple(i - 1 - cut for i in scored), tuple(ids[i] for i in scored)

    def _masked(self, example: Example, candidate: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        words = self.tokenizer(candidate, add_special_tokens=False)["input_ids"]
        if len(words) != 1:
            raise UsageError(
                f"a masked language model fills in one token, but {candidate!r} is {len(words)} of them; "
                "choose another word."
            )
        prompt = self._limited(example)
        mask = self.tokenizer.mask_token
        text = self.tokenizer(f"{prompt}{mask}{example.suffix}", return_offsets_mapping=True, verbose=False)
        # The texts themselves may hold another mask.
        ends = [end for _, end in text["offset_mapping"]]
        place = ends.index(len(prompt) + len(mask))
        read, cut = self._cut(tuple(text["input_ids"]), place)
        return read, (place - cut,), (words[0],)

    def _limited(self, example: Example) -> str:
        """The prompt with its first text cut at the right to the tokens it may have."""
        if example.text_limit is None:
            return example.prompt
        end, limit = example.text_limit
        text = self.tokenizer(
            example.prompt[:end], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        kept = [stop for _, stop in text["offset_mapping"]][:limit]
        return example.prompt[: kept[-1] if len(kept) == limit else end] + example.prompt[end:]

    def _pair(self, example: Example, candidate: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """For a classification head: it sees the first token, and its outputs are numbered as the candidates are."""
        cut = {} if self.max_length is None else {"truncation": True, "max_length": self.max_length}
        ids = self.tokenizer(example.prompt, example.second, verbose=False, **cut)["input_ids"]
        return tuple(ids), (0,), (example.candidates.index(candidate),)

    def _cut(self, ids: tuple[int, ...], prompt_length: int, room: int = 0) -> tuple[tuple[int, ...], int]:
        """At most `max_length` tokens less `room`: the first (where it begins the sequence) and the last ones."""
        over = 0 if self.max_length is None else len(ids) + room - self.max_length
        if over <= 0:
            return ids, 0
        if over >= prompt_length:
            raise UsageError(f"--max-length {self.max_length} leaves no token of the prompt beside the candidate.")
        keep = 1 if ids[0] in (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id) else 0
        return ids[:keep] + ids[keep + over :], over


def check_distinct(encoded: Encoded, example: Example) -> None:
    """Refuse an example with two candidates that are the same tokens, and so always score the same.

    Raises:
        UsageError: with the two and their row's place.
    """
    seen: dict[object, str] = {}
    for candidate, text in zip(encoded.candidates, example.candidates, strict=True):
        other = seen.setdefault((encoded.sequences[candidate.sequence], candidate.positions, candidate.tokens), text)
        if other is not text:
            raise UsageError(
                f"{example.place}: the candidates {other!r} and {text!r} are the same tokens to the model; "
                "choose other words."
            )


def on_device(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of numbers, by way of pinned memory: the host does not wait for what a GPU is doing."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def collate(examples: Sequence[Encoded], pad_token_id: int, device: torch.device, *, exact: bool = False) -> Batch:
    """Tensors for some examples; padding is on the right, where no causal position sees it."""
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
        for c in e.candidates:
            for position, token in zip(c.positions, c.tokens, strict=True):
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
