"""MultiRC: is an answer to a question about a paragraph correct? Multi-Sentence Reading Comprehension, as in SuperGLUE.

27,243 training and 4,848 validation rows, one a (question, answer) pair; Malladi et al. (2023) train on 1,000, hold
out 500 and report on 1,000: accuracy over pairs, not SuperGLUE's F1a or exact match. The paper measures memory and
time on it (its Table 4). The prompt is Malladi et al.'s; they define no masked form.
Source: Khashabi et al., 2018; as SuperGLUE's card states: research use.
"""

from __future__ import annotations

from zotune.llm.data.examples import Example, Row
from zotune.llm.tasks.task import HEAD_TAKES_TWO_TEXTS, MASKED_IS_NOT_DEFINED, Task

_WORDS = ("No", "Yes")


def causal(row: Row) -> Example:
    r"""`{paragraph}⏎Question: {question}⏎I found this answer "{answer}". Is that correct? Yes or No?⏎` → `No` | `Yes`.

    >>> row = {"paragraph": "Elms are trees.", "question": "What are elms?", "answer": "Trees", "label": 1}
    >>> causal(row).prompt
    'Elms are trees.\nQuestion: What are elms?\nI found this answer "Trees". Is that correct? Yes or No?\n'
    """
    found = f'I found this answer "{row["answer"]}". Is that correct? Yes or No?'
    return Example(f"{row['paragraph']}\nQuestion: {row['question']}\n{found}\n", _WORDS, int(row["label"]))


def plain(row: Row) -> Example:
    """`{paragraph}⏎{question}⏎"{answer}"⏎` → the same words."""
    return Example(f'{row["paragraph"]}\n{row["question"]}\n"{row["answer"]}"\n', _WORDS, int(row["label"]))


MULTIRC = Task(
    name="multirc",
    description="whether an answer to a question about a paragraph is correct",
    causal=causal,
    masked=MASKED_IS_NOT_DEFINED,
    plain=plain,
    head=HEAD_TAKES_TWO_TEXTS,
    hub=("aps/super_glue", "multirc"),
    source="SuperGLUE MultiRC (Khashabi et al., 2018)",
    licence="research use (SuperGLUE)",
    size=(27_243, 4_848),
)
