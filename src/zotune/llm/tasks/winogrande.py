"""WinoGrande: which of two nouns fills the blank of a sentence?

2,558 training rows (size m; 40,398 in size xl) and 1,267 validation rows; the paper trains on 1,000, holds out 100
and reports on 1,000. A candidate is the option with all that follows the blank, and its score the mean over both.
Source: Sakaguchi et al., 2020, "WinoGrande: an adversarial Winograd schema challenge at scale"; CC-BY.
"""

from __future__ import annotations

from zotune.llm.data.examples import Example, Row
from zotune.llm.scoring.objectives import TEACHER_FORCING
from zotune.llm.tasks.task import HEAD_HAS_NO_LABELS, MASKED_IS_NOT_DEFINED, Task


def causal(row: Row) -> Example:
    """`{text left of the blank}` → ` {option}{text right of the blank}`.

    >>> row = {"sentence": "Ann beat Bo, so _ won.", "option1": "Ann", "option2": "Bo", "answer": "1"}
    >>> causal(row).prompt, causal(row).candidates, causal(row).label
    ('Ann beat Bo, so', (' Ann won.', ' Bo won.'), 0)
    """
    left, _, right = row["sentence"].partition("_")
    candidates = tuple(f" {row[option]}{right.rstrip()}" for option in ("option1", "option2"))
    return Example(left.rstrip(), candidates, int(row["answer"]) - 1)


WINOGRANDE = Task(
    name="winogrande",
    description="the noun that fills a blank, two options",
    causal=causal,
    masked=MASKED_IS_NOT_DEFINED,
    plain="has no prompt to take away: it is the row's own sentence. Use --prompt aligned.",
    head=HEAD_HAS_NO_LABELS,
    hub=("allenai/winogrande", "winogrande_m"),
    source="WinoGrande 1.1 (Sakaguchi et al., 2020)",
    licence="CC-BY",
    size=(2_558, 1_267),
    objective=TEACHER_FORCING,
    num_dev=100,
    note="Drawn from the 40,398 training rows of size xl, not from the 2,558 of size m.",
)
