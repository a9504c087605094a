"""ReCoRD: which entity of a news passage fills the gap in a statement? As in SuperGLUE; several may be right.

100,730 training and 10,000 validation rows; Malladi et al. (2023) train on 1,000, hold out 500 and report on 1,000:
teacher forcing on the first answer, and a prediction counts if it is among the answers. They define no masked form.
Source: Zhang et al., 2018, "ReCoRD: bridging the gap between human and machine commonsense reading comprehension";
as SuperGLUE's card states: research use.
"""

from __future__ import annotations

from zotune.llm.data.examples import Example, Row
from zotune.llm.scoring.objectives import TEACHER_FORCING
from zotune.llm.tasks.task import HEAD_HAS_NO_LABELS, MASKED_IS_NOT_DEFINED, Task


def causal(row: Row) -> Example:
    r"""`{passage, "@highlight⏎" as "- "}⏎-` → ` {query with @placeholder replaced by the entity}`.

    >>> row = {"passage": "Ann met Bo.\n@highlight\nThey met", "query": "@placeholder met Bo", "answers": ["Ann"]}
    >>> example = causal({**row, "entities": ["Bo", "Ann"]})
    >>> example.prompt, example.candidates, example.label
    ('Ann met Bo.\n- They met\n-', (' Bo met Bo', ' Ann met Bo'), 1)
    """
    entities, answers = list(row["entities"]), list(row["answers"])
    passage = row["passage"].replace("@highlight\n", "- ")
    right = [entities.index(answer) for answer in answers]
    candidates = tuple(f" {row['query'].replace('@placeholder', entity)}" for entity in entities)
    return Example(f"{passage}\n-", candidates, right[0], also_right=tuple(right[1:]))


RECORD = Task(
    name="record",
    description="the entity that fills a gap, several may be right",
    causal=causal,
    masked=MASKED_IS_NOT_DEFINED,
    plain="has no prompt to take away: its candidates are the row's own statement. Use --prompt aligned.",
    head=HEAD_HAS_NO_LABELS,
    hub=("aps/super_glue", "record"),
    source="SuperGLUE ReCoRD (Zhang et al., 2018)",
    licence="research use (SuperGLUE)",
    size=(100_730, 10_000),
    objective=TEACHER_FORCING,
    note="Drawn from 64 of the public training rows, those of FewGLUE; its evaluation rows are 32 of these.",
)
