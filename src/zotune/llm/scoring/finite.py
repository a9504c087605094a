"""Refusing scores that are no numbers: `argmax` of NaN is an index like any other, and would count as a prediction."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from zotune.errors import NonFiniteScoreError
from zotune.llm.data.tokenization import Encoded


def check_scores(score: Tensor, examples: Sequence[Encoded]) -> None:
    """Check the (examples, candidates) scores of an evaluation; padding is -∞.

    Raises:
        NonFiniteScoreError: an example's best score is not finite; the message names its place.
    """
    check_best(score, [e.place for e in examples])


def check_best(scores: Tensor, places: Sequence[str]) -> None:
    """Check that each row of (rows, choices) scores has a finite maximum; NaN is larger than any number.

    Raises:
        NonFiniteScoreError: a row has none; the message names its place.

    >>> import torch
    >>> check_best(torch.tensor([[0.0, -torch.inf], [torch.nan, 1.0]]), ["a.csv, line 2", "a.csv, line 3"])
    Traceback (most recent call last):
    zotune.errors.NonFiniteScoreError: a.csv, line 3: the model's best score is nan, so the row has no prediction. ...
    """
    best = scores.amax(dim=1).tolist()
    for value, place in zip(best, places, strict=True):
        if value - value != 0:  # NaN or infinite
            raise NonFiniteScoreError(
                f"{place}: the model's best score is {value}, so the row has no prediction. The weights hold numbers "
                "that are not finite, or an activation left the range of their precision: check the checkpoint, or use "
                "--dtype bfloat16 or float32."
            )
