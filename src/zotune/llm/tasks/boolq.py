"""BoolQ: yes or no to a question about a passage.

9,427 training and 3,270 validation rows; Malladi et al. (2023) train on 1,000, hold out 500 and report on 1,000.
The prompt is theirs, with a newline before the answer; they define no masked form.
Source: Clark et al., 2019, "BoolQ: Exploring the surprising difficulty of natural yes/no questions"; CC BY-SA 3.0.
"""

from __future__ import annotations

from zotune.llm.data.examples import Example, Row
from zotune.llm.tasks.task import MASKED_IS_NOT_DEFINED, Task

_WORDS = ("Yes", "No")


def label_of(row: Row) -> int:
    """0 for yes. SuperGLUE's release calls the column label, the original answer."""
    return 0 if row["label" if "label" in row else "answer"] else 1


def causal(row: Row) -> Example:
    r"""`{passage} {question, first letter upper-cased, with question mark}⏎` → `Yes` | `No`.

    >>> example = causal({"passage": "Elm is a wood.", "question": "is elm a wood", "label": 1})
    >>> example.prompt, example.label
    ('Elm is a wood. Is elm a wood?\n', 0)
    """
    question = row["question"] if row["question"].endswith("?") else f"{row['question']}?"
    return Example(f"{row['passage']} {question[:1].upper()}{question[1:]}\n", _WORDS, label_of(row))


def plain(row: Row) -> Example:
    """`{passage} {question}⏎` → the same words; the question as it stands."""
    return Example(f"{row['passage']} {row['question']}\n", _WORDS, label_of(row))


def head(row: Row) -> Example:
    """Question and passage, in this order: a long passage is what gets cut."""
    return Example(row["question"], _WORDS, label_of(row), second=row["passage"])


BOOLQ = Task(
    name="boolq",
    description="yes or no to a question about a passage",
    causal=causal,
    masked=MASKED_IS_NOT_DEFINED,
    plain=plain,
    head=head,
    labels=_WORDS,
    hub=("google/boolq", None),
    source="BoolQ (Clark et al., 2019)",
    licence="CC BY-SA 3.0",
    size=(9_427, 3_270),
    note="Drawn from 64 of the public training rows, those of FewGLUE.",
)
