"""Objectives of generated text: minus the mean reward of the completions, which has no gradient.

A zeroth-order method needs only the value of the objective, so any reward works: F1 and exact match of generated
answers, or a function of the user named `module:function`. It is called once per forward pass of a micro-batch, so for
each probe, and its result must depend on its arguments alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from zotune.errors import NonFiniteScoreError, RunError, UsageError
from zotune.llm.config.objective import ObjectiveOptions
from zotune.llm.data.examples import Example
from zotune.llm.data.tokenization import Encoded
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.scoring.accuracy import Evaluation, Scorer, batches_by_length
from zotune.llm.scoring.functions import Completion as Completion
from zotune.llm.scoring.functions import call, load_function, shown, where_raised
from zotune.llm.scoring.generated_answers import answer_evaluation, exact_match, f1
from zotune.llm.scoring.generation import Prefill, Sampling, generate
from zotune.llm.scoring.intervals import mean_interval
from zotune.llm.scoring.objectives import CLASSIFICATION, Objective
from zotune.noise import derive_seed

# The step number in the seeds of evaluations, which no training step has.
_EVALUATION_STEP = 2**32 - 1
_PURPOSE = 16


Reward = Callable[[Sequence[Completion]], Sequence[float]]


def _per_completion(score: Callable[[str, Sequence[str]], float]) -> Reward:
    return lambda completions: [score(c.text, c.references) for c in completions]


OF_ANSWERS: dict[str, Reward] = {"f1": _per_completion(f1), "exact_match": _per_completion(exact_match)}
"""The rewards of generated answers, by the value of the option `objective`."""


def open_ended(example: Example) -> Example:
    """Return the example for text generation: its right answer becomes the reference, the candidates are dropped.

    >>> open_ended(Example("It was", (" terrible", " great"), 1)).answers
    ('great',)
    """
    if not example.candidates:
        return example
    answers = example.answers or (example.candidates[example.label].strip(),)
    return replace(example, candidates=(), label=0, also_right=(), answers=answers)


def checked_rewards(name: str, function: Reward, completions: Sequence[Completion]) -> list[float]:
    """Call a reward function, and check that it returns a finite number for each completion.

    Raises:
        RunError: the function raises an error, or returns anything else.
    """
    n = len(completions)
    try:
        returned: Any = call(function, completions)
    except UsageError:
        raise
    except Exception as error:
        raise RunError(f"the objective {name} failed on {n} completions, {where_raised(error)}.") from error
    if (
        isinstance(returned, (str, bytes, dict))
        or not isinstance(returned, Iterable)
        or getattr(returned, "ndim", 1) == 0
    ):
        raise RunError(
            f"the objective {name} returned {shown(returned)}; it must return a list with one number per completion."
        )
    values = list(returned)
    if len(values) != n:
        raise RunError(
            f"the objective {name} returned {len(values)} numbers for {n} completions; it must return one per "
            f"completion."
        )
    numbers = [value.item() if getattr(value, "ndim", None) == 0 else value for value in values]
    for value, completion in zip(numbers, completions, strict=True):
        if not isinstance(value, Real) or not math.isfinite(value):
            raise RunError(
                f"the objective {name} returned {shown(value)} for the completion {completion.text!r} of the prompt "
                f"{completion.prompt[-80:]!r}; it must be a finite number."
            )
    return [float(number) for number in numbers]


@dataclass(frozen=True, repr=False)
class RewardEvaluation(Evaluation):
    """The mean reward of generated texts.

    Attributes:
        reward: the mean, with the interval of a normal distribution; predictions are the generated texts, values their
            rewards.
    """

    metric = "reward"
    is_fraction = False

    reward: float

    @property
    def value(self) -> float:
        """The mean reward, any number."""
        return self.reward

    @property
    def short(self) -> str:
        """The mean reward as short text."""
        return f"{self.reward:.4g}"

    def __str__(self) -> str:
        return f"{self.reward:.4g} ({self.low:.4g} to {self.high:.4g}, n = {self.num_examples})"


@dataclass(frozen=True)
class GeneratedObjective:
    """An objective of generated text: a reward, and the options of generation.

    Attributes:
        name: value of the option `objective`; reward: higher is better; options: the options of generation.
        seed: seed of the run; with the step's number and the row's place in the batch it determines a row's samples.
        prefill: the context for `generate`.
        function: the function of the user, if `name` is one.
    """

    name: str
    reward: Reward
    options: ObjectiveOptions
    seed: int = 0
    prefill: Prefill = lambda prompts: nullcontext()
    function: Callable[..., Any] | None = None

    def closure(
        self, lm: LanguageModel, examples: Sequence[Encoded], step: int, places: Sequence[int]
    ) -> Callable[[], Tensor]:
        """Return a function that computes minus the mean reward of some examples, to call for each probe of a step.

        `places` are the positions of the examples in the step's whole batch, so that samples do not depend on how the
        batch is split into micro-batches.
        """
        seeds = self._seeds(step, places)
        return lambda: self._loss(lm, examples, seeds)

    def _loss(self, lm: LanguageModel, examples: Sequence[Encoded], seeds: Sequence[int]) -> Tensor:
        try:
            rewards = self.reward(self.completions(lm, examples, seeds))
        except NonFiniteScoreError:
            return torch.tensor(torch.nan, dtype=torch.float64)
        return -torch.tensor(rewards, dtype=torch.float64).mean()

    def completions(self, lm: LanguageModel, examples: Sequence[Encoded], seeds: Sequence[int]) -> list[Completion]:
        """Generate a completion of each example's prompt with the present weights.

        Raises:
            NonFiniteScoreError: the logits of an example are NaN or infinite.
        """
        o = self.options
        texts = generate(
            lm,
            [e.prompt for e in examples],
            o.max_new_tokens,
            stops_at_newline=o.stop_at == "newline",
            sampling=Sampling(o.temperature, o.top_p, tuple(seeds)) if o.generation == "sample" else None,
            prefill=self.prefill,
            places=[e.place for e in examples],
        )
        return [Completion(e.text, text, e.answers, e.columns) for e, text in zip(examples, texts, strict=True)]

    def _seeds(self, step: int, places: Sequence[int]) -> list[int]:
        return [derive_seed(self.seed, step, place, _PURPOSE) for place in places]

    def measure(
        self,
        lm: LanguageModel,
        examples: Sequence[Encoded],
        batch_size: int,
        scorer: Scorer | None = None,
        objective: Objective = CLASSIFICATION,
    ) -> Evaluation:
        """Generate a completion for each example, with the same random numbers in every evaluation, and score it."""
        start, forwards_before = time.perf_counter(), lm.num_forwards
        batches = list(batches_by_length(examples, batch_size))

        def completed(indices: Sequence[int]) -> list[Completion]:
            return self.completions(lm, [examples[i] for i in indices], self._seeds(_EVALUATION_STEP, indices))

        with torch.no_grad():
            found = lm.mesh.map(completed, batches)
        completions: list[Completion] = [Completion("", "")] * len(examples)
        for indices, batch in zip(batches, found, strict=True):
            for i, completion in zip(indices, batch, strict=True):
                completions[i] = completion
        rewards = list(self.reward(completions))
        mean, texts = sum(rewards) / len(rewards), tuple(c.text for c in completions)
        seconds, forwards = time.perf_counter() - start, lm.num_forwards - forwards_before
        if self.name in OF_ANSWERS:
            return answer_evaluation(texts, examples, -mean, seconds, forwards)
        low, high = mean_interval(rewards, -math.inf, math.inf)
        return RewardEvaluation(
            low, high, len(completions), -mean, texts, seconds, forwards, mean, values=tuple(rewards)
        )


def generated_objective(options: ObjectiveOptions, seed: int) -> GeneratedObjective | None:
    """Return the objective of generated text that the options name, or None if they name another objective."""
    if options.objective is None or not options.is_generated:
        return None
    if options.objective in OF_ANSWERS:
        return GeneratedObjective(options.objective, OF_ANSWERS[options.objective], options, seed)
    function = load_function(options.objective, "objective")
    reward = partial(checked_rewards, options.objective, function)
    return GeneratedObjective(options.objective, reward, options, seed, function=function)


def check_model(lm: LanguageModel, options: ObjectiveOptions) -> None:
    """Check that the kind of model supports the objective.

    Raises:
        UsageError: the objective needs a causal model, or a language-modelling head.
    """
    if options.is_generated and lm.masked:
        raise UsageError(
            f"objective: {options.objective} needs generated text, but {lm.name} is no causal model. "
            "Use a causal model, or another objective."
        )
    if options.objective == "teacher_forcing" and lm.classifies:
        raise UsageError(
            f"objective: teacher_forcing predicts words, but {lm.name} has a classification head. "
            "Use classification, or a prompt (--prompt aligned)."
        )


def check_examples(examples: Sequence[Example], options: ObjectiveOptions) -> None:
    """Check that the rows have the candidates or answers that the objective needs.

    Raises:
        UsageError: there is no choice among candidates, or no accepted answer.
    """
    if options.objective in OF_ANSWERS and not all(e.answers for e in examples):
        raise UsageError(
            f"objective: {options.objective} compares generated answers with accepted ones, which these rows lack. "
            "Use accuracy for rows with candidates, a task of generated answers (squad, drop), "
            "or rows of a prompt and its completion."
        )
    has_choice = not any(e.answers for e in examples) and any(len(e.candidates) > 1 for e in examples)
    if options.objective in ("classification", "accuracy") and examples and not has_choice:
        raise UsageError(
            f"objective: {options.objective} chooses among candidates, but each of these rows has a single answer. "
            "Use teacher_forcing, or f1 or exact_match of generated answers."
        )
