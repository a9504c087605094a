"""Accuracy cells: baselines, a search on held-out rows, then one full run for each seed.

The runs evaluate on held-out rows during training and keep the weights of the best step; they read the evaluation rows
once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from zotune.bench.measure.search import Point, axes_of, search
from zotune.bench.results.records import Chosen, RunRecord, Score, Trial
from zotune.bench.run.jobs import Job, Outcome
from zotune.bench.run.partial_result import CellStopped, PartialResult
from zotune.bench.spec.schema import CellSpec
from zotune.llm.config.method import FIRST_ORDER
from zotune.llm.config.run import TrainConfig
from zotune.llm.config.schema import validate

# The options that the evaluation of the untuned model shares with the runs.
BASELINE = (
    *("task", "model", "dtype", "device", "data_source", "prompt"),
    *("data_seed", "num_train", "num_dev", "num_eval", "num_more_eval"),
)
STEPS_OF_A_PROBE = 3


def accuracy(spec: CellSpec, execute: Callable[[Job], Outcome], result: PartialResult) -> None:
    """Run the jobs of an accuracy cell and fill in its result as they end.

    Raises:
        CellStopped: a job failed without which the cell cannot go on.
    """
    result.baselines = _baselines(spec, execute, result)
    options = _within_budget(spec, execute)
    result.chosen, speed = _search(spec, options, execute, result)
    options |= result.chosen.model_dump(exclude_none=True)
    if spec.budget.seconds is not None:
        options["max_steps"] = _steps_in(spec.budget.seconds, speed)
    budgeted = {key: options.get(key) for key in ("max_steps", "per_device_train_batch_size")}
    result.chosen = result.chosen.model_copy(update=budgeted)
    for seed in spec.seeds:
        outcome = execute(Job("train", {**_with_best_step(options, spec), "seed": seed}, spec.limits))
        if outcome.status != "done":
            raise CellStopped(outcome.status, f"seed {seed}: {outcome.message}")
        result.add_run(outcome)


def _steps_in(seconds: float, speed: Mapping[str, float | None]) -> int:
    """The number of steps that fit into so many seconds, at the speed of a trial."""
    a_step, before = speed.get("seconds_per_step"), speed.get("seconds_before") or 0.0
    if not a_step:
        raise CellStopped("failed", "a budget in seconds needs a search of at least two points, which time a step")
    return max(1, int((seconds - before) / a_step))


def _baselines(spec: CellSpec, execute: Callable[[Job], Outcome], result: PartialResult) -> dict[str, Score]:
    """The scores of the untuned model and of the majority class on the evaluation rows."""
    if spec.options.get("task") is None:
        return {}
    options = {name: spec.options[name] for name in BASELINE if name in spec.options}
    options["per_device_eval_batch_size"] = spec.options.get("per_device_eval_batch_size", 32)
    outcome = execute(Job("evaluate", options, spec.limits, "baseline"))
    if outcome.status != "done":
        raise CellStopped(outcome.status, f"zero-shot: {outcome.message}")
    result.environment = outcome.found["environment"]
    result.baseline_right = outcome.found.get("right", {})
    return {k: Score.model_validate(v) for k, v in outcome.found["scores"].items()}


def _search(
    spec: CellSpec, options: dict[str, Any], execute: Callable[[Job], Outcome], result: PartialResult
) -> tuple[Chosen, dict[str, float | None]]:
    """The best point of the search and the measured speed of its trial (empty for a grid of one point)."""
    plan, known = spec.search, {"has_mu": _has_mu(spec.options), "is_hybrid": "hybrid_layers" in spec.options}
    if not plan.learning_rate:
        raise CellStopped("failed", "the search has no learning rate; give [search] learning_rate a value")
    if num_points(spec) == 1:
        return Chosen(**next(search(plan, **known)).options), {}
    points = search(plan, **known)
    trials: list[Trial] = []
    point: Point | None = next(points)
    while point is not None:
        trial = _trial(point, options, spec, execute)
        trials.append(trial)
        result.search = tuple(trials)
        try:
            point = points.send(math.inf if trial.dev_loss is None else trial.dev_loss)
        except StopIteration:
            point = None
    best = min(trials, key=lambda t: math.inf if t.dev_loss is None else t.dev_loss)
    if best.dev_loss is None:
        raise CellStopped(best.status if best.status != "done" else "failed", f"no trial has a loss: {best.message}")
    return Chosen(**{name: getattr(best, name) for name in Point._fields}), best.measured


def num_points(spec: CellSpec) -> int:
    """How many points the search of a cell tries; a single point is taken without a trial."""
    axes = axes_of(spec.search, has_mu=_has_mu(spec.options), is_hybrid="hybrid_layers" in spec.options)
    size = math.prod(len(set(values)) for values in axes.values())
    return size if spec.search.by == "grid" or size == 1 else spec.search.num_trials


def steps_of_trial(spec: CellSpec, max_steps: int) -> int:
    """The steps of a trial for runs of so many steps."""
    return max(1, round(spec.search.steps * max_steps))


def _trial(point: Point, options: dict[str, Any], spec: CellSpec, execute: Callable[[Job], Outcome]) -> Trial:
    """The outcome of a short run at a point."""
    steps, seed = steps_of_trial(spec, max_steps_of(options)), spec.search.seed
    short = {**_without_evaluation(options), **point.options, "max_steps": steps, "seed": seed}
    outcome = execute(Job("train", short, spec.limits, "trial"))
    trial = Trial(**point._asdict(), seed=seed, status=outcome.status, message=outcome.message)
    if outcome.status != "done":
        return trial
    run = RunRecord.model_validate(outcome.found["run"])
    loss, value = (None, None) if run.dev is None else (run.dev.loss, run.dev.value)
    costs = {name: getattr(run, name) for name in ("num_steps", "num_forwards", "forward_equivalents", "layer_passes")}
    measured = {name: getattr(run, name) for name in ("seconds", "peak_memory", "measured")}
    return trial.model_copy(update={**costs, **measured, "dev_loss": loss, "dev_value": value})


def _without_evaluation(options: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k != "num_more_eval"} | {"num_eval": 0}


def max_steps_of(options: Mapping[str, Any]) -> int:
    """The steps of a run with these options."""
    return int(options.get("max_steps", TrainConfig.model_fields["max_steps"].default))


def _within_budget(spec: CellSpec, execute: Callable[[Job], Outcome]) -> dict[str, Any]:
    """The options with a batch size that fits the memory budget and the steps that the budget of passes allows."""
    options, budget = dict(spec.options), spec.budget
    if budget.mib is not None:
        options |= _fitting_batch(spec, execute)
    if budget.forward_equivalents is not None:
        outcome = _probe(spec, options, execute)
        if outcome.status != "done":
            raise CellStopped(outcome.status, f"its first steps: {outcome.message}")
        options["max_steps"] = max(1, int(budget.forward_equivalents / equivalents_per_step(outcome)))
    return options


def equivalents_per_step(outcome: Outcome) -> float:
    """The forward-equivalents of one step, as a run of a few steps counted them."""
    run = RunRecord.model_validate(outcome.found["run"])
    per_step = run.values.get("equivalents_per_step")
    if not per_step:
        raise CellStopped("failed", "a budget of passes needs a run that counts them")
    return per_step


def _probe(spec: CellSpec, options: Mapping[str, Any], execute: Callable[[Job], Outcome]) -> Outcome:
    """Take a few steps of the run, at the first point of its search."""
    point = {"learning_rate": spec.search.learning_rate[0]}
    few = {"max_steps": STEPS_OF_A_PROBE, "logging_steps": 1, "seed": spec.search.seed}
    return execute(Job("train", {**_without_evaluation(options), **point, **few}, spec.limits, "probe"))


def _fitting_batch(spec: CellSpec, execute: Callable[[Job], Outcome]) -> dict[str, int]:
    """The first batch size whose memory stays within the budget, tested by a few steps with each."""
    assert spec.budget.mib is not None
    config = validate(TrainConfig, spec.options, spec.path)
    least = math.inf
    for size in spec.budget.batch_sizes or (config.per_device_train_batch_size,):
        batch = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": max(1, config.rows_a_step // size),
        }
        outcome = _probe(spec, {**spec.options, **batch}, execute)
        if outcome.status not in ("done", "out_of_memory"):
            raise CellStopped(outcome.status, f"batch size {size}: {outcome.message}")
        mib = _mib_of(outcome) if outcome.status == "done" else math.inf
        if mib <= spec.budget.mib:
            return batch
        least = min(least, mib)
    raise CellStopped("out_of_memory", f"it takes {least:.0f} MiB at least, and the budget is {spec.budget.mib:g}")


def _mib_of(outcome: Outcome) -> float:
    """The memory of a run above the process without a model: that of its steps, or of loading if that is more."""
    measured = outcome.found["run"]["measured"]
    return float(max(measured["step_bytes"], measured["loading_bytes"]) / 2**20)


def _with_best_step(options: dict[str, Any], spec: CellSpec) -> dict[str, Any]:
    """The options with evaluations during training (ten, unless the cell sets `eval_steps`) and the best step kept."""
    steps = max_steps_of(options)
    every = min(steps, spec.options.get("eval_steps", max(1, steps // 10)))
    return {**options, "eval_steps": every, "logging_steps": every, "load_best_model_at_end": True}


def _has_mu(options: dict[str, Any]) -> bool:
    method = options.get("method", "zo_sgd")
    return method not in FIRST_ORDER and method != "forward_grad"
