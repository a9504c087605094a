"""A tokenised example: the sequences that the model reads, and the positions where candidates are scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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
        num_cut: tokens that were cut from the row because it is too long.
        columns: the row's columns, for a reward or a metric that reads them.
    """

    sequences: tuple[tuple[int, ...], ...]
    candidates: tuple[Candidate, ...]
    label: int
    also_right: tuple[int, ...] = ()
    answers: tuple[str, ...] = ()
    prompt: tuple[int, ...] = ()
    text: str = ""
    place: str = field(default="an example", compare=False, repr=False)
    num_cut: int = field(default=0, compare=False, repr=False)
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def length(self) -> int:
        """The tokens of the longest sequence, or of a prompt without candidates."""
        return max(map(len, self.sequences or (self.prompt,)))

    @property
    def differ_in_last_token(self) -> bool:
        """Whether the candidates share all tokens but the last, so that the scores of these are one constant."""
        return len({(c.sequence, c.positions, c.tokens[:-1]) for c in self.candidates}) == 1

    def is_right(self, prediction: int) -> bool:
        """Whether a candidate is one of the right ones."""
        return prediction == self.label or prediction in self.also_right
