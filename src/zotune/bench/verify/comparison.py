"""Running a stale result's jobs again, and the numbers in which both results must agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from zotune.bench.results.records import CellResult, RunRecord, Score, Trial, repeatable
from zotune.bench.run.jobs import Job, Outcome
from zotune.bench.run.partial_result import PartialResult
from zotune.bench.verify.groups import Stale

# The largest relative difference of a measured number, in cells of measurements.
NEAR_ENOUGH = {"step_bytes": 0.03, "seconds_per_step": 0.15}
# Measured numbers are comparable between machines that agree in these fields.
_MACHINE = ("machine", "processor", "cpu_threads", "gpu")
_PARTS = ("search", "chosen", "runs", "baselines", "baseline_right")


class _PartialRerun:
    """An executor that runs the verified jobs of a cell and takes the outcomes of the others from its result."""

    def __init__(self, one: Stale, execute: Callable[[Job], Outcome]) -> None:
        self._execute, self._one = execute, one
        self._trials = list(one.result.search)
        self.environment: dict[str, str] = {}

    def __call__(self, job: Job) -> Outcome:
        if job.role == "trial" and self._trials:
            return _of_trial(self._trials.pop(0))
        if job.role == "run" and job.options["seed"] != self._one.spec.seeds[0]:
            stored = next((run for run in self._one.result.runs if run.seed == job.options["seed"]), None)
            if stored is not None:
                return Outcome("done", found={"run": stored.model_dump(mode="json"), "environment": {}})
        threads = self._one.result.environment.get("cpu_threads")
        outcome = self._execute(replace(job, environment={"OMP_NUM_THREADS": threads} if threads else {}))
        self.environment = outcome.found.get("environment", self.environment)
        return outcome


def _of_trial(trial: Trial) -> Outcome:
    """The outcome from which a trial was made."""
    dev = None
    if trial.dev_value is not None:
        dev = Score(value=trial.dev_value, num_examples=0, loss=trial.dev_loss)
    costs = {"num_forwards", "forward_equivalents", "layer_passes", "seconds", "peak_memory", "measured"}
    shared = trial.model_dump(include={"seed", "num_steps", *costs})
    run = RunRecord(dev=dev, **shared)
    return Outcome(trial.status, trial.message, {"run": run.model_dump(mode="json"), "environment": {}})


def recompute(one: Stale, execute: Callable[[Job], Outcome]) -> CellResult:
    """Run the verified jobs of a stale result again; return the result with their outcomes and machine.

    Raises:
        CellStopped: a job failed.
        KeyboardInterrupt: the runner is stopping.
    """
    from zotune.bench.run.cells import KINDS

    rerun, partial = _PartialRerun(one, execute), PartialResult()
    KINDS[one.spec.kind](one.spec, rerun, partial)
    parts = {part: getattr(partial, part) for part in _PARTS}
    return CellResult.model_validate(one.result.model_dump() | parts | {"environment": rerun.environment})


def differences_of(old: CellResult, new: CellResult) -> tuple[str, ...]:
    """The numbers that differ in a recomputed result, each with both values."""
    before, after = ({part: _plain(result)[part] for part in _PARTS} for result in (old, new))
    differences = list(different(before, after))
    was, now = (result.environment.get("processor") for result in (old, new))
    if differences and was != now and old.kind in ("accuracy", "quality"):
        differences.append(f"(the processor may be the reason: {was!r} before, {now!r} now)")
    return (*differences, *_measured_differences(old, new))


def _plain(result: CellResult) -> dict[str, Any]:
    plain: dict[str, Any] = repeatable(result)
    return plain


def different(old: Any, new: Any, place: str = "") -> Iterator[str]:
    """Yield each place where two plain values differ, with both values.

    >>> list(different({"a": [1, 2.0], "b": "x"}, {"a": [1, 2.5], "b": "x"}))
    ['a[1]: 2.0 before, 2.5 now']
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from different(old.get(name), new.get(name), f"{place}.{name}".lstrip("."))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from different(a, b, f"{place}[{i}]")
    elif old != new:
        yield f"{place}: {old!r} before, {new!r} now"


def _measured_differences(old: CellResult, new: CellResult) -> Iterator[str]:
    """Yield the measured numbers that differ too much, for cells of measurements only."""
    if old.kind not in ("memory", "time", "theory") or not any(run.measured for run in (*old.runs, *new.runs)):
        return
    for name in _MACHINE:
        was, now = (result.environment.get(name) for result in (old, new))
        if was != now:
            yield f"environment.{name}: {was!r} before, {now!r} now; measured numbers are not comparable"
    for i, (run, again) in enumerate(zip(old.runs, new.runs, strict=False)):
        for name, near in NEAR_ENOUGH.items():
            a, b = run.measured.get(name), again.measured.get(name)
            if a is None or b is None or abs(b - a) > near * abs(a):
                yield f"runs[{i}].measured.{name}: {a!r} before, {b!r} now; it may differ by {near:.0%}"
