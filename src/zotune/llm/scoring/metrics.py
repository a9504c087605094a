"""Further metrics of an evaluation: functions of the user, and ROUGE, of what a model answered to each row.

A metric is a function of all completions of an evaluation and of the row's columns, as a reward is; it returns a
number, or several by name. What is judged is the generated text, or the candidate that the model chose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from zotune.errors import RunError, UsageError
from zotune.llm.config.objective import METRICS
from zotune.llm.data.tokenization import Candidate, Encoded
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.scoring.accuracy import AccuracyEvaluation, Evaluation, Measure, Scorer
from zotune.llm.scoring.functions import Completion, call, load_function, shown, where_raised
from zotune.llm.scoring.objectives import CLASSIFICATION, Objective

Metric = Callable[..., Any]


def rouge(completions: Sequence[Completion]) -> dict[str, float]:
    """Return ROUGE-1, -2 and -L (Lin, 2004): the F-measure of each text with the reference that it is nearest to.

    They are computed by torchmetrics, in [0, 1], with the means over the completions.

    Raises:
        UsageError: torchmetrics is not installed, or a row has no reference.
    """
    rouge_score = _rouge_score()
    if not all(c.references for c in completions):
        raise UsageError("compute_metrics: rouge compares texts with references, which some rows lack.")
    keys = ("rouge1", "rouge2", "rougeL")
    texts, references = [c.text for c in completions], [list(c.references) for c in completions]
    found = rouge_score(texts, references, accumulate="best", rouge_keys=keys)
    return {key: float(found[f"{key}_fmeasure"]) for key in keys}


def _rouge_score() -> Callable[..., Any]:
    try:
        from torchmetrics.functional.text import rouge_score
    except ImportError:
        raise UsageError(
            "compute_metrics: rouge is computed by torchmetrics, which is not installed: pip install 'zotune[metrics]'."
        ) from None
    return rouge_score  # type: ignore[no-any-return]


NAMED: dict[str, Metric] = {"rouge": rouge}
"""The metrics that zotune has by name; a test compares them with those of the option."""


def load_metric(name: str) -> Metric:
    """Return a metric by name, or the function `module:function`.

    Raises:
        UsageError: the library that it needs is missing, or the function cannot be imported.
    """
    if name in METRICS:
        _rouge_score()  # before anything is trained
        return NAMED[name]
    return load_function(name, "compute_metrics")


@dataclass(frozen=True)
class WithMetrics:
    """A measure with further metrics of the same predictions.

    Attributes:
        measure: the measure.
        metrics: each metric with the name that the option gives it.
    """

    measure: Measure
    metrics: tuple[tuple[str, Metric], ...]

    def __call__(
        self,
        lm: LanguageModel,
        examples: Sequence[Encoded],
        batch_size: int,
        scorer: Scorer | None = None,
        objective: Objective = CLASSIFICATION,
    ) -> Evaluation:
        """Evaluate all examples in batches, and compute the further metrics.

        Raises:
            RunError: a metric fails, or returns something else than numbers.
        """
        found = self.measure(lm, examples, batch_size, scorer, objective)
        completions = [_completion(lm, e, found, i) for i, e in enumerate(examples)]
        more: dict[str, float] = {}
        for name, metric in self.metrics:
            values = checked_metrics(name, metric, completions)
            twice = next((key for key in values if key in found.summary() or key in more), None)
            if twice is not None:
                raise RunError(
                    f"compute_metrics: {name} returned {twice!r}, a name that the evaluation has; rename it."
                )
            more |= values
        return replace(found, more=more)


def with_measure(measure: Measure, other: Measure) -> Measure:
    """Return another measure, with the further metrics of the first one if it has some."""
    return replace(measure, measure=other) if isinstance(measure, WithMetrics) else other


def _completion(lm: LanguageModel, e: Encoded, found: Evaluation, index: int) -> Completion:
    """Return what was answered to an example: the generated text, or the chosen candidate."""
    if not isinstance(found, AccuracyEvaluation):
        return Completion(e.text, found.predictions[index], e.answers, e.columns)
    words = [_word(lm, c) for c in e.candidates]
    right = tuple(words[i] for i in dict.fromkeys((e.label, *e.also_right)))
    chosen = e.candidates[found.predictions[index]]
    # A classifier's head reads the whole text at one of its tokens.
    stop = None if lm.classifies else chosen.positions[0] + 1
    prompt = lm.tokenizer.decode(list(e.sequences[chosen.sequence][:stop]))
    return Completion(prompt, words[found.predictions[index]], right, e.columns)


def _word(lm: LanguageModel, candidate: Candidate) -> str:
    """Return the text of a candidate; that of a classifier is the number of an output, which a class belongs to."""
    if lm.classifies:
        return str(lm.config.id2label[candidate.tokens[0]]).strip()
    return str(lm.tokenizer.decode(list(candidate.tokens))).strip()


def checked_metrics(name: str, metric: Metric, completions: Sequence[Completion]) -> dict[str, float]:
    """Call a metric, and check that it returns a number, or numbers by name.

    Raises:
        RunError: it raises an error, or returns something else.

    >>> checked_metrics("m:length", lambda completions: 2, [])
    {'length': 2.0}
    """
    try:
        returned: Any = call(metric, completions)
    except UsageError:
        raise
    except Exception as error:
        raise RunError(f"compute_metrics: {name} failed on {len(completions)} rows, {where_raised(error)}.") from error
    values = returned if isinstance(returned, Mapping) else {name.partition(":")[2] or name: returned}
    numbers = {key: v.item() if getattr(v, "ndim", None) == 0 else v for key, v in values.items()}
    for key, value in numbers.items():
        if not isinstance(key, str) or not isinstance(value, Real) or math.isnan(value):
            raise RunError(
                f"compute_metrics: {name} returned {shown(value)} for {key!r}; it must return a number, or a dict of "
                "numbers by name."
            )
    return {key: float(value) for key, value in numbers.items()}
