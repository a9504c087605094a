"""`zotune eval`: a model on one or several tasks, with baselines, demonstrations and single predictions if asked."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from zotune.errors import UsageError
from zotune.llm.config.run import EvalConfig
from zotune.llm.data.demonstrations import choose, prepend
from zotune.llm.data.examples import Example, Splits
from zotune.llm.models.load import LanguageModel, load
from zotune.llm.quantized.backends import saved_quantization
from zotune.llm.scoring.accuracy import Measured
from zotune.llm.scoring.baselines import Difference, Majority, majority, paired_difference
from zotune.llm.tasks import find_task, head_labels
from zotune.llm.tasks.load_data import encode_rows, load_examples
from zotune.llm.tasks.user_data import Data
from zotune.llm.training.metrics_log import plain
from zotune.llm.training.output_folder import environment
from zotune.messages import say
from zotune.system.peak_memory import peak_memory


@dataclass(frozen=True)
class Found:
    """What was found of one task.

    Attributes:
        measured: the metric.
        data: the evaluation rows as they were asked, demonstrations included.
        counts: demonstrations before each.
        majority: how often the most frequent label is right.
        base, zero_shot, difference: of a tuned model the name of its base, how that does, and how much better this is.
    """

    measured: Measured
    data: Data
    counts: tuple[int, ...] = ()
    majority: Majority | None = None
    base: str | None = None
    zero_shot: Measured | None = None
    difference: Difference | None = None

    @property
    def examples(self) -> tuple[Example, ...]:
        """The rows."""
        return self.data.splits.test

    def summary(self, config: EvalConfig) -> dict[str, Any]:
        """As JSON holds it."""
        more: dict[str, Any] = {}
        if config.num_demonstrations:
            counts = self.counts
            more["demonstrations"] = {
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
            more["baselines"] = {"majority": majority, "zero_shot": zero_shot}
        return {**self.measured.summary(), **more}

    def lines(self) -> list[str]:
        """As people read it."""
        m = self.measured
        lines = [f"{m.metric} {m}, loss {m.loss:.4f}, {m.seconds:.1f} s"]
        if self.majority is not None:
            lines.append(f"  always label {self.majority.label}: {100 * self.majority.accuracy:.1f} %")
        if self.zero_shot is not None:
            difference = "" if self.difference is None else f"; difference {self.difference}"
            lines.append(f"  zero-shot ({self.base}): {self.zero_shot}{difference}")
        return lines


def evaluate_tasks(config: EvalConfig) -> tuple[dict[str, Found], dict[str, Any]]:
    """What was found of each task by name (of rows of one's own under "rows"), and the whole as JSON holds it.

    Raises:
        UsageError: a task is unknown, has no row to report on, or cannot be asked as the options say.
    """
    _check(config)
    lm = load(config, head_labels(config.of(config.tasks[0])))
    found = {task or "rows": _one(lm, config.of(task)) for task in config.tasks}
    peak = peak_memory(lm.device)
    base = None if not config.baselines or lm.classifies else base_of(config.model)
    if base is not None:
        same = {
            "model": base,
            "dtype": str(lm.base.dtype).removeprefix("torch."),
            "quantization": config.quantization or saved_quantization(Path(config.model)),
        }
        del lm
        # In the same precision, or the difference would be that of the rounding too.
        found = _against(found, load(config.model_copy(update=same)), config, base)
    if config.predictions is not None:
        write_predictions(config.predictions, found)
    entries = {name: one.summary(config) for name, one in found.items()}
    several = len(config.tasks) > 1
    known = {"peak_memory": peak, "environment": environment(), "config": config.model_dump(mode="json")}
    return found, {**({"tasks": entries} if several else next(iter(entries.values()))), **known}


def base_of(model: str) -> str | None:
    """The model that a folder's was tuned from, by its adapter's configuration or that of the run; else None."""
    folder, before = Path(model), None
    if (folder / "adapter_config.json").is_file():
        before = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    elif (folder / "config.yaml").is_file() and (folder / "results.json").is_file():
        before = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["model"]
    # What was tuned from something tuned has the first one's base.
    return None if before is None else base_of(before) or before


def _check(config: EvalConfig) -> None:
    """What can be known to fail before a model is loaded."""
    for task in config.tasks:
        if task is not None:
            find_task(task)
    if config.prompt == "none" and len(config.tasks) > 1:
        raise UsageError("--prompt none may put a head of one task on the model; evaluate one task at a time.")
    if config.predictions is not None and not config.predictions.parent.is_dir():
        raise UsageError(f"--predictions: there is no folder {str(config.predictions.parent)!r}; make it first.")
    if config.predictions is not None and config.predictions.exists():
        raise UsageError(f"--predictions: {str(config.predictions)!r} is there already; remove it or name another.")


def _one(lm: LanguageModel, config: EvalConfig) -> Found:
    """One task."""
    data = load_examples(lm, config.model_copy(update=_rows_of_sample(config)))
    for note in data.notes:
        say(note)
    if not data.splits.test:
        raise UsageError(
            "there is no row to evaluate on: give --eval-file, let --num-dev rows be held out, and --num-eval above 0."
        )
    examples, counts = _demonstrated(lm, data.splits, config)
    known = majority(data.splits.train, data.splits.test) if config.baselines else None
    asked = replace(data, splits=Splits((), (), examples))
    return Found(_measured(lm, config, asked), asked, counts, known)


def _measured(lm: LanguageModel, config: EvalConfig, data: Data) -> Measured:
    rows = encode_rows(lm, config, data)
    return rows.measure(lm, rows.test, config.per_device_eval_batch_size, objective=rows.objective)


def _rows_of_sample(config: EvalConfig) -> dict[str, int]:
    """The sample's rows are fixed; with demonstrations data_seed still says which of them these are."""
    return {"data_seed": 0} if config.num_demonstrations and config.data_source == "sample" and config.task else {}


def _demonstrated(lm: LanguageModel, splits: Splits, config: EvalConfig) -> tuple[tuple[Example, ...], tuple[int, ...]]:
    """The evaluation rows behind their demonstrations, and how many each has."""
    number = config.num_demonstrations
    if not number:
        return splits.test, ()
    if lm.masked:
        raise UsageError("--num-demonstrations needs a causal language model, which goes on as the examples do.")
    if any(e.spans for e in splits.test):
        raise UsageError("--num-demonstrations has no form for chats, whose templates begin a text of their own.")
    limit = min(lm.context, config.max_length or lm.context)
    is_generated = splits.test[0].answers or not splits.test[0].candidates
    room = limit - (config.max_new_tokens if is_generated else 0)
    chosen = choose(splits.train, number, config.data_seed)
    examples, counts = prepend(splits.test, chosen, lambda text: len(lm.tokenizer(text, verbose=False).input_ids), room)
    fewer = sum(count < number for count in counts)
    if fewer:
        say(
            f"{fewer} of {len(counts)} rows have no room for {number} demonstrations in {limit} tokens; "
            f"the longest have {min(counts)}, the last ones"
        )
    return examples, counts


def _against(found: dict[str, Found], base: LanguageModel, config: EvalConfig, name: str) -> dict[str, Found]:
    """The same with what the base model does on the same prompts."""
    compared = {}
    for task, one in zip(config.tasks, found.values(), strict=True):
        zero_shot = _measured(base, config.of(task), one.data)
        # A log-loss is no mean over rows, and a reward may be any number.
        both = one.measured.values, zero_shot.values
        difference = paired_difference(*both) if all(both) and zero_shot.is_fraction else None
        compared[task or "rows"] = replace(one, base=name, zero_shot=zero_shot, difference=difference)
    return compared


def write_predictions(path: Path, found: dict[str, Found]) -> None:
    """One JSON object a row, in the rows' order: what was asked, what came, and what is right."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("w", encoding="utf-8") as file:
        for task, one in found.items():
            for record in _records(task, one):
                file.write(json.dumps(plain(record), ensure_ascii=False, allow_nan=False) + "\n")
    aside.replace(path)


def _records(task: str, found: Found) -> Sequence[dict[str, Any]]:
    measured = found.measured
    scores = getattr(measured, "scores", ()) or [None] * len(found.examples)
    return [
        {
            "task": task,
            "prompt": e.prompt,
            **({"suffix": e.suffix} if e.suffix else {}),
            **_asked(e, score),
            # A log-loss predicts nothing: what there is of each row is its part in the metric.
            **({"prediction": prediction} if measured.values else {}),
            measured.metric: value,
        }
        for e, score, prediction, value in zip(
            found.examples, scores, measured.predictions, measured.values or measured.predictions, strict=True
        )
    ]


def _asked(e: Example, score: Sequence[float] | None) -> dict[str, Any]:
    """What was right, and what there was to choose among."""
    if e.answers or not e.candidates:
        return {"answers": e.answers}
    if score is None:
        return {"candidates": e.candidates}
    return {"candidates": e.candidates, "scores": score, "label": e.label, "also_right": e.also_right}
