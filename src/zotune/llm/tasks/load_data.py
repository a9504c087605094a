"""The data that a run's options name, with what is minimised on them: as examples, and as tokens of the model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from zotune.errors import UsageError
from zotune.llm.config.run import DataOptions
from zotune.llm.data.examples import Example, Splits
from zotune.llm.data.tokenization import Encoded, Encoder, check_distinct
from zotune.llm.models.load import LanguageModel
from zotune.llm.scoring.accuracy import Measure, evaluate
from zotune.llm.scoring.objectives import CLASSIFICATION, OBJECTIVES, Objective
from zotune.llm.scoring.rewards import Generated, check_examples, check_kind, find_generated, open_ended
from zotune.llm.tasks import find_task
from zotune.llm.tasks.user_data import Data, own_data


@dataclass(frozen=True)
class Rows:
    """The splits as tokens, what is minimised on them, and what is reported.

    Attributes:
        options: of one's own rows, what was taken: their shape, template and verbalizer.
        notes: what there is to say of them, a line each.
        generated: what is minimised in place of `objective`, where each evaluation generates text.
    """

    train: tuple[Encoded, ...]
    dev: tuple[Encoded, ...]
    test: tuple[Encoded, ...]
    objective: Objective = CLASSIFICATION
    measure: Measure = evaluate
    options: DataOptions = field(default_factory=DataOptions.model_construct)
    notes: tuple[str, ...] = ()
    generated: Generated | None = None


def load_examples(lm: LanguageModel, options: DataOptions) -> Data:
    """The data that `options` name, as examples, and what is minimised on them.

    Raises:
        UsageError: the data cannot be read, or the objective makes no sense for them or for the model.
    """
    if lm.classifies and options.prompt == "aligned":
        raise UsageError(f"{lm.name} has a classification head and reads no prompt: give a task and --prompt none.")
    check_kind(lm, options)
    if options.task is None:
        return _minimising(own_data(options, lm.tokenizer, masked=lm.masked))
    task = find_task(options.task)
    return _minimising(Data(task.splits(options, lm.masked), task.objective, task.measure, options, ()))


def _minimising(data: Data) -> Data:
    """The data with the objective that their options name in place of their own."""
    options, splits = data.options, data.splits
    check_examples((*splits.train, *splits.dev, *splits.test), options)
    if options.is_function:
        splits = Splits(*(tuple(map(open_ended, some)) for some in (splits.train, splits.dev, splits.test)))
    if (generated := find_generated(options, getattr(options, "seed", 0))) is not None:
        return replace(data, splits=splits, objective=CLASSIFICATION, measure=generated.measure, generated=generated)
    return data if options.objective is None else replace(data, objective=OBJECTIVES[options.objective])


def load_rows(lm: LanguageModel, options: DataOptions) -> Rows:
    """The data that `options` name, as tokens of the model, and what is minimised on them.

    Raises:
        UsageError: as `load_examples` and `encode_rows`.
    """
    return encode_rows(lm, options, load_examples(lm, options))


def encode_rows(lm: LanguageModel, options: DataOptions, data: Data) -> Rows:
    """Examples as tokens of the model.

    Raises:
        UsageError: a row does not fit the model; the message says which and why.
    """
    encode = encoder_of(lm, options)

    def encoded(name: str) -> tuple[Encoded, ...]:
        examples: tuple[Example, ...] = getattr(data.splits, name)
        tokens = tuple(encode(e, e.place or f"{name} row {i}") for i, e in enumerate(examples, start=1))
        # The shipped tasks' own prompts and labels are what they are.
        if options.task is None:
            for both in zip(tokens, examples, strict=True):
                check_distinct(*both)
        return tokens

    train, dev, test = (encoded(name) for name in ("train", "dev", "test"))
    train = tuple(map(data.objective.reads, train))
    return Rows(train, dev, test, data.objective, data.measure, data.options, data.notes, data.generated)


def encoder_of(lm: LanguageModel, options: DataOptions) -> Encoder:
    """How a model's examples become tokens."""
    return Encoder(
        lm.tokenizer,
        masked=lm.masked,
        context=lm.context,
        max_length=options.max_length,
        classifies=lm.classifies,
        new_tokens=options.max_new_tokens,
    )
