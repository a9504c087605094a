"""What a step takes: measured in a fresh process by phases, and by the paper's formulas beside it."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import Field

from zotune.bench.results.records import RunRecord
from zotune.llm.config.schema import validate
from zotune.plan.workload import Workload

# The memory of the device that the paper's column "A100s" counts.
A100 = 80e9


class MeasuredStep(Workload):
    """A workload, and how it is looked at."""

    num_steps: int = Field(3, ge=0, description="Steps to time, after one that warms up; 0: by formula alone.")
    formula: str | None = Field(None, description="The paper's formula, where it is another than the method's.")


def step_taken(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The step of a workload: its measurement, what the paper's formula says of it, and what we predict."""
    from zotune.bench.measure.memory_formulas import said_of

    asked = validate(MeasuredStep, options, "the benchmark's step")
    workload = asked.model_dump(exclude={"num_steps", "formula"})
    values = said_of(Workload.model_validate(workload), asked.formula or asked.method)
    run = RunRecord(seed=asked.seed, num_steps=asked.num_steps, values=values)
    if asked.num_steps:
        run = run.model_copy(update=_measured(workload, asked.num_steps))
    return {"run": run.model_dump(mode="json")}


def _measured(workload: dict[str, Any], num_steps: int) -> dict[str, Any]:
    """What the clock and the gauge said, as a run's record holds it."""
    from zotune.bench.measure.process_memory import measure

    found = measure(workload, num_steps=num_steps)
    low, high = found.spread
    over = found.over_baseline
    numbers = {"seconds_per_step": found.seconds, "seconds_low": low, "seconds_high": high}
    sizes = {"baseline_bytes": found.baseline, "over_baseline_bytes": over, "devices": -(-over // A100)}
    phases = {
        name: {**asdict(phase), "seconds": statistics.median(phase.seconds)} for name, phase in found.phases.items()
    }
    return {
        "measured": {**numbers, **sizes},
        "phases": phases,
        "seconds": sum(found.step_seconds),
        "peak_memory": found.peak,
    }
