"""DROP: answers to questions that take counting, sorting or arithmetic over a passage. The answer is generated.

77,400 training and 9,535 validation rows; Malladi et al. (2023) train on 1,000 by teacher forcing, hold out 500 and
report F1 on 1,000. The prompt is theirs; F1 is SQuAD's, the best over the answers, not DROP's own of several spans.
Source: Dua et al., 2019, "DROP: a reading comprehension benchmark requiring discrete reasoning over paragraphs";
CC BY-SA 4.0.
"""

from __future__ import annotations

from zotune.llm.data.examples import Example, Row
from zotune.llm.tasks.answering import answered, answering


def causal(row: Row) -> Example:
    r"""`Passage: {passage}⏎Question: {question}⏎Answer:` → ` {first answer}⏎`.

    >>> row = {"passage": "Two and two.", "question": "How many?", "answers_spans": {"spans": ["4", "four"]}}
    >>> causal(row).prompt, causal(row).answers
    ('Passage: Two and two.\nQuestion: How many?\nAnswer:', ('4', 'four'))
    """
    return answered(f"Passage: {row['passage']}\nQuestion: {row['question']}\nAnswer:", row["answers_spans"]["spans"])


DROP = answering(
    name="drop",
    description="answers that take counting or arithmetic, generated",
    causal=causal,
    hub=("ucinlp/drop", None),
    source="DROP (Dua et al., 2019)",
    licence="CC BY-SA 4.0",
    size=(77_400, 9_535),
    note="19 rows of three passages, AllenNLP's fixture, to report on; there are none to train on.",
)
