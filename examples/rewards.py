"""Rewards of generated text, for `zotune train --objective examples.rewards:one_word`."""

from __future__ import annotations

from collections.abc import Sequence

from zotune.llm.scoring.rewards import Completion

WORDS = {"0": "negative", "1": "positive"}


def one_word(completions: Sequence[Completion]) -> list[float]:
    """Return 1 for the right one of two words and nothing else, 0.5 for the wrong one, and 0 for any other text.

    >>> one_word([Completion("Is it?", text, ("1",)) for text in ("Positive", "negative.", "It is positive.", "")])
    [1.0, 0.5, 0.0, 0.0]
    """
    return [_score(c.text.rstrip(".!").lower(), WORDS[c.reference]) for c in completions]


def _score(text: str, right: str) -> float:
    if text not in WORDS.values():
        return 0.0
    return 1.0 if text == right else 0.5
