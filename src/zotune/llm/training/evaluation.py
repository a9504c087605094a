"""Evaluating a model on one or several tasks, optionally with baselines, demonstrations and single predictions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from zotune.errors import UsageError
from zotune.estimate.mesh import Mesh
from zotune.llm.checkpoints.adapter_folder import revised_base_of_adapter
from zotune.llm.checkpoints.adapter_source import find_adapter, folder_of_run
from zotune.llm.config.run import EvalConfig, read_recipe, training_rows_note
from zotune.llm.data.demonstrations import choose_demonstrations, prepend_demonstrations
from zotune.llm.data.examples import Example, Splits
from zotune.llm.distributed.mesh import mesh_of_shards, together
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.models.load import load
from zotune.llm.output.environment import environment
from zotune.llm.output.json_files import json_safe
from zotune.llm.output.locked_folder import tidy
from zotune.llm.output.new_file import check_new_file
from zotune.llm.quantized.backends import saved_quantization
from zotune.llm.scoring.accuracy import Evaluation, Measure
from zotune.llm.scoring.baselines import Difference, Majority, majority, paired_difference
from zotune.llm.tasks import find_task, head_labels
from zotune.llm.tasks.load_data import EncodedData, encode_rows, load_examples
from zotune.llm.tasks.user_data import Data
from zotune.messages import say
from zotune.system.atomic_write import atomic_write
from zotune.system.peak_memory import peak_memory
from zotune.system.processes import Processes


@dataclass(frozen=True, repr=False)
class TaskEvaluation:
    """The result of one task.

    Attributes:
        evaluation: the metric with its interval.
        data: the evaluation rows with their demonstrations.
        counts: number of demonstrations of each row.
        majority: accuracy of the most frequent label.
        base, zero_shot, difference: for a tuned model the name of its base model, the result of the base model, and the
            difference between the two.
    """

    evaluation: Evaluation
    data: Data
    counts: tuple[int, ...] = ()
    majority: Majority | None = None
    base: str | None = None
    zero_shot: Evaluation | None = None
    difference: Difference | None = None

    @property
    def examples(self) -> tuple[Example, ...]:
        """The evaluation rows with their demonstrations."""
        return self.data.splits.test

    def summary(self, config: EvalConfig) -> dict[str, Any]:
        """Return the result as JSON."""
        extra: dict[str, Any] = {}
        if config.num_demonstrations:
            counts = self.counts
            extra["demonstrations"] = {
                "asked": config.num_demonstrations,
                "fewest": min(counts),
                "mean": sum(counts) / len(counts),
            }
        if config.baselines:
            zero_shot = None
            if self.zero_shot is not None:
                difference = None if self.difference is None else asdict(self.difference)
                zero_shot = {"model": self.base, **self.zero_shot.summary(), "difference": difference}
            majority = None if self.majority is None else asdict(self.majority)
            extra["baselines"] = {"majority": majority, "zero_shot": zero_shot}
        return {**self.evaluation.summary(), **extra}

    def __repr__(self) -> str:
        return "\n".join([f"<{type(self).__name__}: {self.evaluation.line}", *self.lines()[1:]]) + ">"

    def lines(self) -> list[str]:
        """Return the result as lines of text."""
        m = self.evaluation
        lines = [f"{m.line}, {m.seconds:.1f} s"]
        if self.majority is not None:
            lines.append(f"  always label {self.majority.label}: {100 * self.majority.accuracy:.1f} %")
        if self.zero_shot is not None:
            difference = "" if self.difference is None else f"; difference {self.difference}"
            lines.append(f"  zero-shot ({self.base}): {self.zero_shot}{difference}")
        return lines


# The model to evaluate, and what is made of the measure of its rows.
Opened = tuple[LanguageModel, Callable[[Measure], Measure]]


def open_model(config: EvalConfig) -> Opened:
    """The model that the options name, whose own answers are measured."""
    return load(config, head_labels(config.of(config.tasks[0]))), lambda measure: measure


def evaluate(
    config: EvalConfig, opened: Callable[[EvalConfig], Opened] = open_model
) -> tuple[dict[str, TaskEvaluation], dict[str, Any]]:
    """Evaluate a model on tasks or on the user's own rows.

    Args:
        config: the options of the evaluation, as on the command line of `zotune eval`.
        opened: loads what is evaluated.

    Returns:
        The result of each task by name, that of the user's own rows under the name "rows"; and all results as JSON, the
        content of `results.json`.

    Raises:
        UsageError: a task is unknown or has no evaluation row, or the options do not suit the model or the data.

    A model with random weights is right as often as chance:

    >>> from zotune.llm import EvalConfig, evaluate
    >>> results, _ = evaluate(EvalConfig(model="random:opt-tiny", task="sst2", num_eval=8, device="cpu"))
    >>> 0 <= results["sst2"].evaluation.value <= 1
    True
    """
    _check_options(config)
    with together(config.timeout) as processes:
        return _evaluate_together(config, processes, opened)


def _evaluate_together(
    config: EvalConfig, processes: Processes, opened: Callable[[EvalConfig], Opened]
) -> tuple[dict[str, TaskEvaluation], dict[str, Any]]:
    processes.first(lambda: tidy(Path(config.model)))
    lm, judged = opened(config)
    lm.mesh = _mesh_of(processes, lm)
    results = {task or "rows": _evaluate_task(lm, config.of(task), judged) for task in config.tasks}
    peak = peak_memory(lm.device)
    base = None if not config.baselines or lm.classifies else revised_base_model_of(config.model, config.model_revision)
    if base is not None:
        name, revision = base
        overrides = {
            "model": name,
            "model_revision": revision,
            "dtype": str(lm.base.dtype).removeprefix("torch."),
            "quantization": config.quantization or saved_quantization(Path(config.model)),
        }
        del lm, judged
        # In the same precision, or the difference would include that of rounding.
        untuned = load(config.model_copy(update=overrides))
        untuned.mesh = _mesh_of(processes, untuned)
        results = _compare_with_base(results, untuned, config, name)
    if config.predictions is not None and processes.is_first:
        write_predictions(config.predictions, results)
    entries = {name: result.summary(config) for name, result in results.items()}
    has_several = len(config.tasks) > 1
    common = {"peak_memory": peak, "environment": environment(), "config": config.model_dump(mode="json")}
    return results, {**({"tasks": entries} if has_several else next(iter(entries.values()))), **common}


def _mesh_of(processes: Processes, lm: LanguageModel) -> Mesh:
    """The processes that share the rows, or over which the model is cut."""
    return mesh_of_shards(lm.base, processes, lm) or Mesh(processes, data=processes.size, counter=lm)


def base_model_of(model: str) -> str | None:
    """Return the base model of a tuned model, from the configuration of its adapter or run, else None.

    The base of a model that was tuned several times is the first one.

    Raises:
        UsageError: the model names itself as its base, directly or by way of others.
    """
    base = revised_base_model_of(model)
    return None if base is None else base[0]


def revised_base_model_of(model: str, revision: str | None = None) -> tuple[str, str | None] | None:
    """As `base_model_of`, of a model in a revision on the Hub, with the revision of the base model.

    Raises:
        UsageError: the model names itself as its base, directly or by way of others.
    """
    seen = [(model, revision)]
    while (base := _named_base(*seen[-1])) is not None:
        if base in seen:
            names = ", ".join(name for name, _ in [*seen, base])
            raise UsageError(f"{model} names itself as its base model ({names}); correct its files.")
        seen.append(base)
    return seen[-1] if len(seen) > 1 else None


def _named_base(model: str, revision: str | None) -> tuple[str, str | None] | None:
    """Return the base model that an adapter, or the run in a folder, names, and its revision; None for any other."""
    adapter, folder = find_adapter(model, revision), Path(model)
    if adapter is not None:
        return revised_base_of_adapter(adapter)
    if (folder / "config.yaml").is_file() and (folder / "results.json").is_file():
        recipe = read_recipe(folder / "config.yaml")
        named, at = recipe.get("model"), recipe.get("model_revision")
        return (named, at if isinstance(at, str) else None) if isinstance(named, str) else None
    return None


def _check_options(config: EvalConfig) -> None:
    """Refuse options that cannot work, before a model is loaded."""
    for task in config.tasks:
        if task is not None:
            find_task(task)
    if config.prompt == "none" and len(config.tasks) > 1:
        raise UsageError(
            "--prompt none may give the model a classification head for one task; evaluate one task at a time."
        )
    if config.predictions is not None and config.packing:
        raise UsageError(
            "--predictions writes a line for each row, and packing joins rows: leave out --predictions, or give "
            "--no-packing."
        )
    if config.predictions is not None:
        check_new_file("--predictions", config.predictions)


def _evaluate_task(lm: LanguageModel, config: EvalConfig, judged: Callable[[Measure], Measure]) -> TaskEvaluation:
    """Evaluate one task."""
    data = load_examples(lm, config.model_copy(update=_sample_options(config)))
    for note in (*data.notes, *_notes_on_training(config)):
        say(note)
    if not data.splits.test:
        raise UsageError(
            "there is no row to evaluate on: give --eval-file, let --num-dev rows be held out, and --num-eval above 0."
        )
    examples, counts = _add_demonstrations(lm, data.splits, config)
    most_frequent = majority(data.splits.train, data.splits.test) if config.baselines else None
    asked = replace(data, splits=Splits((), (), examples))
    rows = encode_rows(lm, config, asked)
    for note in rows.notes[len(data.notes) :]:
        say(note)
    if not config.packing:  # windows are no examples
        counts = tuple(counts[i] for i in rows.kept) if counts else ()
        asked = replace(asked, splits=Splits((), (), tuple(examples[i] for i in rows.kept)))
    return TaskEvaluation(_measure(lm, config, rows, judged), asked, counts, most_frequent)


def _notes_on_training(config: EvalConfig) -> list[str]:
    if config.task is not None:
        return []
    note = training_rows_note(config, folder_of_run(config.model, config.model_revision))
    return [] if note is None else [note]


def _measure(
    lm: LanguageModel, config: EvalConfig, rows: EncodedData, judged: Callable[[Measure], Measure] = lambda own: own
) -> Evaluation:
    found = judged(rows.measure)(lm, rows.test, config.per_device_eval_batch_size, objective=rows.objective)
    return lm.mesh.processes.first(lambda: found)


def _sample_options(config: EvalConfig) -> dict[str, int]:
    """Return the option for the fixed rows of the sample, of which data_seed chooses only the demonstrations."""
    return {"data_seed": 0} if config.num_demonstrations and config.data_source == "sample" and config.task else {}


def _add_demonstrations(
    lm: LanguageModel, splits: Splits, config: EvalConfig
) -> tuple[tuple[Example, ...], tuple[int, ...]]:
    """Return the evaluation rows with their demonstrations, and the number of demonstrations of each."""
    number = config.num_demonstrations
    if not number:
        return splits.test, ()
    if lm.masked:
        raise UsageError(
            "--num-demonstrations needs a causal language model, which continues the pattern of the examples."
        )
    if any(e.spans or e.rendered for e in splits.test):
        raise UsageError("--num-demonstrations cannot be combined with chats, whose templates start a new text.")
    limit = min(lm.context, config.max_length or lm.context)
    is_generated = splits.test[0].answers or not splits.test[0].candidates
    room = limit - (config.max_new_tokens if is_generated else 0)
    chosen = choose_demonstrations(splits.train, number, config.data_seed, lm.tokenizer.eos_token)
    examples, counts = prepend_demonstrations(
        splits.test, chosen, lambda text: len(lm.tokenizer(text, verbose=False).input_ids), room
    )
    fewer = sum(count < number for count in counts)
    if fewer:
        say(
            f"{fewer} of {len(counts)} rows have no room for {number} demonstrations in {limit} tokens; "
            f"they get the last ones that fit, at least {min(counts)}"
        )
    return examples, counts


def _compare_with_base(
    results: dict[str, TaskEvaluation], base: LanguageModel, config: EvalConfig, name: str
) -> dict[str, TaskEvaluation]:
    """Return the results with those of the base model on the same prompts."""
    compared = {}
    for task, result in zip(config.tasks, results.values(), strict=True):
        zero_shot = _measure(base, config.of(task), encode_rows(base, config.of(task), result.data))
        # A log-loss is no mean over rows, and a reward is not bounded.
        pair = result.evaluation.values, zero_shot.values
        difference = paired_difference(*pair) if all(pair) and zero_shot.is_fraction else None
        compared[task or "rows"] = replace(result, base=name, zero_shot=zero_shot, difference=difference)
    return compared


def write_predictions(path: Path, results: dict[str, TaskEvaluation]) -> None:
    """Write one JSON object per row, in order: the prompt, the prediction and the right answer."""
    try:
        with atomic_write(path, replace=False) as temporary, temporary.open("w", encoding="utf-8") as file:
            for task, result in results.items():
                for record in _records(task, result):
                    file.write(json.dumps(json_safe(record), ensure_ascii=False, allow_nan=False) + "\n")
    except FileExistsError:
        raise UsageError(f"--predictions: the file {str(path)!r} was made meanwhile, and is not replaced.") from None


def _records(task: str, result: TaskEvaluation) -> Sequence[dict[str, Any]]:
    evaluation = result.evaluation
    scores = getattr(evaluation, "scores", ()) or [None] * len(result.examples)
    return [
        {
            "task": task,
            "prompt": e.prompt,
            **({"suffix": e.suffix} if e.suffix else {}),
            **_reference(e, score),
            # A log-loss has no predictions, only the value of each row.
            **({"prediction": prediction} if evaluation.values else {}),
            evaluation.metric: value,
        }
        for e, score, prediction, value in zip(
            result.examples, scores, evaluation.predictions, evaluation.values or evaluation.predictions, strict=True
        )
    ]


def _reference(e: Example, score: Sequence[float] | None) -> dict[str, Any]:
    """Return the right answer, and the candidates if there are any."""
    if e.answers or not e.candidates:
        return {"answers": e.answers}
    if score is None:
        return {"candidates": e.candidates}
    return {"candidates": e.candidates, "scores": score, "label": e.label, "also_right": e.also_right}
