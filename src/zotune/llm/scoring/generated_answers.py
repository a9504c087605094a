"""Evaluating generated answers by F1 and exact match, with greedy decoding.

Both metrics are those of SQuAD (Rajpurkar et al., 2016, section 6.1): texts are normalised to lower case without
punctuation, articles and extra spaces (except texts that are nothing else); F1 compares bags of words, with the
maximum over the accepted answers.
Decoding is greedy, by default at most 50 tokens, up to a newline or the end of text (Malladi et al., 2023, appendix E).
"""

from __future__ import annotations

import re
import string
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from zotune.llm.data.collator import collate
from zotune.llm.data.tokenization import Encoded
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.scoring.accuracy import Evaluation, Scorer, batches_by_length
from zotune.llm.scoring.finite import check_scores
from zotune.llm.scoring.generation import MAX_NEW_TOKENS, generate
from zotune.llm.scoring.intervals import mean_interval
from zotune.llm.scoring.objectives import TEACHER_FORCING, Objective, mean_loss

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Return a text in lower case without punctuation, articles and extra spaces.

    Of a text that has nothing else, such as the letter of a choice, articles count, and then punctuation. Otherwise an
    empty text would equal it.

    >>> normalised("  The Cat's  hat, an old one."), normalised("A."), normalised("?!")
    ('cats hat old one', 'a', '?!')
    """
    lower = text.lower()
    words = lower.translate(_PUNCTUATION)
    return next((found for some in (_ARTICLES.sub(" ", words), words, lower) if (found := " ".join(some.split()))), "")


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if the prediction equals an answer after normalisation, else 0.

    >>> exact_match("The hat.", ["a coat", "hat"])
    1.0
    """
    return float(normalised(prediction) in {normalised(answer) for answer in answers})


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Return the harmonic mean of word precision and recall in [0, 1], the maximum over the answers.

    >>> f1("in the old house", ["old house", "house"])
    0.8
    """
    return max(_f1(normalised(prediction).split(), normalised(answer).split()) for answer in answers)


def _f1(predicted: list[str], gold: list[str]) -> float:
    """Return 2 · common words / all words; 1 for two texts without words."""
    if not predicted or not gold:
        return float(predicted == gold)
    common = sum((Counter(predicted) & Counter(gold)).values())
    return 2 * common / (len(predicted) + len(gold))


@dataclass(frozen=True, repr=False)
class AnswerEvaluation(Evaluation):
    """The agreement of generated answers with the accepted ones.

    Attributes:
        f1: mean F1, with the interval of a normal distribution; predictions are the generated texts.
        exact_match: fraction of generated answers that equal an accepted one.
    """

    metric = "f1"
    title = "mean F1 of the answers' words (as in SQuAD)"

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
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    stops_at_newline: bool = True,
) -> AnswerEvaluation:
    """Generate an answer to each prompt, in batches of similar length, and compare it with the accepted answers.

    Raises:
        NonFiniteScoreError: an example's logits are NaN or infinite, in its accepted answer or while one is generated.
    """
    answers = partial(generate, lm, max_new_tokens=max_new_tokens, stops_at_newline=stops_at_newline)
    start, forwards_before = time.perf_counter(), lm.num_forwards
    batches = list(batches_by_length(examples, batch_size))

    def answered(indices: Sequence[int]) -> tuple[list[str], float]:
        some = [examples[i] for i in indices]
        batch = collate(some, lm.pad_token_id, lm.device, exact=objective.exact)
        score = (scorer or lm.score)(batch)
        check_scores(score, some)
        loss = float(mean_loss(objective, score, batch, some))
        return answers([e.prompt for e in some], places=[e.place for e in some]), loss

    with torch.no_grad():
        found = lm.mesh.map(answered, batches)
    predictions, total, weight = [""] * len(examples), 0.0, 0
    for indices, (texts, loss) in zip(batches, found, strict=True):
        batch_weight = sum(objective.weight(examples[i]) for i in indices)
        total += loss * batch_weight
        weight += batch_weight
        for i, text in zip(indices, texts, strict=True):
            predictions[i] = text
    seconds, forwards = time.perf_counter() - start, lm.num_forwards - forwards_before
    return answer_evaluation(tuple(predictions), examples, total / weight, seconds, forwards)


def answer_evaluation(
    predictions: tuple[str, ...], examples: Sequence[Encoded], loss: float, seconds: float, num_forwards: int
) -> AnswerEvaluation:
    """Compare predictions with the accepted answers."""
    scores = [f1(p, e.answers) for p, e in zip(predictions, examples, strict=True)]
    exact = [exact_match(p, e.answers) for p, e in zip(predictions, examples, strict=True)]
    low, high = mean_interval(scores)
    return AnswerEvaluation(
        f1=sum(scores) / len(scores),
        exact_match=sum(exact) / len(exact),
        low=low,
        high=high,
        num_examples=len(examples),
        loss=loss,
        predictions=predictions,
        seconds=seconds,
        num_forwards=num_forwards,
        values=tuple(scores),
    )
