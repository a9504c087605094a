"""SST-5: how positive is a film review, on five grades? Stanford Sentiment Treebank.

8,544 training, 1,101 validation and 2,210 test rows; Malladi et al. (2023) define the masked form and report on
the validation rows, at most 1,000. The causal form is this project's: SST-2's with the five words.
Source: Socher et al., 2013; no explicit licence.
"""

from __future__ import annotations

from zotune.llm.data.examples import Example, Row
from zotune.llm.tasks.task import Task

_WORDS = (" terrible", " bad", " okay", " good", " great")
_LABELS = ("very negative", "negative", "neutral", "positive", "very positive")


def causal(row: Row) -> Example:
    """`{text} It was` → ` terrible` | ` bad` | ` okay` | ` good` | ` great`.

    >>> causal({"text": "one long string of cliches .", "label": 1}).prompt
    'one long string of cliches . It was'
    """
    return Example(f"{row['text'].strip()} It was", _WORDS, int(row["label"]))


def masked(row: Row) -> Example:
    """`{text} It was[M].`, the same words."""
    return Example(f"{row['text'].strip()} It was", _WORDS, int(row["label"]), suffix=".")


def plain(row: Row) -> Example:
    """`{text}` → the same words."""
    return Example(row["text"].strip(), _WORDS, int(row["label"]))


def head(row: Row) -> Example:
    """The text."""
    return Example(row["text"].strip(), _LABELS, int(row["label"]))


SST5 = Task(
    name="sst5",
    description="sentiment of film reviews, five grades",
    causal=causal,
    masked=masked,
    plain=plain,
    head=head,
    labels=_LABELS,
    hub=("SetFit/sst5", None),
    source="SST-5, from the Stanford Sentiment Treebank (Socher et al., 2013)",
    licence="none stated (Stanford Sentiment Treebank)",
    size=(8_544, 1_101),
)
