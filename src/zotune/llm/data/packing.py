"""Packing plain texts: their tokens one after the other, cut into windows of equal length.

A window reads `length` tokens and predicts the token after each, so every token but the very first is predicted once:
the last one of a window is the first that the next window reads. Texts are separated by the end-of-text token, and a
window may hold the end of one and the beginning of another, which attends to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from zotune.llm.data.tokenization import Candidate, Encoded

# Tokens of a window if none are asked for, as in TRL; fewer if the model reads fewer.
DEFAULT_LENGTH = 1024


def packed(texts: Iterable[tuple[int, ...]], length: int) -> Iterator[Encoded]:
    """Yield the windows of some tokenised texts; the last one may be shorter.

    Args:
        texts: the tokens of each text, with its end-of-text token.
        length: tokens that a window reads, at least 1.

    >>> [w.sequences[0] + w.candidates[0].tokens[-1:] for w in packed([(1, 2, 3), (4, 5, 6)], 2)]
    [(1, 2, 3), (3, 4, 5), (5, 6)]
    """
    tokens = (token for text in texts for token in text)
    window, number = tuple(islice(tokens, length + 1)), 1
    while len(window) > 1:
        scored = Candidate(0, tuple(range(len(window) - 1)), window[1:])
        yield Encoded((window[:-1],), (scored,), 0, place=f"window {number}")
        window, number = window[-1:] + tuple(islice(tokens, length)), number + 1
