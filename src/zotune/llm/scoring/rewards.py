"""Objectives of generated text, without a gradient: minus the mean of what a function says of each completion.

A zeroth-order method sees only the objective's value, so any number will do: F1 and exact match of generated
answers, or a function of the user's own, named `module:function`. It is called once a forward pass of the
micro-batch, so with each probe, and must depend on its argument alone.
"""

from __future__ import annotations

import importlib
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zotune.errors import RunError, UsageError, did_you_mean
from zotune.llm.config.objective import ObjectiveOptions
from zotune.llm.data.examples import Example
from zotune.llm.data.tokenization import Encoded
from zotune.llm.models.load import LanguageModel
from zotune.llm.scoring.accuracy import Measured, Scorer, by_length
from zotune.llm.scoring.answers import answers_found, exact_match, f1
from zotune.llm.scoring.generation import Sampling, Starting, generate
from zotune.llm.scoring.intervals import mean_interval
from zotune.llm.scoring.objectives import CLASSIFICATION, Objective
from zotune.noise import derive_seed

# The seeds of an evaluation's rows are those of no step: steps are counted from 0.
_EVALUATION = 2**32 - 1
_PURPOSE = 16


@dataclass(frozen=True)
class Completion:
    """What a model made of a prompt.

    Attributes:
        prompt: what it read, in words.
        text: what it generated, without surrounding white space.
        references: the accepted answers of the row, or the right candidate's text; empty where a row has none.
    """

    prompt: str
    text: str
    references: tuple[str, ...] = ()

    @property
    def reference(self) -> str:
        """The first of the references; empty where there is none."""
        return self.references[0] if self.references else ""


Reward = Callable[[Sequence[Completion]], Sequence[float]]


def _each(score: Callable[[str, Sequence[str]], float]) -> Reward:
    return lambda completions: [score(c.text, c.references) for c in completions]


OF_ANSWERS: dict[str, Reward] = {"f1": _each(f1), "exact_match": _each(exact_match)}
"""The objectives of generated answers, by the name of the option."""


def open_ended(example: Example) -> Example:
    """The example as one whose text is generated: its right answer is what to compare with, no more.

    >>> open_ended(Example("It was", (" terrible", " great"), 1)).answers
    ('great',)
    """
    if not example.candidates:
        return example
    answers = example.answers or (example.candidates[example.label].strip(),)
    return replace(example, candidates=(), label=0, also_right=(), answers=answers)


def find_reward(name: str) -> Reward:
    """The function that `module:function` names, from the current folder or the Python path.

    Raises:
        UsageError: the module cannot be imported, or has no such function.
    """
    module_name, _, function_name = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise UsageError(f"objective {name}: importing {module_name} failed, {_where(error)}.") from error
        raise UsageError(
            f"objective {name}: there is no module {module_name!r} in the current folder ({here}) or on the Python "
            f"path. Run from the folder that holds {module_name.replace('.', '/')}.py, or add that to PYTHONPATH."
        ) from None
    except Exception as error:
        raise UsageError(f"objective {name}: importing {module_name} failed, {_where(error)}.") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UsageError(
            f"objective {name}: {getattr(module, '__file__', module_name)} has no function {function_name!r}."
            + did_you_mean(function_name, known)
        )
    return partial(checked, name, function)


def checked(name: str, function: Reward, completions: Sequence[Completion]) -> list[float]:
    """What the function says of each completion.

    Raises:
        RunError: it raises, or does not return one finite number for each.
    """
    n = len(completions)
    try:
        found: Any = function(completions)
    except Exception as error:
        raise RunError(f"the objective {name} failed on {n} completions, {_where(error)}.") from error
    if isinstance(found, (str, bytes, dict)) or not isinstance(found, Iterable) or getattr(found, "ndim", 1) == 0:
        raise RunError(
            f"the objective {name} returned {_shown(found)}; it must return a list, one number a completion."
        )
    values = list(found)
    if len(values) != n:
        raise RunError(f"the objective {name} returned {len(values)} numbers for {n} completions; it must be one each.")
    numbers = [value.item() if getattr(value, "ndim", None) == 0 else value for value in values]
    for value, completion in zip(numbers, completions, strict=True):
        if not isinstance(value, Real) or not math.isfinite(value):
            raise RunError(
                f"the objective {name} returned {_shown(value)} for the completion {completion.text!r} of the prompt "
                f"{completion.prompt[-80:]!r}; it must be a finite number."
            )
    return [float(number) for number in numbers]


def _shown(value: object) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '…'} ({type(value).__name__})"


def _where(error: BaseException) -> str:
    """The error, and the file and line that it comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{frames[-1].filename}, line {frames[-1].lineno}: " if frames else ""
    return f"{place}{type(error).__name__}: {error}"


@dataclass(frozen=True)
class RewardEvaluation(Measured):
    """What a function says of generated text.

    Attributes:
        reward: the mean, with the interval of its normal distribution; predictions are the completions' texts, values
            their rewards.
    """

    metric = "reward"
    is_fraction = False

    reward: float

    @property
    def value(self) -> float:
        """The mean reward: any number."""
        return self.reward

    @property
    def short(self) -> str:
        """The mean reward as people read it."""
        return f"{self.reward:.4g}"

    def __str__(self) -> str:
        return f"{self.reward:.4g} ({self.low:.4g} to {self.high:.4g}, n = {self.num_examples})"


@dataclass(frozen=True)
class Generated:
    """The objective of text that a model generates, and how it is generated.

    Attributes:
        name: of the option; reward: the higher, the better; options: how to generate.
        seed: the run's; with a step's number and a row's place in its batch it names what is drawn for the row.
        starting: as `generate` takes it.
    """

    name: str
    reward: Reward
    options: ObjectiveOptions
    seed: int = 0
    starting: Starting = lambda prompts: nullcontext()

    def closure(
        self, lm: LanguageModel, examples: Sequence[Encoded], step: int, places: Sequence[int]
    ) -> Callable[[], Tensor]:
        """Minus the mean reward of some examples, as a function to call with each probe of a step.

        `places` are the examples' in the step's whole batch: cutting it in parts changes no draw.
        """
        seeds = self._seeds(step, places)
        return lambda: self._loss(lm, examples, seeds)

    def _loss(self, lm: LanguageModel, examples: Sequence[Encoded], seeds: Sequence[int]) -> Tensor:
        rewards = self.reward(self.completions(lm, examples, seeds))
        return -torch.tensor(rewards, dtype=torch.float64).mean()

    def completions(self, lm: LanguageModel, examples: Sequence[Encoded], seeds: Sequence[int]) -> list[Completion]:
        """What the model makes of each example's prompt at its present weights."""
        o = self.options
        texts = generate(
            lm,
            [e.prompt for e in examples],
            o.max_new_tokens,
            stops_at_newline=o.stop_at == "newline",
            sampling=Sampling(o.temperature, o.top_p, tuple(seeds)) if o.generation == "sample" else None,
            starting=self.starting,
        )
        return [Completion(e.text, text, e.answers) for e, text in zip(examples, texts, strict=True)]

    def _seeds(self, step: int, places: Sequence[int]) -> list[int]:
        return [derive_seed(self.seed, step, place, _PURPOSE) for place in places]

    def measure(
        self,
        lm: LanguageModel,
        examples: Sequence[Encoded],
        batch_size: int,
        scorer: Scorer | None = None,
        objective: Objective = CLASSIFICATION,
    ) -> Measured:
        """Generate for each example, in batches of similar length, always with the same draws, and judge the texts."""
        began, forwards_before = time.perf_counter(), lm.num_forwards
        found: list[Completion] = [Completion("", "")] * len(examples)
        with torch.no_grad():
            for chosen in by_length(examples, batch_size):
                some = self.completions(lm, [examples[i] for i in chosen], self._seeds(_EVALUATION, chosen))
                for i, completion in zip(chosen, some, strict=True):
                    found[i] = completion
        rewards = list(self.reward(found))
        mean, texts = sum(rewards) / len(rewards), tuple(c.text for c in found)
        seconds, forwards = time.perf_counter() - began, lm.num_forwards - forwards_before
        if self.name in OF_ANSWERS:
            return answers_found(texts, examples, -mean, seconds, forwards)
        low, high = mean_interval(rewards, -math.inf, math.inf)
        return RewardEvaluation(low, high, len(found), -mean, texts, seconds, forwards, mean, values=tuple(rewards))


def find_generated(options: ObjectiveOptions, seed: int) -> Generated | None:
    """The objective of generated text that the options name; None where they name another."""
    if options.objective is None or not options.is_generated:
        return None
    reward = OF_ANSWERS.get(options.objective) or find_reward(options.objective)
    return Generated(options.objective, reward, options, seed)


def check_kind(lm: LanguageModel, options: ObjectiveOptions) -> None:
    """Refuse an objective that the kind of model has no use for.

    Raises:
        UsageError: the model generates nothing, or has labels in place of words.
    """
    if options.is_generated and lm.masked:
        raise UsageError(f"objective: {options.objective} needs generated text, but {lm.name} is no causal model.")
    if options.objective == "teacher_forcing" and lm.classifies:
        raise UsageError(
            f"objective: teacher_forcing is about words, but {lm.name} has a classification head. "
            "Use classification, or a prompt (--prompt aligned)."
        )


def check_examples(examples: Sequence[Example], options: ObjectiveOptions) -> None:
    """Refuse an objective that the rows have not what it takes for.

    Raises:
        UsageError: there is no choice among candidates, or no accepted answer.
    """
    if options.objective in OF_ANSWERS and not all(e.answers for e in examples):
        raise UsageError(
            f"objective: {options.objective} compares generated answers with accepted ones, which these rows have not. "
            "Use accuracy where there are candidates to choose from, a task of generated answers (squad, drop), "
            "or rows of a prompt and its completion."
        )
    has_choice = not any(e.answers for e in examples) and any(len(e.candidates) > 1 for e in examples)
    if options.objective in ("classification", "accuracy") and examples and not has_choice:
        raise UsageError(
            f"objective: {options.objective} chooses among candidates, but of these rows each has one answer. "
            "Use teacher_forcing, or f1 or exact_match of generated answers."
        )
