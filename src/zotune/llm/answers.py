"""Answers that are generated: greedy decoding, and how much of an accepted answer it finds.

Exact match and F1 as SQuAD defines them (Rajpurkar et al., 2016, section 6.1): lower case, no punctuation,
no articles, single spaces; F1 over the bags of words, the best over the accepted answers, averaged.
Decoding is greedy, at most 50 tokens, up to a newline or the end of text (Malladi et al., 2023, appendix E).
"""

from __future__ import annotations

import math
import re
import string
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zotune.llm.evaluate import Measured, Scorer, by_length
from zotune.llm.models import LanguageModel
from zotune.llm.objective import TEACHER_FORCING, Encoded, Objective, collate, mean_loss

MAX_NEW_TOKENS = 50
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


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean of values in [0, 1], by the normal distribution; all of [0, 1] for one value.

    >>> [round(end, 3) for end in mean_interval([0.0, 1.0, 1.0, 0.5] * 25)]
    [0.543, 0.707]
    """
    n = len(values)
    if n < 2:
        return 0.0, 1.0
    mean = sum(values) / n
    half = 1.959963984540054 * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return max(0.0, mean - half), min(1.0, mean + half)


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
    found = [f1(p, e.answers) for p, e in zip(predictions, examples, strict=True)]
    exact = [exact_match(p, e.answers) for p, e in zip(predictions, examples, strict=True)]
    low, high = mean_interval(found)
    return AnswerEvaluation(
        f1=sum(found) / len(found),
        exact_match=sum(exact) / len(exact),
        low=low,
        high=high,
        num_examples=len(examples),
        loss=total / weight,
        predictions=tuple(predictions),
        seconds=time.perf_counter() - began,
        num_forwards=lm.num_forwards - forwards_before,
        values=tuple(found),
    )


def generate(lm: LanguageModel, prompts: Sequence[tuple[int, ...]], max_new_tokens: int = MAX_NEW_TOKENS) -> list[str]:
    """The text that the model continues each prompt with, greedily, up to a newline or the end of text.

    One call of the model a new token, with its keys and values kept; `lm.num_forwards` counts them.
    """
    from transformers import GenerationConfig, StoppingCriteriaList

    length = max(map(len, prompts))
    padded = [[lm.pad_token_id] * (length - len(p)) + list(p) for p in prompts]
    mask = [[0] * (length - len(p)) + [1] * len(p) for p in prompts]
    line_end = _LineEnd(lm.tokenizer, length)
    module: Any = lm.module
    out: Tensor = module.generate(
        input_ids=torch.tensor(padded, device=lm.device),
        attention_mask=torch.tensor(mask, device=lm.device),
        generation_config=GenerationConfig(
            max_new_tokens=max_new_tokens,
            # Plainly greedy: what the checkpoint's own configuration says of sampling must not enter.
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            use_cache=True,
            pad_token_id=lm.pad_token_id,
            eos_token_id=lm.tokenizer.eos_token_id,
        ),
        stopping_criteria=StoppingCriteriaList([line_end]),
    )
    lm.num_forwards += out.shape[1] - length
    texts = (lm.tokenizer.decode(row, skip_special_tokens=True) for row in out[:, length:].tolist())
    return [text.split("\n")[0].strip() for text in texts]


@dataclass
class _LineEnd:
    """Which sequences have a newline among their new tokens: any token whose text holds one."""

    tokenizer: Any
    prompt_length: int
    _known: dict[int, bool] = field(default_factory=dict)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        last = input_ids[:, -1].tolist()
        return torch.tensor([self._ends(token) for token in last], dtype=torch.bool, device=input_ids.device)

    def _ends(self, token: int) -> bool:
        if token not in self._known:
            self._known[token] = "\n" in self.tokenizer.decode([token])
        return self._known[token]
