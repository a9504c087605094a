"""DROP: answers to questions that take counting, sorting or arithmetic over a passage. The answer is generated.

77,400 training and 9,535 validation rows; Malladi et al. (2023) train on 1,000 by teacher forcing, hold out 500 and
report F1 on 1,000. The prompt is theirs; F1 is SQuAD's, the best over the answers, not DROP's own of several spans.
Source: Dua et al., 2019, "DROP: a reading comprehension benchmark requiring discrete reasoning over paragraphs";
CC BY-SA 4.0.
"""

from __future__ import annotations

from zotune.llm.answers import evaluate_answers
from zotune.llm.data import Example, Row
from zotune.llm.objective import TEACHER_FORCING
from zotune.llm.task import MASKED_IS_NOT_DEFINED, Task


def causal(row: Row) -> Example:
    r"""`Passage: {passage}⏎Question: {question}⏎Answer:` → ` {first answer}⏎`.

    >>> row = {"passage": "Two and two.", "question": "How many?", "answers_spans": {"spans": ["4", "four"]}}
    >>> causal(row).prompt, causal(row).answers
    ('Passage: Two and two.\nQuestion: How many?\nAnswer:', ('4', 'four'))
    """
    answers = tuple(row["answers_spans"]["spans"])
    prompt = f"Passage: {row['passage']}\nQuestion: {row['question']}\nAnswer:"
    return Example(prompt, (f" {answers[0]}\n",), 0, answers=answers)


DROP = Task(
    name="drop",
    description="answers that take counting or arithmetic, generated",
    causal=causal,
    masked=MASKED_IS_NOT_DEFINED,
    plain="generates its answer: without the words around the texts nothing says that one is to follow.",
    head="generates its answer, so a classification head has no labels. Use a causal model.",
    hub=("ucinlp/drop", None),
    source="DROP (Dua et al., 2019)",
    licence="CC BY-SA 4.0",
    size=(77_400, 9_535),
    objective=TEACHER_FORCING,
    measure=evaluate_answers,
    note="19 rows of three passages, AllenNLP's fixture, to report on; there are none to train on.",
)
