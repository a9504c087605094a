"""COPA: which of two sentences is the likelier cause, or effect, of a third? As in SuperGLUE.

Choice of Plausible Alternatives: 400 training and 100 validation rows; 100 of the training rows are held out, which
leaves 300 to train on, and the 100 are reported on (the paper, section 4.1; Malladi et al., 2023). Prompt and loss are
theirs; they define no masked form.
Source: Roemmele et al., 2011; BSD 2-clause.
"""

from __future__ import annotations

from zotune.llm.data.examples import Example, Row
from zotune.llm.scoring.objectives import TEACHER_FORCING
from zotune.llm.tasks.task import HEAD_HAS_NO_LABELS, MASKED_IS_NOT_DEFINED, Task

_CONJUNCTIONS = {"effect": " so", "cause": " because"}


def causal(row: Row) -> Example:
    """`{premise without its full stop} so` (or ` because`) → ` {choice, its first word lower-cased unless it is I}`.

    >>> choices = {"choice1": "He left.", "choice2": "I left."}
    >>> example = causal({"premise": "It rained.", "question": "effect", "label": 1, **choices})
    >>> example.prompt, example.candidates
    ('It rained so', (' he left.', ' I left.'))
    """
    premise, conjunction = row["premise"].rstrip().removesuffix("."), _CONJUNCTIONS[row["question"]]
    return Example(f"{premise}{conjunction}", _choices(row), int(row["label"]))


def plain(row: Row) -> Example:
    """`{premise without its full stop}` → ` {choice}`, the same."""
    return Example(row["premise"].rstrip().removesuffix("."), _choices(row), int(row["label"]))


def _choices(row: Row) -> tuple[str, ...]:
    return tuple(f" {_continuing(row[name])}" for name in ("choice1", "choice2"))


def _continuing(sentence: str) -> str:
    first, space, rest = sentence.partition(" ")
    return f"{first if first == 'I' else first.lower()}{space}{rest}"


COPA = Task(
    name="copa",
    description="the more plausible cause or effect, two choices",
    causal=causal,
    masked=MASKED_IS_NOT_DEFINED,
    plain=plain,
    head=HEAD_HAS_NO_LABELS,
    hub=("aps/super_glue", "copa"),
    source="SuperGLUE COPA (Roemmele et al., 2011)",
    licence="BSD 2-clause",
    size=(400, 100),
    objective=TEACHER_FORCING,
    num_train=300,
    num_dev=100,
)
