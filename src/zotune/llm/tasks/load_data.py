"""Loading the data and the objective of a run: as examples, and as tokens of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, TypeVar

from zotune.errors import UsageError
from zotune.llm.config.data import DataOptions
from zotune.llm.data.examples import Example, Splits
from zotune.llm.data.row_bounds import one_row_at_a_time
from zotune.llm.data.template_sources import with_template
from zotune.llm.data.tokenization import Encoded, Encoder
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.rows.sources import UserRows, stream_files
from zotune.llm.scoring.accuracy import Measure, evaluate_accuracy
from zotune.llm.scoring.functions import columns_taken
from zotune.llm.scoring.metrics import WithMetrics, load_metric
from zotune.llm.scoring.objectives import CLASSIFICATION, OBJECTIVES, Objective
from zotune.llm.scoring.rewards import GeneratedObjective, check_examples, check_model, generated_objective, open_ended
from zotune.llm.tasks import find_task
from zotune.llm.tasks.class_rows import for_classes, in_order_of_outputs
from zotune.llm.tasks.encoding import check_some_left, encode_split, held_out_windows, notes_on_length
from zotune.llm.tasks.streaming import split_head, store_rows
from zotune.llm.tasks.user_data import Data, load_user_data

Options = TypeVar("Options", bound=DataOptions)


@dataclass(frozen=True)
class EncodedData:
    """The splits as tokens, with their objective and their metric.

    Attributes:
        options: for the user's own rows with the inferred format, template and verbalizer.
        notes: remarks on the rows, one line each.
        generated: the objective in place of `objective`, if each evaluation generates text.
        kept: the index of the example of each row for evaluation; empty if the rows are windows of several texts.
    """

    train: Sequence[Encoded]
    dev: tuple[Encoded, ...]
    test: tuple[Encoded, ...]
    objective: Objective = CLASSIFICATION
    measure: Measure = evaluate_accuracy
    options: DataOptions = field(default_factory=DataOptions.model_construct)
    notes: tuple[str, ...] = ()
    generated: GeneratedObjective | None = None
    kept: tuple[int, ...] = ()


def load_examples(lm: LanguageModel, options: DataOptions, given: UserRows | None = None) -> Data:
    """Load the data that `options` name, or rows that are given, as examples with their objective.

    Raises:
        UsageError: the data cannot be read, or the objective does not suit the data or the model.
    """
    if lm.classifies and options.task is not None and options.prompt == "aligned":
        raise UsageError(f"{lm.name} has a classification head, which needs no prompt: give a task and --prompt none.")
    check_model(lm, options)
    if options.task is None:
        options = with_chat_template(lm, for_classes(lm, options) if lm.classifies else options)
        data = load_user_data(options, lm.tokenizer, masked=lm.masked, given=given)
        return _with_objective(data, [in_order_of_outputs(lm)] if lm.classifies else [])
    task = find_task(options.task)
    return _with_objective(Data(task.splits(options, lm.masked), task.objective, task.measure, options, ()))


def with_chat_template(lm: LanguageModel, options: Options) -> Options:
    """Give the model's tokenizer the chat template that the options name, and return the options with its text.

    The tokenizer becomes a copy, so that its owner's stays as it is.

    Raises:
        UsageError: there is no such template, or what is named is none.
    """
    if options.chat_template is None:
        return options
    lm.tokenizer = with_template(lm.tokenizer, options.chat_template)
    return options.model_copy(update={"chat_template": lm.tokenizer.chat_template})


def _with_objective(data: Data, changes: Sequence[Callable[[Example], Example]] = ()) -> Data:
    """Return the data with the objective and the further metrics that the options name, and with changed examples."""
    options, splits = data.options, data.splits
    check_examples((*splits.train, *splits.dev, *splits.test), options)
    changes = [*changes, *([open_ended] if options.is_function else [])]
    for change in changes:
        splits = _mapped(splits, change)
    generated = generated_objective(options, getattr(options, "seed", 0))
    metrics = tuple((name, load_metric(name)) for name in options.compute_metrics)
    functions = {options.objective or "": generated.function} if generated and generated.function else {}
    changes.append(_columns_read(splits, {**functions, **{name: metric for name, metric in metrics if ":" in name}}))
    splits = _mapped(splits, changes[-1])
    if generated is not None:
        measure: Measure = generated.measure
        data = replace(data, objective=CLASSIFICATION, measure=measure, generated=generated)
    elif options.objective is not None:
        data = replace(data, objective=OBJECTIVES[options.objective])
    if metrics:
        data = replace(data, measure=WithMetrics(data.measure, metrics))
    if (to_example := data.to_example) is not None:
        data = replace(data, to_example=lambda row: reduce(lambda e, change: change(e), changes, to_example(row)))
    return replace(data, splits=splits)


def _mapped(splits: Splits, change: Callable[[Example], Example]) -> Splits:
    """Return the splits with each example changed, once for the same example."""
    changed = {id(e): change(e) for some in (splits.train, splits.dev, splits.test) for e in some}
    return Splits(*(tuple(changed[id(e)] for e in some) for some in (splits.train, splits.dev, splits.test)))


def _columns_read(splits: Splits, functions: Mapping[str, Callable[..., Any]]) -> Callable[[Example], Example]:
    """Return a function from an example to the same with those columns of its row that some function takes.

    Raises:
        UsageError: a function takes a column that the rows do not have.
    """
    every = {id(e): e for some in (splits.train, splits.dev, splits.test) for e in some}.values()
    known = dict.fromkeys(key for e in every for key in e.columns)
    taken = [key for name, function in functions.items() for key in columns_taken(function, known, name)]
    if not known:
        return lambda example: example
    return lambda e: replace(e, columns={key: e.columns.get(key) for key in dict.fromkeys(taken)})


def load_rows(lm: LanguageModel, options: DataOptions, given: UserRows | None = None) -> EncodedData:
    """Load the data that `options` name, or rows that are given, as tokens of the model, with their objective.

    Raises:
        UsageError: as `load_examples` and `encode_rows`.
    """
    return encode_rows(lm, options, load_examples(lm, options, given))


def load_training_rows(lm: LanguageModel, options: DataOptions, given: UserRows | None = None) -> EncodedData:
    """As `load_rows`; training rows of a stream are not held in memory.

    Raises:
        UsageError: as `load_rows`.
    """
    if not options.streaming:
        return load_rows(lm, options, given)
    given = stream_files(options) if given is None else given
    with one_row_at_a_time():
        return _load_stream(lm, options, given)


def _load_stream(lm: LanguageModel, options: DataOptions, given: UserRows) -> EncodedData:
    """Read training rows one at a time: the first ones tell the shape, and all become tokens on the disk."""
    assert given.stream is not None
    head, stream = split_head(given.stream, options)
    shown = options.model_copy(update={"num_dev": 0, "num_train": None, "train_file_weights": ()})
    data = load_examples(lm, shown, UserRows(head.rows, given.eval))
    assert data.to_example is not None
    dev = tuple(map(data.to_example, head.held_out))
    splits = Splits((), dev, data.splits.test if given.eval is not None else dev)
    rows = encode_rows(lm, data.options, replace(data, splits=splits))
    train, note = store_rows(encoder_of(lm, options), stream, data.to_example, data.objective.reads, options)
    resolved = data.options.model_copy(update={name: getattr(options, name) for name in _OF_THE_HEAD})
    return replace(rows, train=train, options=resolved, notes=(*rows.notes, note))


# Options that are others while the first rows of a stream are read.
_OF_THE_HEAD = ("num_dev", "num_train", "train_file_weights")


def encode_rows(lm: LanguageModel, options: DataOptions, data: Data) -> EncodedData:
    """Tokenise examples for the model.

    Raises:
        UsageError: a row does not fit the model; the message says which and why.
    """
    encode = encoder_of(lm, options)
    same = data.splits.test == data.splits.dev
    splits = {
        name: encode_split(encode, getattr(data.splits, name), options, name)
        for name in ("train", "dev", *(() if same else ("test",)))
    }
    if options.packing and options.num_dev is None and same and not splits["dev"].rows:
        splits["train"], splits["dev"] = held_out_windows(splits["train"])
    check_some_left(splits)
    test = splits["dev"] if same else splits["test"]
    return EncodedData(
        tuple(map(data.objective.reads, splits["train"].rows)),
        splits["dev"].rows,
        test.rows,
        data.objective,
        data.measure,
        data.options,
        (*data.notes, *notes_on_length(splits, encode, options)),
        data.generated,
        test.kept,
    )


def encoder_of(lm: LanguageModel, options: DataOptions) -> Encoder:
    """Return the encoder of a model's examples."""
    return Encoder(
        lm.tokenizer,
        masked=lm.masked,
        context=lm.context,
        max_length=options.max_length,
        long_rows=options.long_rows,
        classifies=lm.classifies,
        new_tokens=options.max_new_tokens,
        num_embeddings=lm.num_embeddings,
    )
