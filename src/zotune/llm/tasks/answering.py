"""The common part of SQuAD and DROP, tasks of generated answers: training by teacher forcing, evaluation by F1.

The prompts are those of Malladi et al. (2023), appendix E.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from zotune.llm.data.examples import Example
from zotune.llm.scoring.generated_answers import evaluate_answers
from zotune.llm.scoring.objectives import TEACHER_FORCING
from zotune.llm.tasks.task import MASKED_IS_NOT_DEFINED, Task


def answered(prompt: str, answers: Iterable[str]) -> Example:
    r"""Return the example `{prompt}` → ` {first answer}⏎`, for which any of the answers is right.

    >>> answered("Who?\nAnswer:", ["Ann", "she"]).candidates
    (' Ann\n',)
    """
    accepted = tuple(answers)
    return Example(prompt, (f" {accepted[0]}\n",), 0, answers=accepted)


answering = partial(
    Task,
    masked=MASKED_IS_NOT_DEFINED,
    plain="generates its answer, and the texts without a prompt do not tell the model that an answer follows. "
    "Use --prompt aligned.",
    head="generates its answer, so a classification head has no labels. Use a causal model.",
    objective=TEACHER_FORCING,
    measure=evaluate_answers,
)
"""A constructor of tasks with generated answers; the remaining fields are passed by name."""
