"""Answers that are generated: greedy decoding, and how much of an accepted answer it finds.

Exact match and F1 as SQuAD defines them (Rajpurkar et al., 2016, section 6.1): lower case, no punctuation,
no articles, single spaces; F1 over the bags of words, the best over the accepted answers, averaged.
Decoding is greedy, at most 50 tokens, up to a newline or the end of text (Malladi et al., 2023, appendix E).
"""

from __future__ import annotations

import re
import string
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from zotune.llm.data.tokenization import Encoded, collate
from zotune.llm.models.load import LanguageModel
from zotune.llm.scoring.accuracy import Measured, Scorer, by_length
from zotune.llm.scoring.generation import generate
from zotune.llm.scoring.intervals import mean_interval
from zotune.llm.scoring.objectives import TEACHER_FORCING, Objective, mean_loss

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous space.

    >>> normalised("  The Cat's  hat, an old one.")
    'cats hat old one'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 where the prediction is one of the answers, up to normalisation, else 0.

    >>> exact_match("The hat.", ["a coat", "hat"])
    1.0
    """
    return float(normalised(prediction) in {normalised(answer) for answer in answers})


def f1(prediction: str, answers: Sequence[str]) -> float:
    """The best harmonic mean of precision and recall of words over the answers, in [0, 1].

    >>> f1("in the old house", ["old house", "house"])
    0.8
    """
    return max(_f1(normalised(prediction).split(), normalised(answer).split()) for answer in answers)


def _f1(predicted: list[str], gold: list[str]) -> float:
    """2 · common / (words + words); of two texts without a word 1."""
    if not predicted or not gold:
        return float(predicted == gold)
    common = sum((Counter(predicted) & Counter(gold)).values())
    return 2 * common / (len(predicted) + len(gold))


@dataclass(frozen=True)
class AnswerEvaluation(Measured):
    """How much of an accepted answer the generated ones have.

    Attributes:
        f1: the mean F1, with the interval of its normal distribution; predictions are the answers' texts.
        exact_match: fraction of answers that are an accepted one.
    """

    metric = "f1"

    f1: float
    exact_match: float

    @property
    def value(self) -> float:
        """The mean F1."""
        return self.f1

    def __str__(self) -> str:
        return f"{super().__str__()}, exact match {100 * self.exact_match:.1f} %"


def evaluate_answers(
    lm: LanguageModel,
    examples: Sequence[Encoded],
    batch_size: int,
    scorer: Scorer | None = None,
    objective: Objective = TEACHER_FORCING,
) -> AnswerEvaluation:
    """Generate an answer to each example's prompt, in batches of similar length, and compare it with the accepted."""
    began, forwards_before = time.perf_counter(), lm.num_forwards
    predictions, total, weight = [""] * len(examples), 0.0, 0
    with torch.no_grad():
        for chosen in by_length(examples, batch_size):
            some = [examples[i] for i in chosen]
            batch = collate(some, lm.pad_token_id, lm.device, exact=objective.exact)
            share = sum(map(objective.weight, some))
            total += float(mean_loss(objective, (scorer or lm.score)(batch), batch, some)) * share
            weight += share
            for i, answer in zip(chosen, generate(lm, [e.prompt for e in some]), strict=True):
                predictions[i] = answer
    seconds, forwards = time.perf_counter() - began, lm.num_forwards - forwards_before
    return answers_found(tuple(predictions), examples, total / weight, seconds, forwards)


def answers_found(
    predictions: tuple[str, ...], examples: Sequence[Encoded], loss: float, seconds: float, num_forwards: int
) -> AnswerEvaluation:
    """How much of an accepted answer the predictions have."""
    found = [f1(p, e.answers) for p, e in zip(predictions, examples, strict=True)]
    exact = [exact_match(p, e.answers) for p, e in zip(predictions, examples, strict=True)]
    low, high = mean_interval(found)
    return AnswerEvaluation(
        f1=sum(found) / len(found),
        exact_match=sum(exact) / len(exact),
        low=low,
        high=high,
        num_examples=len(examples),
        loss=loss,
        predictions=predictions,
        seconds=seconds,
        num_forwards=num_forwards,
        values=tuple(found),
    )
