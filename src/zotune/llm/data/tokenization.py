"""Tokenising examples: the sequences that the model reads, and the positions where candidates are scored.

Each prompt is tokenised together with its candidate; a token that spans both counts for the candidate. Candidates with
the same input tokens share one sequence, and so one forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from zotune.errors import UsageError
from zotune.llm.data.examples import Example


@dataclass(frozen=True)
class Candidate:
    """The scored tokens of a candidate: `tokens[i]` is predicted at position `positions[i]` of a sequence."""

    sequence: int
    positions: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Encoded:
    """A tokenised example: the distinct sequences that the model reads, and the candidates in them.

    Attributes:
        label, also_right, answers: as in the example.
        prompt: the tokens to generate an answer from, if it is generated; text: the same prompt as text.
        place: file and line of the row, or its split and number, for messages; no part of the row's digest.
    """

    sequences: tuple[tuple[int, ...], ...]
    candidates: tuple[Candidate, ...]
    label: int
    also_right: tuple[int, ...] = ()
    answers: tuple[str, ...] = ()
    prompt: tuple[int, ...] = ()
    text: str = ""
    place: str = field(default="an example", compare=False, repr=False)

    @property
    def length(self) -> int:
        """The tokens of the longest sequence, or of a prompt without candidates."""
        return max(map(len, self.sequences or (self.prompt,)))

    def is_right(self, prediction: int) -> bool:
        """Whether a candidate is one of the right ones."""
        return prediction == self.label or prediction in self.also_right


class Encoder:
    """A function from examples to tokens, for one tokenizer and one kind of model.

    Args:
        tokenizer: a tokenizer of transformers.
        masked, classifies: whether the model fills in masks, or classifies whole sequences with a head.
        context: maximum number of tokens of the model.
        max_length: number of tokens to which longer prompts are truncated, from the left (for a classification head
            from the right); None for no truncation.
        new_tokens: number of tokens to reserve after a prompt for a generated answer.
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
        """Tokenise one example; `where` names it in errors.

        Raises:
            UsageError: the example exceeds the model's context, or a masked model's word is not a single token.
        """
        encode = self._spans if example.spans else self._encode
        try:
            encoded = [encode(example, candidate) for candidate in example.candidates]
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None
        sequences = tuple(dict.fromkeys(sequence for sequence, _, _ in encoded))
        prompt = self._prompt(example) if example.answers or not example.candidates else ()
        longest = max([*map(len, sequences), len(prompt) + self.new_tokens if prompt else 0])
        if longest > self.context:
            raise UsageError(
                f"{where} has {longest} tokens, but the model reads at most {self.context}. "
                f"Truncate long prompts from the left with --max-length {self.context}."
            )
        candidates = tuple(Candidate(sequences.index(s), positions, tokens) for s, positions, tokens in encoded)
        text = example.prompt if prompt else ""
        return Encoded(sequences, candidates, example.label, example.also_right, example.answers, prompt, text, where)

    def _prompt(self, example: Example) -> tuple[int, ...]:
        """Return the tokens to generate an answer from, leaving room for the answer."""
        # The template of a chat has added the special tokens already.
        ids = tuple(self.tokenizer(example.prompt, add_special_tokens=not example.spans, verbose=False)["input_ids"])
        return self._truncate(ids, len(ids), self.new_tokens)[0]

    def _causal(self, example: Example, candidate: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Tokenise prompt and candidate together; the candidate's tokens are those that end after the prompt."""
        text = self.tokenizer(example.prompt + candidate, return_offsets_mapping=True, verbose=False)
        ids, ends = text["input_ids"], [end for _, end in text["offset_mapping"]]
        scored = [i for i, end in enumerate(ends) if end > len(example.prompt)]
        if not scored:
            raise UsageError(f"the tokenizer makes no token of the candidate {candidate!r}; choose other words.")
        if scored[0] == 0:
            raise UsageError(
                f"the prompt {example.prompt!r} has no token from which to predict the candidate {candidate!r}; add "
                f"text to it."
            )
        first, stop = scored[0], scored[-1] + 1
        # The last token is predicted but not part of the input.
        read, cut = self._truncate(tuple(ids[: stop - 1]), first)
        return read, tuple(range(first - 1 - cut, stop - 1 - cut)), tuple(ids[first:stop])

    def _spans(self, example: Example, candidate: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Tokenise a chat, whose template has added the special tokens; the tokens that overlap a span are scored."""
        text = self.tokenizer(example.prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = tuple(text["input_ids"]), text["offset_mapping"]
        scored = [
            i for i, (start, end) in enumerate(offsets) if any(start < hi and end > lo for lo, hi in example.spans)
        ]
        if not scored or scored[0] == 0:
            raise UsageError(
                "the scored turns have no token, or no token before them to predict them from; add a user turn before "
                "them."
            )
        read, cut = self._truncate(ids[: scored[-1]], scored[0])
        return read, tuple(i - 1 - cut for i in scored), tuple(ids[i] for i in scored)

    def _masked(self, example: Example, candidate: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        words = self.tokenizer(candidate, add_special_tokens=False)["input_ids"]
        if len(words) != 1:
            raise UsageError(
                f"a masked language model fills in a single token, but {candidate!r} has {len(words)} tokens; "
                "choose another word."
            )
        prompt = self._limit_first_text(example)
        mask = self.tokenizer.mask_token
        text = self.tokenizer(f"{prompt}{mask}{example.suffix}", return_offsets_mapping=True, verbose=False)
        # The texts may contain other masks.
        ends = [end for _, end in text["offset_mapping"]]
        place = ends.index(len(prompt) + len(mask))
        read, cut = self._truncate(tuple(text["input_ids"]), place)
        return read, (place - cut,), (words[0],)

    def _limit_first_text(self, example: Example) -> str:
        """Return the prompt with its first text truncated from the right to its maximum number of tokens."""
        if example.text_limit is None:
            return example.prompt
        end, limit = example.text_limit
        text = self.tokenizer(
            example.prompt[:end], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        stops = [stop for _, stop in text["offset_mapping"]][:limit]
        return example.prompt[: stops[-1] if len(stops) == limit else end] + example.prompt[end:]

    def _pair(self, example: Example, candidate: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Tokenise the texts for a classification head, which reads the first token; candidates number its outputs."""
        cut = {} if self.max_length is None else {"truncation": True, "max_length": self.max_length}
        ids = self.tokenizer(example.prompt, example.second, verbose=False, **cut)["input_ids"]
        return tuple(ids), (0,), (example.candidates.index(candidate),)

    def _truncate(self, ids: tuple[int, ...], prompt_length: int, room: int = 0) -> tuple[tuple[int, ...], int]:
        """Truncate to `max_length` tokens less `room`, keeping a beginning-of-sequence token and the last tokens."""
        over = 0 if self.max_length is None else len(ids) + room - self.max_length
        if over <= 0:
            return ids, 0
        if over >= prompt_length:
            raise UsageError(
                f"--max-length {self.max_length} leaves no token of the prompt beside the candidate; raise it."
            )
        keep = 1 if ids[0] in (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id) else 0
        return ids[:keep] + ids[keep + over :], over


def check_distinct(encoded: Encoded, example: Example) -> None:
    """Check that an example's candidates differ in their tokens; equal ones would always have equal scores.

    Raises:
        UsageError: two candidates have the same tokens.
    """
    seen: dict[object, str] = {}
    for candidate, text in zip(encoded.candidates, example.candidates, strict=True):
        other = seen.setdefault((encoded.sequences[candidate.sequence], candidate.positions, candidate.tokens), text)
        if other is not text:
            raise UsageError(
                f"{example.place}: the candidates {other!r} and {text!r} have the same tokens; choose other words."
            )
