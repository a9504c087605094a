"""RTE: does a passage imply a sentence? Recognizing Textual Entailment, as in SuperGLUE.

2,490 training and 277 validation rows; Malladi et al. (2023) train on 1,000, hold out 500 and report on the 277;
so does the paper, in its Table 1 alone. Prompts are theirs.
Source: Dagan et al., 2006, and the later challenges; as SuperGLUE's card states: research use.
"""

from __future__ import annotations

from zotune.llm.data.examples import Example, Row
from zotune.llm.tasks.entailment import fill_in, pair, unaligned
from zotune.llm.tasks.task import Task

_LABELS = {"entailment": "Yes", "not_entailment": "No"}


def causal(row: Row) -> Example:
    r"""`{premise}⏎Does this mean that "{hypothesis}" is true? Yes or No?⏎` → `Yes` | `No`.

    >>> causal({"premise": "It rained.", "hypothesis": "It was wet.", "label": 0}).prompt
    'It rained.\nDoes this mean that "It was wet." is true? Yes or No?\n'
    """
    question = f'{row["premise"]}\nDoes this mean that "{row["hypothesis"]}" is true? Yes or No?\n'
    return Example(question, tuple(_LABELS.values()), int(row["label"]))


RTE = Task(
    name="rte",
    description="entailment between a passage and a sentence, two labels",
    causal=causal,
    masked=fill_in(_LABELS),
    plain=unaligned(_LABELS),
    head=pair(_LABELS),
    labels=tuple(_LABELS),
    hub=("aps/super_glue", "rte"),
    source="SuperGLUE RTE (Dagan et al., 2006, and later challenges)",
    licence="research use (SuperGLUE)",
    size=(2_490, 277),
)
