"""TREC: what kind of answer does a question ask for? Six coarse kinds.

5,452 training rows and 500 test rows, which are reported on. Malladi et al. (2023) define the masked form; the
causal one is this project's. The kinds are numbered differently in different releases, so they are taken by name.
Source: Li and Roth, 2002, "Learning question classifiers"; the licence is unknown by its card.
"""

from __future__ import annotations

from zotune.errors import UsageError
from zotune.llm.data.examples import Example, Row
from zotune.llm.tasks.task import Task

_KINDS = {
    "DESC": "Description",
    "ENTY": "Entity",
    "ABBR": "Expression",
    "HUM": "Human",
    "LOC": "Location",
    "NUM": "Number",
}
_WORDS = tuple(f" {word}" for word in _KINDS.values())
# Columns that name the kind, alone or before a colon and the fine kind.
_NAMES = ("coarse_label_name", "fine_label_name", "label-coarse_name", "coarse_label", "label")


def label_of(row: Row) -> int:
    """The kind of a row, whatever its number there.

    >>> label_of({"coarse_label": 2, "fine_label_name": "DESC:manner"}), label_of({"coarse_label": "NUM"})
    (0, 5)
    """
    for column in _NAMES:
        kind = str(row.get(column, "")).partition(":")[0]
        if kind in _KINDS:
            return list(_KINDS).index(kind)
    raise UsageError(
        f"trec: a row names no kind of answer: {str(row)[:80]}. Its number alone will not do, for releases differ; "
        f"give a column coarse_label_name with one of {', '.join(_KINDS)}."
    )


def causal(row: Row) -> Example:
    r"""`{text}⏎The answer type is` → ` Description` | ` Entity` | ` Expression` | ` Human` | ` Location` | ` Number`.

    >>> causal({"text": "Who wrote it ?", "fine_label_name": "HUM:ind"}).prompt
    'Who wrote it ?\nThe answer type is'
    """
    return Example(f"{row['text'].strip()}\nThe answer type is", _WORDS, label_of(row))


def masked(row: Row) -> Example:
    """`[M]: {text}`, the same words."""
    return Example("", _WORDS, label_of(row), suffix=f": {row['text'].strip()}")


def plain(row: Row) -> Example:
    """`{text}` → the same words."""
    return Example(row["text"].strip(), _WORDS, label_of(row))


def head(row: Row) -> Example:
    """The question."""
    return Example(row["text"].strip(), tuple(_KINDS), label_of(row))


TREC = Task(
    name="trec",
    description="kind of answer that a question asks for, six kinds",
    causal=causal,
    masked=masked,
    plain=plain,
    head=head,
    labels=tuple(_KINDS),
    hub=("CogComp/trec", None),
    hub_test_split="test",
    source="TREC question classification (Li and Roth, 2002); evaluation rows are the official test rows",
    licence="unknown",
    size=(5_452, 500),
)
