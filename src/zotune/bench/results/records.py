"""The stored result of one cell: a JSON file, `RESULTS/SCALE/EXPERIMENT/CELL.json`.

Measured times and memory stand in fields of their own (`MEASURED`). All other fields are identical, to the byte, each
time the same code runs the same cell on the same kind of machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from zotune.bench.spec.vocabulary import Alike, Coordinate, Kind, Record, Scale, Status
from zotune.errors import UsageError

Number = float | None

# The fields that differ from run to run, in whichever record they stand.
MEASURED = frozenset({"seconds", "peak_memory", "phases", "measured", "time"})


class Score(Record):
    """A metric over rows with its 95 % interval, each in [0, 1]; `loss` is the mean objective where it is known."""

    metric: str = "accuracy"
    value: float
    low: Number = None
    high: Number = None
    num_examples: int
    loss: Number = None


class Trial(Record):
    """A point of the search: a short run that saw no evaluation row.

    Attributes:
        learning_rate, mu, hybrid_learning_rate: the point; None for what a method lacks, or what is not searched.
        forward_equivalents, layer_passes: as in `RunRecord`.
        dev_loss: loss on the held-out training rows at the end of the trial; None if it was not finite.
        dev_value: the metric on the held-out rows.
        status, message: why a trial has no loss. A trial without a loss ranks behind all others.
        measured: as in `RunRecord`.
    """

    learning_rate: float
    mu: Number = None
    hybrid_learning_rate: Number = None
    seed: int
    num_steps: int = 0
    num_forwards: int = 0
    forward_equivalents: Number = None
    layer_passes: Number = None
    dev_loss: Number = None
    dev_value: Number = None
    status: Status = "done"
    message: str = ""
    seconds: float = 0.0
    peak_memory: int = 0
    measured: dict[str, Number] = Field(default_factory=dict)


class Chosen(Record):
    """The chosen point of the search; steps and batch size where a budget determined them, else None."""

    learning_rate: float
    mu: Number = None
    hybrid_learning_rate: Number = None
    max_steps: int | None = None
    per_device_train_batch_size: int | None = None


class Evaluation(Record):
    """An evaluation on the held-out rows during training; step 0 is the untuned model.

    Attributes:
        num_forwards, forward_equivalents, layer_passes, seconds: those of the training up to this step, as in
            `RunRecord`.
    """

    step: int
    num_forwards: int
    forward_equivalents: Number = None
    layer_passes: Number = None
    dev_loss: Number
    dev_value: Number
    seconds: float = 0.0


class RunRecord(Record):
    """One run of a cell, in a process of its own.

    Attributes:
        seed: seed of the directions, the order of batches and the initial adapter weights.
        test: the score on the evaluation rows, which are read once, with the weights of the best step.
        right: one character for each evaluation row, in order: 1 for a right answer, else 0; for paired tests.
        dev, dev_before: the score on the held-out rows after and before training.
        best_step: the step with the best score on the held-out rows, whose weights are kept; 0 is the untuned model.
        num_forwards: forward passes of the training; a back-propagation counts its own forward pass.
        num_tokens: tokens that these passes read, without padding.
        num_tuned: number of tuned parameters.
        num_forwards: calls of the model in training, without evaluations.
        forward_equivalents: arithmetic of the training in forward passes: a pass counts as 1, with tangents as 2, with
            back-propagation as 3, and with checkpointed back-propagation as 4. None in results of older code.
        layer_passes: layers of the model that these passes computed, where lower layers are reused.
        values: other repeatable numbers, such as predicted bytes and cosines.
        measured: other measured numbers. A training run has `seconds_per_step`, from its second half, and
            `seconds_before`, the rest of its time (for instance activations that are computed once). `step_bytes` and
            `loading_bytes` are the peaks of the step and of loading, above the process without a model.
        seconds: training time without evaluations; for other kinds of cells the time of the whole run.
        peak_memory: peak of the process in bytes: allocated memory on a GPU, else resident memory.
        phases: numbers for each phase of a step.
    """

    seed: int
    test: Score | None = None
    right: str = ""
    dev: Score | None = None
    dev_before: Score | None = None
    best_step: int | None = None
    num_steps: int = 0
    num_skipped: int = 0
    num_forwards: int = 0
    forward_equivalents: Number = None
    layer_passes: Number = None
    num_tokens: int = 0
    num_tuned: int = 0
    evaluations: tuple[Evaluation, ...] = ()
    values: dict[str, Number] = Field(default_factory=dict)
    measured: dict[str, Number] = Field(default_factory=dict)
    seconds: float = 0.0
    peak_memory: int = 0
    phases: dict[str, dict[str, Number]] = Field(default_factory=dict)


class Verified(Record):
    """The acceptance of a result of older code, after a job of the same kind gave the same numbers with newer code.

    Attributes:
        key_before: the key that the result had before.
        by: the cell whose job was run again, `EXPERIMENT/CELL`.
        alike: what both cells have in common: all options except amounts, or the method and tuning.
        commit, environment, time: commit, machine and time of that job.
    """

    key_before: str
    by: str
    alike: Alike = "options"
    commit: str = "unknown"
    environment: dict[str, str] = Field(default_factory=dict)
    time: str = ""


class CellResult(Record):
    """The complete result of a cell.

    Attributes:
        cell: name of the cell within the experiment, and of its file.
        coordinates: from each axis to the cell's value, in the order of the experiment's axes.
        key: hash of the resolved config, of the code that computes results and of the libraries' versions. A result is
            stale if the cell has another key today.
        status, message: how the cell ended; a cell that is not `done` holds the results from before it failed.
        config: the resolved options of its runs, without the seed and the searched options.
        search, chosen: the trials on held-out rows, and the chosen point.
        runs: one run for each seed.
        baselines: `zero_shot` and `majority`, for cells of kind accuracy.
        baseline_right: their right answers row by row, as in `RunRecord.right`, where these are known.
        commit: commit of the code, "unknown" outside a checkout.
        time: end of the cell, UTC.
        verified: how the result came to have another key than it was recorded with; the latest entry is last.
    """

    experiment: str
    scale: Scale
    cell: str
    coordinates: dict[str, Coordinate]
    kind: Kind
    key: str
    status: Status
    message: str = ""
    config: dict[str, Any]
    search: tuple[Trial, ...] = ()
    chosen: Chosen | None = None
    runs: tuple[RunRecord, ...] = ()
    baselines: dict[str, Score] = Field(default_factory=dict)
    baseline_right: dict[str, str] = Field(default_factory=dict)
    environment: dict[str, str] = Field(default_factory=dict)
    commit: str = "unknown"
    time: str = ""
    verified: tuple[Verified, ...] = ()


def result_path(results: Path, scale: str, experiment: str, cell: str) -> Path:
    """The file of a cell's result."""
    return results / scale / experiment / f"{cell}.json"


def read_result(path: Path) -> CellResult | None:
    """Read the result in a file; None if there is no file.

    Raises:
        UsageError: the file holds something else.
    """
    try:
        return CellResult.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValidationError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not a result of the benchmark: {str(error)[:300]}. Move the file away.") from None


def read_results(results: Path | str, scale: str, experiment: str) -> Iterator[CellResult]:
    """Yield all results of an experiment at a scale, sorted by name."""
    for path in sorted((Path(results) / scale / experiment).glob("*.json")):
        result = read_result(path)
        if result is not None:
            yield result


def write_result(results: Path, result: CellResult) -> Path:
    """Write a cell's result atomically and return its path."""
    # Imported here because it imports torch, which readers of results do not need.
    from zotune.llm.output.json_files import write_json

    path = result_path(results, result.scale, result.experiment, result.cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result.model_dump(mode="json"))
    return path


def repeatable(value: Any) -> Any:
    """A result as plain values without measured times and memory; two runs of one cell agree on all of it.

    >>> repeatable({"seed": 0, "seconds": 1.5, "evaluations": [{"step": 0, "seconds": 0.0}]})
    {'seed': 0, 'evaluations': [{'step': 0}]}
    """
    if isinstance(value, BaseModel):
        return repeatable(value.model_dump(mode="json"))
    if isinstance(value, Mapping):
        return {k: repeatable(v) for k, v in value.items() if k not in MEASURED}
    if isinstance(value, list | tuple):
        return [repeatable(v) for v in value]
    return value


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error, s/√n; the error of a single value is None.

    >>> mean, error = mean_and_error([1.0, 2.0, 3.0])
    >>> mean, round(error, 4), mean_and_error([5.0])
    (2.0, 0.5774, (5.0, None))
    """
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, None
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
