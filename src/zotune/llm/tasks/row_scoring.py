"""What is learnt of rows of each shape, and what is reported on them."""

from __future__ import annotations

from functools import partial

from zotune.llm.config.data import DataOptions
from zotune.llm.rows.shapes import PLAIN_TEXT, PROMPT_ALONE
from zotune.llm.scoring.accuracy import Measure, evaluate_accuracy
from zotune.llm.scoring.generated_answers import evaluate_answers
from zotune.llm.scoring.objectives import CLASSIFICATION, TEACHER_FORCING, Objective
from zotune.llm.scoring.perplexity import evaluate_log_loss

SCORING: dict[str, tuple[Objective, Measure]] = {
    "classification": (CLASSIFICATION, evaluate_accuracy),
    "completion": (TEACHER_FORCING, evaluate_log_loss),
    "chat": (TEACHER_FORCING, evaluate_log_loss),
    "choice": (TEACHER_FORCING, evaluate_accuracy),
    "alpaca": (TEACHER_FORCING, evaluate_log_loss),
    "sharegpt": (TEACHER_FORCING, evaluate_log_loss),
    PROMPT_ALONE: (CLASSIFICATION, evaluate_accuracy),
    PLAIN_TEXT: (TEACHER_FORCING, evaluate_log_loss),
}
"""The objective of training and the reported metric, by the name of the shape."""


def measure_of(options: DataOptions) -> Measure:
    """Return the evaluation of rows of the options' shape."""
    measure = SCORING[options.data_format or ""][1]
    # Metrics judge answers; where none is chosen, one is generated.
    if not options.exact_match and not (options.compute_metrics and measure is evaluate_log_loss):
        return measure
    return partial(
        evaluate_answers, max_new_tokens=options.max_new_tokens, stops_at_newline=options.stop_at == "newline"
    )
