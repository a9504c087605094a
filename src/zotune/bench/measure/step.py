"""Memory and time of one step: measured in a fresh process phase by phase, and by the paper's formulas."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zotune.bench.results.records import RunRecord
from zotune.bench.spec.measured_step import MeasuredStep
from zotune.llm.config.schema import validate
from zotune.plan.workload import Workload

if TYPE_CHECKING:
    from zotune.plan.process_memory import Measurement

# Bytes of memory of the GPU that the paper's column "A100s" counts. The paper's GB are GiB, as in all of its tables.
A100 = 80 * 2**30


def devices(num_bytes: float) -> int:
    """How many GPUs of the paper hold so many bytes.

    >>> [devices(gib * 2**30) for gib in (64, 158, 245)]  # the paper's Table 4: 1, 2 and 4
    [1, 2, 4]
    """
    return -int(-num_bytes // A100)


def step_taken(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Measure the step of a workload, unless `num_steps` is 0, and compute its memory by formula and by prediction."""
    from zotune.bench.measure.memory_formulas import memory_by_formula

    step = validate(MeasuredStep, options, "the benchmark's step")
    workload = step.model_dump(exclude={"num_steps", "formula"})
    values = memory_by_formula(Workload.model_validate(workload), step.formula or step.method)
    run = RunRecord(seed=step.seed, num_steps=step.num_steps, values=values)
    if step.num_steps:
        run = run.model_copy(update=_measured(workload, step.num_steps))
    return {"run": run.model_dump(mode="json")}


def _measured(workload: dict[str, Any], num_steps: int) -> dict[str, Any]:
    """The measured fields of the run's record."""
    from zotune.plan.process_memory import measure

    measurement = measure(workload, num_steps=num_steps)
    phases = {
        name: {**asdict(phase), "seconds": statistics.median(phase.seconds)}
        for name, phase in measurement.phases.items()
    }
    return {
        "measured": numbers_of(measurement),
        "phases": phases,
        "seconds": sum(measurement.step_seconds),
        "peak_memory": measurement.peak,
    }


def numbers_of(measurement: Measurement) -> dict[str, float]:
    """The numbers of a measurement that tables show: the step's memory, that of loading, and the time of a step.

    Loading the model may take more memory than a step, so its peak is a number of its own and no part of the step's.
    """
    low, high = measurement.spread
    return {
        "seconds_per_step": measurement.seconds,
        "seconds_low": low,
        "seconds_high": high,
        "baseline_bytes": measurement.baseline,
        "loading_bytes": measurement.loading,
        "step_bytes": measurement.running,
        "devices": devices(measurement.running),
    }
