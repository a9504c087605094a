"""Tokenising examples: the sequences that the model reads, and the positions where candidates are scored.

Each prompt is tokenised together with its candidate; a token that spans both counts for the candidate. Candidates with
the same input tokens share one sequence, and so one forward pass.

Spaces at the end of a prompt that is to be continued belong to what follows: many tokenizers join them with the next
word, so a model that is trained on the joined token must not be asked to continue after the spaces.
"""

from __future__ import annotations

from functools import cached_property
from string import ascii_letters
from typing import Any, Literal, NamedTuple

from zotune.errors import UsageError
from zotune.llm.data.control_tokens import Span, Tokens, control_tokens
from zotune.llm.data.encoded import Candidate as Candidate
from zotune.llm.data.encoded import Encoded as Encoded
from zotune.llm.data.examples import Example

# What becomes of rows that are too long: the option `long_rows`.
LongRows = Literal["truncate", "drop", "error"]


class LongRowError(UsageError):
    """A row has more tokens than the model reads, or than it may read."""


class _Scored(NamedTuple):
    """An example's read tokens, the positions at which a candidate's are predicted, these, and how many were cut."""

    read: tuple[int, ...]
    positions: tuple[int, ...]
    tokens: tuple[int, ...]
    num_cut: int = 0


class Encoder:
    """A function from examples to tokens, for one tokenizer and one kind of model.

    Args:
        tokenizer: a tokenizer of transformers.
        masked, classifies: whether the model fills in masks, or classifies whole sequences with a head.
        context: maximum number of tokens of the model.
        max_length: number of tokens to which longer prompts are truncated, from the left (for a classification head
            from the right), and plain texts, from the right; None for no truncation.
        long_rows: what becomes of rows longer than `max_length` or `context`; None: `max_length` truncates prompts,
            and what is too long nevertheless is an error.
        new_tokens: number of tokens to reserve after a prompt for a generated answer.
        num_embeddings: number of tokens that the model has embeddings for; None if that is not known.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        masked: bool,
        context: int,
        max_length: int | None,
        long_rows: LongRows | None = None,
        classifies: bool = False,
        new_tokens: int = 50,
        num_embeddings: int | None = None,
    ) -> None:
        self.tokenizer, self.context, self.new_tokens = tokenizer, context, new_tokens
        self.limit = context if max_length is None else min(max_length, context)
        truncated = {None: max_length, "truncate": self.limit, "drop": None, "error": None}
        self.max_length, self._cuts_answers = truncated[long_rows], long_rows == "truncate"
        self._num_embeddings = num_embeddings
        self._encode = self._pair if classifies else self._masked if masked else self._causal

    def __call__(self, example: Example, where: str = "an example") -> Encoded:
        """Tokenise one example; `where` names it in errors.

        Raises:
            LongRowError: the example is too long; None of `long_rows` is `truncate`, or truncating leaves nothing.
            UsageError: a masked model's word is not a single token, or the model lacks a token.
        """
        encode = self._spans if example.spans else self._encode
        try:
            encoded = [encode(example, candidate) for candidate in example.candidates]
            prompt, cut = self._prompt(example) if example.answers or not example.candidates else ((), 0)
            sequences = tuple(dict.fromkeys(scored.read for scored in encoded))
            self._check_embedded({*prompt, *(i for s in sequences for i in s), *self._predicted(encoded)})
        except UsageError as error:
            raise type(error)(f"{where}: {error}") from None
        answered = len(prompt) + self.new_tokens if prompt else 0
        longest = max([*map(len, sequences), answered])
        if longest > (self.context if self.max_length is not None else self.limit):
            is_answered = answered == longest
            raise LongRowError(self._too_long(where, longest, is_text=not example.prompt, is_answered=is_answered))
        return Encoded(
            sequences,
            tuple(Candidate(sequences.index(s.read), s.positions, s.tokens) for s in encoded),
            example.label,
            example.also_right,
            example.answers,
            prompt,
            _asked(example) if prompt else "",
            where,
            max([cut, *(s.num_cut for s in encoded)]),
            example.columns,
        )

    def _too_long(self, where: str, length: int, *, is_text: bool, is_answered: bool) -> str:
        if is_answered:
            where = f"{where}, with an answer of {self.new_tokens} tokens (--max-new-tokens),"
        if self.limit < self.context:
            found = f"{where} has {length} tokens, more than --max-length {self.limit}. Raise it"
        elif is_answered:
            return (
                f"{where} has {length} tokens, but the model reads at most {self.context}. Lower --max-new-tokens, or "
                f"truncate long prompts from the left with --max-length {self.context}."
            )
        elif is_text:
            found = f"{where} has {length} tokens, but the model reads at most {self.context}. Give --packing"
        else:
            found = (
                f"{where} has {length} tokens, but the model reads at most {self.context}. "
                f"Truncate long prompts from the left with --max-length {self.context}"
            )
        return f"{found}, or give --long-rows truncate or drop."

    def document(self, example: Example) -> tuple[int, ...]:
        """Return all tokens of a plain text, with those at its beginning and its end, however long it is.

        Raises:
            UsageError: the text has no token, or one that the model has no embedding for.
        """
        try:
            ids, offsets = self._tokens(example, example.prompt + example.candidates[0], ends=True)
            stop = max((i for i, (_, end) in enumerate(offsets, start=1) if end), default=0)
            self._check_embedded(set(ids[:stop]))
        except UsageError as error:
            raise UsageError(f"{example.place}: {error}") from None
        return ids[:stop]

    def _predicted(self, encoded: list[_Scored]) -> set[int]:
        """Return the tokens of all candidates; those of a classification head are numbers of labels."""
        return set() if self._encode == self._pair else {i for scored in encoded for i in scored.tokens}

    def _check_embedded(self, ids: set[int]) -> None:
        highest = max(ids, default=0)
        if self._num_embeddings is not None and highest >= self._num_embeddings:
            token = self.tokenizer.convert_ids_to_tokens(highest)
            raise UsageError(
                f"the tokenizer gives {token!r} the id {highest}, but the model has embeddings for "
                f"{self._num_embeddings} tokens (0 to {self._num_embeddings - 1}): the tokenizer knows tokens that the "
                "model does not. Use the tokenizer that the model was trained with, or resize the model's embeddings "
                "(resize_token_embeddings of transformers) and train them."
            )

    def _tokens(self, example: Example, text: str, *, ends: bool = False) -> Tokens:
        """Tokenise a text that starts with an example's prompt, reading the token of either border only once.

        A beginning-of-sequence token that the text starts with is not added again. If the text ends here, an
        end-of-text token at its end is one. The template of a chat has added all special tokens.
        """
        tokenizer, tokens = self.tokenizer, control_tokens(self.tokenizer)
        if example.spans or example.rendered:
            return tokens.encode(text, example.controls, add_special_tokens=False)
        borders: list[Span] = []
        if tokenizer.bos_token and text.startswith(tokenizer.bos_token):
            borders.append((0, len(tokenizer.bos_token)))
        if ends and tokenizer.eos_token and text.endswith(tokenizer.eos_token):
            borders.append((len(text) - len(tokenizer.eos_token), len(text)))
        ids, offsets = tokens.encode(text, (*example.controls, *borders))
        if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id and offsets[0] == (0, 0):
            return ids[1:], offsets[1:]
        return ids, offsets

    def _prompt(self, example: Example) -> tuple[tuple[int, ...], int]:
        """Return the tokens to generate an answer from, leaving room for the answer, and how many were cut."""
        text = _asked(example)
        if len(example.candidates) == 1 or (not example.candidates and self._joins_spaces):
            text = text.rstrip(" \t") or text
        ids, offsets = self._tokens(example, text)
        # What the tokenizer puts behind a text, such as an end-of-text token, does not belong before its continuation.
        stop = max((i for i, (_, end) in enumerate(offsets, start=1) if end), default=1)
        return self._truncate(ids[:stop], stop, self.new_tokens)

    @cached_property
    def _joins_spaces(self) -> bool:
        """Whether the tokenizer joins a space with the first letter after it."""
        ends = (control_tokens(self.tokenizer).encode(f". {c}", ())[1] for c in ascii_letters)
        return any(all(end != len(". ") for _, end in offsets) for offsets in ends)

    def _causal(self, example: Example, candidate: str) -> _Scored:
        """Tokenise prompt and candidate together; the candidate's tokens are those that end after the prompt.

        A plain text is a candidate without a prompt: of its tokens the first has nothing before it.
        """
        ids, offsets = self._tokens(example, example.prompt + candidate, ends=True)
        start = _start_of_continuation(example)
        scored = [i for i, (_, end) in enumerate(offsets) if end > start]
        if scored and not example.prompt:
            return self._plain_text(ids[: scored[-1] + 1])
        if not scored:
            raise UsageError(f"the tokenizer makes no token of the candidate {candidate!r}; choose other words.")
        if scored[0] == 0:
            raise UsageError(
                f"the prompt {example.prompt!r} has no token from which to predict the candidate {candidate!r}; add "
                f"text to it."
            )
        first, stop = scored[0], scored[-1] + 1
        stop, cut_answer = self._cut_answer(example, first, stop)
        # The last token is predicted but not part of the input.
        read, cut = self._truncate(ids[: stop - 1], first)
        return _Scored(read, tuple(range(first - 1 - cut, stop - 1 - cut)), ids[first:stop], cut + cut_answer)

    def _plain_text(self, ids: tuple[int, ...]) -> _Scored:
        """Score all tokens of a text but the first, and cut those on the right that are too many to read."""
        if len(ids) < 2:
            raise UsageError("the text has a single token, which nothing predicts. Leave the row out.")
        kept = ids if self.max_length is None else ids[: self.max_length + 1]
        return _Scored(kept[:-1], tuple(range(len(kept) - 1)), kept[1:], len(ids) - len(kept))

    def _cut_answer(self, example: Example, first: int, stop: int) -> tuple[int, int]:
        """Return where the answer from `first` to `stop` ends after truncation, and how many tokens that cuts.

        The prompt is cut first, down to a quarter of all tokens; then the answer, on the right.
        """
        if not self._cuts_answers or self.max_length is None or len(example.candidates) > 1:
            return stop, 0
        kept = min(first, self.max_length // 4)
        cut = max(0, kept + stop - 1 - first - self.max_length)
        return stop - cut, cut

    def _spans(self, example: Example, candidate: str) -> _Scored:
        """Tokenise a chat, whose template has added the special tokens; the tokens that overlap a span are scored.

        What is cut on the left of a chat that is too long is cut from the scored turns too, except the last.
        """
        ids, offsets = self._tokens(example, example.prompt)
        scored = [
            i for i, (start, end) in enumerate(offsets) if any(start < hi and end > lo for lo, hi in example.spans)
        ]
        if not scored or scored[0] == 0:
            raise UsageError(
                "the scored turns have no token, or no token before them to predict them from; add a user turn before "
                "them."
            )
        last_turn = next(i for i in scored if offsets[i][1] > example.spans[-1][0])
        stop, cut_answer = self._cut_answer(example, last_turn, scored[-1] + 1)
        read, cut = self._truncate(ids[: stop - 1], last_turn)
        # A token is still scored if the token before it is read, other than the beginning that is always kept.
        first = self._num_kept(ids) * bool(cut)
        left = [i for i in scored if i < stop and (i >= last_turn or i - 1 - cut >= first)]
        return _Scored(read, tuple(i - 1 - cut for i in left), tuple(ids[i] for i in left), cut + cut_answer)

    def _masked(self, example: Example, candidate: str) -> _Scored:
        words = self.tokenizer(candidate, add_special_tokens=False)["input_ids"]
        if len(words) != 1:
            raise UsageError(
                f"a masked language model fills in a single token, but {candidate!r} has {len(words)} tokens; "
                "choose another word."
            )
        prompt = self._limit_first_text(example)
        mask = self.tokenizer.mask_token
        place_of_mask = len(prompt), len(prompt) + len(mask)
        ids, offsets = control_tokens(self.tokenizer).encode(
            f"{prompt}{mask}{example.suffix}", (*example.controls, place_of_mask)
        )
        # The template may contain other masks.
        place = [end for _, end in offsets].index(place_of_mask[1])
        read, cut = self._truncate(ids, place)
        return _Scored(read, (place - cut,), (words[0],), cut)

    def _limit_first_text(self, example: Example) -> str:
        """Return the prompt with its first text truncated from the right to its maximum number of tokens."""
        if example.text_limit is None:
            return example.prompt
        end, limit = example.text_limit
        text = example.prompt[:end]
        _, offsets = control_tokens(self.tokenizer).encode(text, example.controls, add_special_tokens=False)
        stops = [stop for _, stop in offsets][:limit]
        return example.prompt[: stops[-1] if len(stops) == limit else end] + example.prompt[end:]

    def _pair(self, example: Example, candidate: str) -> _Scored:
        """Tokenise the texts for a classification head, which reads the first token; candidates number its outputs."""
        if example.controls and control_tokens(self.tokenizer).literal(example.prompt, example.controls):
            read, cut = self._text_of_template(example)
        else:
            read, cut = self._texts(example)
        return _Scored(read, (0,), (example.candidates.index(candidate),), cut)

    def _texts(self, example: Example) -> tuple[tuple[int, ...], int]:
        """Return the tokens of one text or two, and how many were cut; control tokens are read in both or in none."""
        plain = {} if example.controls else {"split_special_tokens": True}

        def tokens(**cut: Any) -> tuple[int, ...]:
            return tuple(self.tokenizer(example.prompt, example.second, verbose=False, **plain, **cut)["input_ids"])

        whole = tokens()
        is_long = self.max_length is not None and len(whole) > self.max_length
        read = tokens(truncation=True, max_length=self.max_length) if is_long else whole
        return read, len(whole) - len(read)

    def _text_of_template(self, example: Example) -> tuple[tuple[int, ...], int]:
        """Return the tokens of a filled template, cut on the right of the text, and how many were cut."""
        ids, offsets = control_tokens(self.tokenizer).encode(example.prompt, example.controls)
        cut = 0 if self.max_length is None else max(0, len(ids) - self.max_length)
        stop = max((i for i, (_, end) in enumerate(offsets, start=1) if end), default=0)
        return ids[: stop - cut] + ids[stop:], cut

    def _truncate(self, ids: tuple[int, ...], prompt_length: int, room: int = 0) -> tuple[tuple[int, ...], int]:
        """Truncate to `max_length` tokens less `room`, keeping a beginning-of-sequence token and the last tokens."""
        over = 0 if self.max_length is None else len(ids) + room - self.max_length
        if over <= 0:
            return ids, 0
        if over >= prompt_length:
            beside = f"an answer of {room} tokens" if room else "the candidate"
            or_else = "lower --max-new-tokens" if room else "leave such rows out with --long-rows drop"
            raise LongRowError(
                f"--max-length {self.max_length} leaves no token of the prompt beside {beside}; raise it, or {or_else}."
            )
        keep = self._num_kept(ids)
        return ids[:keep] + ids[keep + over :], over

    def _num_kept(self, ids: tuple[int, ...]) -> int:
        """Return how many tokens at the beginning are never cut."""
        return int(ids[0] in (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id))


def _asked(example: Example) -> str:
    """Return the text to generate an answer from; of a chat with its answer what comes before that."""
    return example.prompt[: example.spans[-1][0]] if example.spans and example.candidates else example.prompt


def _start_of_continuation(example: Example) -> int:
    """Return where the text starts that continues a prompt: a text to be generated begins with the prompt's spaces."""
    end = len(example.prompt)
    if len(example.candidates) > 1:
        return end  # candidates are compared as they are written
    return len(example.prompt.rstrip(" \t")) or end


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
