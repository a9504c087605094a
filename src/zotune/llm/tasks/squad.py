"""SQuAD: the words of a paragraph that answer a question. The answer is generated.

87,599 training and 10,570 validation rows; Malladi et al. (2023) train on 1,000 by teacher forcing, hold out 500 and
report F1 on 1,000. The prompt is theirs.
Source: Rajpurkar et al., 2016, "SQuAD: 100,000+ questions for machine comprehension of text"; CC BY-SA 4.0.
"""

from __future__ import annotations

from zotune.llm.data.examples import Example, Row
from zotune.llm.tasks.answering import answered, answering


def causal(row: Row) -> Example:
    r"""`Title: {title}⏎Context: {context}⏎Question: {question}⏎Answer:` → ` {first answer}⏎`.

    >>> row = {"title": "Elm", "context": "Elms are trees.", "question": "What?", "answers": {"text": ["trees"]}}
    >>> causal(row).prompt, causal(row).candidates
    ('Title: Elm\nContext: Elms are trees.\nQuestion: What?\nAnswer:', (' trees\n',))
    """
    return answered(
        f"Title: {row['title']}\nContext: {row['context']}\nQuestion: {row['question']}\nAnswer:",
        row["answers"]["text"],
    )


SQUAD = answering(
    name="squad",
    description="answers to questions about a paragraph, generated",
    causal=causal,
    hub=("rajpurkar/squad", None),
    source="SQuAD 1.1 (Rajpurkar et al., 2016)",
    licence="CC BY-SA 4.0",
    size=(87_599, 10_570),
    note="Drawn from 4,330 rows with one answer each and no title, of a public split that is not known; rows to "
    "train on and rows to report on share no context.",
)
