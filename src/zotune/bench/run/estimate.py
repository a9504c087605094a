"""How long the cells of a selection will take: their jobs, counted once, times the seconds of a step.

The seconds of a step are those of a stored result of the same options from a processor of the same name. Without one
they follow from arithmetic: two operations for each weight that a pass multiplies by, at the speed that a core of a
processor or an A100 reaches in practice. Such an estimate is right within a factor of two, which tells hours from
months.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from zotune.bench.results.records import read_result, result_path
from zotune.bench.run.accuracy_cells import BASELINE, STEPS_OF_A_PROBE, max_steps_of, num_points, steps_of_trial
from zotune.bench.spec.schema import CellSpec

COUNTS_FOR_RESULTS = "never"
_SECONDS_TO_START = 7.0
"""Seconds in which a job's process imports its libraries, loads a small model and reads its rows."""
_SECONDS_OF_A_FORK = 3.0
"""The same without the imports, of a process that is forked."""
_OPERATIONS_PER_SECOND = {"cpu": 6e10, "cpu half": 6e9, "cuda": 1.5e13, "cuda half": 1e14}
_SECONDS_OF_A_STEP = 0.005
_TOKENS_OF_A_WORD = 1.35
_TOKENS_OF_UNKNOWN_ROWS = 80.0
_HALF = ("bfloat16", "float16")


@dataclass(frozen=True)
class Estimate:
    """The estimate for some cells.

    Attributes:
        seconds: by path of a cell; a job that several cells share counts for the first of them.
        num_jobs: jobs of all cells.
        num_measured: cells whose step was measured.
    """

    seconds: Mapping[str, float]
    num_jobs: int
    num_measured: int

    @property
    def total(self) -> float:
        """Seconds of all cells, one job at a time."""
        return sum(self.seconds.values())

    def text(self, jobs: int) -> str:
        """A sentence for the terminal, for so many jobs at a time.

        >>> Estimate({"a/b": 7200.0}, 3, 0).text(jobs=2)
        '3 jobs, about 1.0 hours with 2 at a time (0 of 1 cells by a measured step, the others by arithmetic)'
        """
        hours = self.total / 3600 / jobs
        return (
            f"{self.num_jobs} jobs, about {hours:,.1f} hours with {jobs} at a time "
            f"({self.num_measured} of {len(self.seconds)} cells by a measured step, the others by arithmetic)"
        )


@dataclass
class _Counted:
    """The jobs counted so far, by what tells them apart."""

    jobs: set[str] = field(default_factory=set)

    def new(self, *parts: Any) -> bool:
        key = json.dumps(parts, sort_keys=True, default=str)
        is_new = key not in self.jobs
        self.jobs.add(key)
        return is_new


def estimate(specs: Sequence[CellSpec], results: Path | None = None) -> Estimate:
    """Estimate the time of some cells.

    Args:
        specs: the cells.
        results: folder of results, whose measured steps are used.
    """
    counted, seconds, measured = _Counted(), dict[str, float](), 0
    for spec in specs:
        known = None if results is None else _measured_step(results, spec)
        measured += known is not None
        count = _accuracy if spec.kind == "accuracy" else _other
        seconds[spec.path] = seconds.get(spec.path, 0.0) + count(spec, known, counted)
    return Estimate(seconds, len(counted.jobs), measured)


def _accuracy(spec: CellSpec, known: float | None, counted: _Counted) -> float:
    """Seconds of the new jobs of a cell of accuracy."""
    options = spec.options
    work = _work_of(options)
    a_step = work.seconds_per_step if known is None else known
    total = 0.0
    if counted.new("baseline", {name: options.get(name) for name in BASELINE}):
        total += _SECONDS_OF_A_FORK + work.seconds_of_rows(work.num_eval, whole=True)
    if work.reused and counted.new("lower layers", options.get("model"), options.get("task"), options.get("prompt")):
        total += work.seconds_of_rows(work.num_train + work.num_dev + work.num_eval, whole=True)
    budget = spec.budget
    steps = float(max_steps_of(options))
    if budget.forward_equivalents is not None:
        steps = max(1.0, budget.forward_equivalents / work.equivalents)
        total += _SECONDS_OF_A_FORK + STEPS_OF_A_PROBE * a_step if counted.new("probe", options) else 0.0
    elif budget.seconds is not None:
        steps = budget.seconds / a_step
    total += sum(
        _SECONDS_OF_A_FORK + STEPS_OF_A_PROBE * a_step
        for size in budget.batch_sizes
        if counted.new("probe", options, size)
    )
    plan, points = spec.search.model_dump(), num_points(spec)
    held_out = work.seconds_of_rows(work.num_dev)
    for point in range(points if points > 1 else 0):
        if counted.new("trial", options, plan, steps, point):
            total += _SECONDS_OF_A_FORK + steps_of_trial(spec, round(steps)) * a_step + 2 * held_out
    every = min(steps, options.get("eval_steps", max(1.0, steps // 10)))
    of_run = _SECONDS_OF_A_FORK + steps * a_step + (steps // every + 1) * held_out + work.seconds_of_rows(work.num_eval)
    num_runs = sum(counted.new("run", options, plan, steps, seed) for seed in spec.seeds)
    return float(total + num_runs * of_run)


def _other(spec: CellSpec, known: float | None, counted: _Counted) -> float:
    """Seconds of the new jobs of a cell that measures a step or compares estimates."""
    options = spec.options
    if spec.kind == "quality":
        each = _SECONDS_OF_A_FORK + 0.01 * options.get("num_queries", 1) * max_steps_of(options)
    elif not (steps := options.get("num_steps", 3)):
        each = _SECONDS_TO_START
    else:
        work = _work_of({"num_train": 0, "num_dev": 0, "num_eval": 0, **options})
        each = _SECONDS_TO_START + work.loading + (1 + steps) * (work.seconds_per_step if known is None else known)
    return float(each * sum(counted.new(spec.kind, options, seed) for seed in spec.seeds))


def _measured_step(results: Path, spec: CellSpec) -> float | None:
    """The seconds of a step in a cell's stored result, if its options and this processor are the same."""
    from zotune.bench.run.worker import processor

    result = read_result(result_path(results, spec.scale, spec.experiment, spec.name))
    if result is None or result.config.get("options") != spec.model_dump(mode="json")["options"]:
        return None
    seconds = [s for run in result.runs if (s := run.measured.get("seconds_per_step"))]
    return statistics.median(seconds) if seconds and result.environment.get("processor") == processor() else None


# Arithmetic ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    """What a run with some options computes.

    Attributes:
        layers, reused: layers of the model, and those below all tuned parameters.
        weights: weights of all layers.
        tokens: tokens of a row, over all of its candidates' sequences.
        equivalents: forward-equivalents of a step, over its batches.
        layer_passes: passes of single layers of a step, over its batches.
        batch: rows of a pass.
    """

    layers: int
    reused: int
    weights: float
    tokens: float
    equivalents: float
    layer_passes: float
    batch: int
    speed: float
    loading: float
    num_train: int
    num_dev: int
    num_eval: int

    @property
    def seconds_per_step(self) -> float:
        """Seconds of a step by arithmetic."""
        of_layer = 2 * self.weights / self.layers * self.tokens * self.batch
        return _SECONDS_OF_A_STEP + self.layer_passes * of_layer / self.speed

    def seconds_of_rows(self, count: int, *, whole: bool = False) -> float:
        """Seconds to score so many rows, by the layers that are not reused or by all of them."""
        share = 1.0 if whole else 1 - self.reused / self.layers
        return count * 2 * self.weights * share * self.tokens / self.speed


def _work_of(options: Mapping[str, Any]) -> _Work:
    """The work of a run, from the architecture of its model and the texts of its task."""
    from zotune.optim.pass_cost import pass_cost
    from zotune.plan.memory import forwards_a_step
    from zotune.plan.workload import Workload

    workload = Workload.model_validate({k: v for k, v in options.items() if k in Workload.model_fields})
    model = _model(workload.model_copy(update={"method": "zo_sgd", "seed": 0}).model_dump_json(include=set(_OF_MODEL)))
    optimizer = model.optimizer(workload)
    reused = 0 if workload.tuned_layers is None else model.layers - workload.tuned_layers
    cost = pass_cost(
        optimizer,
        batches=workload.gradient_accumulation_steps,
        checkpointing=workload.gradient_checkpointing,
        layers=model.layers,
        reused=reused,
        cut=workload.hybrid_layers or 0,
    )
    passes = forwards_a_step(optimizer, workload)  # type: ignore[arg-type]
    device = "cuda" if workload.device.startswith("cuda") else "cpu"
    is_half = workload.dtype in _HALF
    task = options.get("task")
    rows = {name: _rows(options, name) for name in ("num_train", "num_dev", "num_eval")}
    return _Work(
        layers=model.layers,
        reused=reused,
        weights=model.weights,
        tokens=float(options.get("length", 0)) or tokens_of_row(str(task), str(options.get("prompt", "aligned"))),
        equivalents=cost.equivalents(passes, 1),
        layer_passes=cost.layer_passes(passes, 1),
        batch=workload.per_device_train_batch_size,
        speed=_OPERATIONS_PER_SECOND[device + " half" * is_half],
        loading=4 * model.weights / 1e9,
        **rows,
    )


# The options that the weights and their tuned part depend on.
_OF_MODEL = frozenset(
    {
        *("model", "dtype", "device", "tuning", "tuned_layers", "tuned_parameters", "lora_r", "lora_alpha"),
        *("lora_target_modules", "num_virtual_tokens"),
    }
)


class _Model:
    """A model without numbers, prepared for one tuning scheme."""

    def __init__(self, options: Any) -> None:
        from zotune.model.layers import stack_of
        from zotune.plan.predict import Architecture

        self._lm = Architecture(options).lm
        layers = stack_of(self._lm.base)[1]
        self.layers = max(1, len(layers))
        self.weights = float(sum(p.numel() for layer in layers for p in layer.parameters()))

    def optimizer(self, workload: Any) -> Any:
        """The optimizer of a workload, which tells its passes."""
        import torch

        from zotune.llm.models.tuned_sets.find import planned_aim
        from zotune.llm.training.optimizers import make_optimizer
        from zotune.plan.live_memory import FakeScalars

        tuned = [p for p in self._lm.module.parameters() if p.requires_grad]
        ids = torch.zeros(1, 1, dtype=torch.long, device="meta")
        with FakeScalars():
            aim = planned_aim(self._lm, workload)
            optimizer = make_optimizer(self._lm.module, workload, 0, lambda: self._lm.read(ids, ids), aim=aim)
        for p in tuned:  # a hybrid may have frozen some of them
            p.requires_grad_(True)
        return optimizer


@cache
def _model(options: str) -> _Model:
    from zotune.plan.workload import Workload

    return _Model(Workload.model_validate_json(options))


@cache
def tokens_of_row(task: str, prompt: str = "aligned") -> float:
    """About how many tokens a row of a task has, over the sequences of its candidates, by the words of its texts.

    >>> 10 < tokens_of_row("sst2") < tokens_of_row("copa") < 200
    True
    """
    from zotune.errors import UsageError
    from zotune.llm.config.data import DataOptions
    from zotune.llm.tasks import find_task

    try:
        splits = find_task(task).splits(DataOptions(task=task, prompt=prompt), masked=False)
    except UsageError:  # an installed package has few tasks' rows
        return _TOKENS_OF_UNKNOWN_ROWS
    examples = splits.train[:200]
    words = [len(e.prompt.split()) * _sequences(e) + _words_of_candidates(e) for e in examples]
    return statistics.mean(words) * _TOKENS_OF_A_WORD


def _words_of_candidates(example: Any) -> int:
    """Words of the candidates that a pass reads; of a candidate of one word it reads none."""
    return 0 if _sequences(example) == 1 else sum(len(c.split()) for c in example.candidates)


def _sequences(example: Any) -> int:
    """How many sequences a row's candidates need: one if each candidate is a single word."""
    return 1 if all(len(c.split()) == 1 for c in example.candidates) else len(example.candidates)


def _rows(options: Mapping[str, Any], name: str) -> int:
    """The number of rows of a split."""
    from zotune.llm.tasks import TASKS

    if name not in options and options.get("task") not in TASKS:
        return 0
    count = options[name] if name in options else getattr(TASKS[options["task"]], name)
    return int(count) + (int(options.get("num_more_eval", 0)) if name == "num_eval" else 0)


def hours(seconds: float) -> str:
    """A duration for a table.

    >>> hours(90), hours(7200)
    ('1.5 min', '2.0 h')
    """
    return f"{seconds / 60:.1f} min" if seconds < 3600 or math.isnan(seconds) else f"{seconds / 3600:,.1f} h"
