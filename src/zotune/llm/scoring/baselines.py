"""Baselines of a result: the most frequent label, and another model on the same rows.

Two models agree on most rows, so their difference on the same rows is known more precisely than either result; its
interval is that of paired data.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from zotune.llm.data.examples import Example
from zotune.llm.scoring.intervals import NORMAL, wilson


@dataclass(frozen=True)
class Difference:
    """A difference of two means over the same rows, in [-1, 1], with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:+.1f} points ({100 * self.low:+.1f} to {100 * self.high:+.1f})"


@dataclass(frozen=True)
class Majority:
    """The accuracy of always answering with the most frequent label.

    Attributes:
        label: index of the label among the candidates; chosen_on: the rows it was chosen on, training or evaluation.
        accuracy, low, high: accuracy on the evaluation rows, with Wilson's interval.
    """

    accuracy: float
    low: float
    high: float
    label: int
    chosen_on: str


def paired_difference(ones: Sequence[float], others: Sequence[float]) -> Difference:
    """Return the mean of `ones` minus that of `others`, values in [0, 1] of the same rows in the same order.

    The interval is that of Bonett and Price (2012): a normal interval after adding two rows, one that only the first
    side gets right and one that only the other does. It is meant for right and wrong answers, and has a positive width
    even if the two sides agree on every row.

    >>> print(paired_difference([1, 1, 1, 0] * 25, [1, 0, 1, 0] * 25))
    +25.0 points (+15.7 to +33.3)
    """
    differences = [one - other for one, other in zip(ones, others, strict=True)]
    more = [*differences, 1.0, -1.0]
    mean = sum(more) / len(more)
    half = NORMAL * math.sqrt(sum((d - mean) ** 2 for d in more)) / len(more)
    return Difference(sum(differences) / len(differences), max(-1.0, mean - half), min(1.0, mean + half))


def majority(train: Sequence[Example], test: Sequence[Example]) -> Majority | None:
    """Return the accuracy on the evaluation rows of the label that is most frequent in the training rows.

    Without training rows the label is chosen on the evaluation rows. The result is None if labels have no common
    meaning: for generated answers, for texts, and for candidates that vary in number.

    >>> rows = [Example("p", ("no", "yes"), label) for label in (1, 1, 0)]
    >>> majority(rows, rows[1:]).accuracy
    0.5
    """
    sizes = {len(e.candidates) for e in test}
    if any(e.answers for e in test) or len(sizes) != 1 or max(sizes) < 2:
        return None
    rows, chosen_on = (train, "training") if train else (test, "evaluation")
    counts = Counter(e.label for e in rows)
    label = max(sorted(counts), key=counts.__getitem__)
    hits = sum(label == e.label or label in e.also_right for e in test)
    return Majority(hits / len(test), *wilson(hits, len(test)), label, chosen_on)
