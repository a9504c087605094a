"""SST-2: is a phrase of a film review positive or negative? Stanford Sentiment Treebank, as in GLUE.

67,349 training and 872 validation rows; the paper trains on 1,000, holds out 500 and reports on the
872 (section 4.1). Prompt and words are those of the paper's Table 1 and of Malladi et al. (2023).
Source: Socher et al., 2013; GLUE's card states no explicit licence.
"""

from __future__ import annotations

from zotune.llm.data.examples import Example, Row
from zotune.llm.tasks.task import Task

_WORDS, _LABELS = (" terrible", " great"), ("negative", "positive")


def causal(row: Row) -> Example:
    """`{sentence} It was` → ` terrible` | ` great`.

    >>> example = causal({"sentence": "a gorgeous film ", "label": 1})
    >>> example.prompt, example.candidates, example.label
    ('a gorgeous film It was', (' terrible', ' great'), 1)
    """
    return Example(f"{row['sentence'].strip()} It was", _WORDS, int(row["label"]))


def masked(row: Row) -> Example:
    """`{sentence} It was[M].`, the same words."""
    return Example(f"{row['sentence'].strip()} It was", _WORDS, int(row["label"]), suffix=".")


def plain(row: Row) -> Example:
    """`{sentence}` → ` terrible` | ` great`."""
    return Example(row["sentence"].strip(), _WORDS, int(row["label"]))


def head(row: Row) -> Example:
    """The sentence."""
    return Example(row["sentence"].strip(), _LABELS, int(row["label"]))


SST2 = Task(
    name="sst2",
    description="sentiment of film reviews, two labels",
    causal=causal,
    masked=masked,
    plain=plain,
    head=head,
    labels=_LABELS,
    hub=("nyu-mll/glue", "sst2"),
    source="GLUE SST-2, from the Stanford Sentiment Treebank (Socher et al., 2013)",
    licence="none stated (Stanford Sentiment Treebank)",
    size=(67_349, 872),
)
