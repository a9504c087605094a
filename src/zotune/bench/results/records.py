"""The result of one cell of a table: one JSON file, `RESULTS/SCALE/EXPERIMENT/CELL.json`.

What clocks and memory gauges say stands in fields of their own (`MEASURED`); everything else is the same, to the byte,
each time the same code runs the same cell on the same kind of machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from zotune.errors import UsageError

SCALES = ("smoke", "cpu", "paper")
Scale = Literal["smoke", "cpu", "paper"]
# What a cell finds: how well a tuned model answers; the process's peak bytes; seconds a step; bytes by formula beside
# those measured; how near an estimate is to the true gradient.
Kind = Literal["accuracy", "memory", "time", "theory", "quality"]
Status = Literal["done", "failed", "timed_out", "out_of_memory"]
Coordinate = str | int | float
Number = float | None

# The fields that differ from run to run, wherever they stand.
MEASURED = frozenset({"seconds", "peak_memory", "phases", "measured", "time"})


class Record(BaseModel):
    """A frozen part of a result; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Score(Record):
    """A metric over rows with its 95 % interval; all in [0, 1], `loss` the mean of the objective where it is known."""

    metric: str = "accuracy"
    value: float
    low: Number = None
    high: Number = None
    num_examples: int
    loss: Number = None


class Trial(Record):
    """A point of the search: a short run that saw no evaluation row.

    Attributes:
        learning_rate, mu: the point; `mu` is None for a method that has none.
        dev_loss: on the held-out training rows, at the trial's end; None where it was not a number.
        dev_value: the metric there.
        status, message: why a trial has no loss. A trial out of memory or out of time loses against all others.
        measured: as a run's.
    """

    learning_rate: float
    mu: Number = None
    seed: int
    num_steps: int = 0
    num_forwards: int = 0
    dev_loss: Number = None
    dev_value: Number = None
    status: Status = "done"
    message: str = ""
    seconds: float = 0.0
    peak_memory: int = 0
    measured: dict[str, Number] = Field(default_factory=dict)


class Chosen(Record):
    """What the search settled: the point, and what followed from a budget (None where the experiment fixed it)."""

    learning_rate: float
    mu: Number = None
    max_steps: int | None = None
    per_device_train_batch_size: int | None = None


class Evaluation(Record):
    """The held-out rows on the way; step 0 is the untuned model.

    Attributes:
        num_forwards, seconds: of the training up to here.
    """

    step: int
    num_forwards: int
    dev_loss: Number
    dev_value: Number
    seconds: float = 0.0


class RunRecord(Record):
    """One run of a cell, in a process of its own.

    Attributes:
        seed: names directions, batches and a new adapter's weights.
        test: the evaluation rows, read once, with the weights of the step that was best on the held-out rows.
        right: of each evaluation row, in their order, 1 where the answer was right and 0 where not, for paired tests.
        dev, dev_before: the held-out rows after and before.
        best_step: the step whose weights were kept; 0 is the untuned model.
        num_forwards: forward passes of the training; a back-propagation counts the one that it begins with.
        num_tokens: tokens that these read, padding not counted.
        num_tuned: how many numbers were tuned.
        values: other numbers that a cell is about and that are the same each time (predicted bytes, cosines).
        measured: those that a clock or a gauge gave: of a training `seconds_per_step` in its second half and
            `seconds_before`, what it took beside so long steps (activations that are computed once).
        seconds: of the training, evaluations not counted; of a cell of another kind, of the whole run.
        peak_memory: of the process, in bytes: on a GPU what was allocated there, else resident.
        phases: of parts of a run, each with its numbers.
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
    num_tokens: int = 0
    num_tuned: int = 0
    evaluations: tuple[Evaluation, ...] = ()
    values: dict[str, Number] = Field(default_factory=dict)
    measured: dict[str, Number] = Field(default_factory=dict)
    seconds: float = 0.0
    peak_memory: int = 0
    phases: dict[str, dict[str, Number]] = Field(default_factory=dict)


class CellResult(Record):
    """All that is known of a cell.

    Attributes:
        cell: its name within the experiment, and its file's.
        coordinates: its place: axis to value, in the order of the experiment's axes.
        key: hash of the resolved config, of the code that computes results, and of the libraries' versions; a result
            with another key than the cell has today is stale.
        status, message: how it ended; a cell that is not `done` has what was found before it failed.
        config: the resolved options of its runs, but for what the search chose and the seed.
        search, chosen: the points tried on held-out rows, and the one taken.
        runs: one a seed.
        baselines: `zero_shot` and `majority` where the cell is about accuracy.
        commit: of the code, "unknown" where it is not a checkout; time: of the end, UTC.
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
    environment: dict[str, str] = Field(default_factory=dict)
    commit: str = "unknown"
    time: str = ""


def result_path(results: Path, scale: str, experiment: str, cell: str) -> Path:
    """Where a cell's result is kept."""
    return results / scale / experiment / f"{cell}.json"


def read_result(path: Path) -> CellResult | None:
    """The result in a file; None where there is none.

    Raises:
        UsageError: the file holds something else.
    """
    try:
        return CellResult.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValidationError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no result of a benchmark: {str(error)[:300]}. Move it away.") from None


def read_results(results: Path | str, scale: str, experiment: str) -> Iterator[CellResult]:
    """All results that an experiment has at a scale, by name."""
    for path in sorted((Path(results) / scale / experiment).glob("*.json")):
        found = read_result(path)
        if found is not None:
            yield found


def write_result(results: Path, result: CellResult) -> Path:
    """Write a cell's file whole or not at all; where it is."""
    from zotune.llm.training.output_folder import (
        write_json,  # torch comes with it, which readers of results need not wait for
    )

    path = result_path(results, result.scale, result.experiment, result.cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result.model_dump(mode="json"))
    return path


def repeatable(value: Any) -> Any:
    """A result as plain values without what clocks and gauges said: two runs of one cell agree on the rest.

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
    """The mean and its standard error, s/√n; without an error where there is but one value.

    >>> mean, error = mean_and_error([1.0, 2.0, 3.0])
    >>> mean, round(error, 4), mean_and_error([5.0])
    (2.0, 0.5774, (5.0, None))
    """
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, None
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
