"""Loading the data and the objective of a run: as examples, and as tokens of the model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from zotune.errors import UsageError
from zotune.llm.config.data import DataOptions
from zotune.llm.data.examples import Example, Splits
from zotune.llm.data.tokenization import Encoded, Encoder, check_distinct
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.rows.sources import UserRows
from zotune.llm.scoring.accuracy import Measure, evaluate_accuracy
from zotune.llm.scoring.objectives import CLASSIFICATION, OBJECTIVES, Objective
from zotune.llm.scoring.rewards import GeneratedObjective, check_examples, check_model, generated_objective, open_ended
from zotune.llm.tasks import find_task
from zotune.llm.tasks.class_rows import for_classes
from zotune.llm.tasks.user_data import Data, load_user_data


@dataclass(frozen=True)
class EncodedData:
    """The splits as tokens, with their objective and their metric.

    Attributes:
        options: for the user's own rows with the inferred format, template and verbalizer.
        notes: remarks on the rows, one line each.
        generated: the objective in place of `objective`, if each evaluation generates text.
    """

    train: tuple[Encoded, ...]
    dev: tuple[Encoded, ...]
    test: tuple[Encoded, ...]
    objective: Objective = CLASSIFICATION
    measure: Measure = evaluate_accuracy
    options: DataOptions = field(default_factory=DataOptions.model_construct)
    notes: tuple[str, ...] = ()
    generated: GeneratedObjective | None = None


def load_examples(lm: LanguageModel, options: DataOptions, given: UserRows | None = None) -> Data:
    """Load the data that `options` name, or rows that are given, as examples with their objective.

    Raises:
        UsageError: the data cannot be read, or the objective does not suit the data or the model.
    """
    if lm.classifies and options.task is not None and options.prompt == "aligned":
        raise UsageError(f"{lm.name} has a classification head, which needs no prompt: give a task and --prompt none.")
    check_model(lm, options)
    if lm.classifies and options.task is None:
        options = for_classes(lm, options)
    if options.task is None:
        return _with_objective(load_user_data(options, lm.tokenizer, masked=lm.masked, given=given))
    task = find_task(options.task)
    return _with_objective(Data(task.splits(options, lm.masked), task.objective, task.measure, options, ()))


def _with_objective(data: Data) -> Data:
    """Return the data with the objective that the options name, if they name one."""
    options, splits = data.options, data.splits
    check_examples((*splits.train, *splits.dev, *splits.test), options)
    if options.is_function:
        splits = Splits(*(tuple(map(open_ended, some)) for some in (splits.train, splits.dev, splits.test)))
    if (generated := generated_objective(options, getattr(options, "seed", 0))) is not None:
        return replace(data, splits=splits, objective=CLASSIFICATION, measure=generated.measure, generated=generated)
    return data if options.objective is None else replace(data, objective=OBJECTIVES[options.objective])


def load_rows(lm: LanguageModel, options: DataOptions, given: UserRows | None = None) -> EncodedData:
    """Load the data that `options` name, or rows that are given, as tokens of the model, with their objective.

    Raises:
        UsageError: as `load_examples` and `encode_rows`.
    """
    return encode_rows(lm, options, load_examples(lm, options, given))


def encode_rows(lm: LanguageModel, options: DataOptions, data: Data) -> EncodedData:
    """Tokenise examples for the model.

    Raises:
        UsageError: a row does not fit the model; the message says which and why.
    """
    encode = encoder_of(lm, options)

    def encoded(name: str) -> tuple[Encoded, ...]:
        examples: tuple[Example, ...] = getattr(data.splits, name)
        tokens = tuple(encode(e, e.place or f"{name} row {i}") for i, e in enumerate(examples, start=1))
        # The prompts and labels of tasks need no check.
        if options.task is None:
            for both in zip(tokens, examples, strict=True):
                check_distinct(*both)
        return tokens

    train, dev, test = (encoded(name) for name in ("train", "dev", "test"))
    train = tuple(map(data.objective.reads, train))
    return EncodedData(train, dev, test, data.objective, data.measure, data.options, data.notes, data.generated)


def encoder_of(lm: LanguageModel, options: DataOptions) -> Encoder:
    """Return the encoder of a model's examples."""
    return Encoder(
        lm.tokenizer,
        masked=lm.masked,
        context=lm.context,
        max_length=options.max_length,
        classifies=lm.classifies,
        new_tokens=options.max_new_tokens,
        num_embeddings=lm.num_embeddings,
    )
