"""Accuracy cells: baselines, a search on held-out rows, then one full run for each seed.

The runs evaluate on held-out rows during training and keep the weights of the best step; they read the evaluation rows
once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from zotune.bench.measure.search import Point, search
from zotune.bench.results.records import Chosen, RunRecord, Score, Trial
from zotune.bench.run.jobs import Job, Outcome
from zotune.bench.run.partial_result import CellStopped, PartialResult
from zotune.bench.spec.schema import CellSpec, SearchPlan
from zotune.errors import UsageError
from zotune.llm.config.method import FIRST_ORDER
from zotune.llm.config.run import TrainConfig
from zotune.llm.config.schema import validate

# The options that the evaluation of the untuned model shares with the runs.
_SHARED = ("task", "model", "dtype", "device", "data_source", "prompt", "data_seed", "num_train", "num_eval")
_STEPS_OF_A_PROBE = 3


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
    options = {name: spec.options[name] for name in _SHARED if name in spec.options}
    options["per_device_eval_batch_size"] = spec.options.get("per_device_eval_batch_size", 32)
    outcome = execute(Job("evaluate", options, spec.limits, "baseline"))
    if outcome.status != "done":
        raise CellStopped(outcome.status, f"zero-shot: {outcome.message}")
    result.environment = outcome.found["environment"]
    return {k: Score.model_validate(v) for k, v in outcome.found["scores"].items()}


def _search(
    spec: CellSpec, options: dict[str, Any], execute: Callable[[Job], Outcome], result: PartialResult
) -> tuple[Chosen, dict[str, float | None]]:
    """The best point of the search and the measured speed of its trial (empty for a grid of one point)."""
    plan, has_mu = spec.search, _has_mu(spec.options)
    if not plan.learning_rate:
        raise CellStopped("failed", "the search has no learning rate; give [search] learning_rate a value")
    if plan.by == "grid" and len(plan.learning_rate) * max(1, len(plan.mu) if has_mu else 1) == 1:
        return Chosen(learning_rate=plan.learning_rate[0], mu=plan.mu[0] if has_mu and plan.mu else None), {}
    points = search(plan, has_mu=has_mu)
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
    return Chosen(learning_rate=best.learning_rate, mu=best.mu), best.measured


def _trial(point: Point, options: dict[str, Any], spec: CellSpec, execute: Callable[[Job], Outcome]) -> Trial:
    """The outcome of a short run at a point."""
    plan: SearchPlan = spec.search
    steps = max(1, round(plan.steps * options.get("max_steps", TrainConfig.model_fields["max_steps"].default)))
    at = {k: v for k, v in point._asdict().items() if v is not None}
    short = {**options, **at, "max_steps": steps, "num_eval": 0, "seed": plan.seed}
    outcome = execute(Job("train", short, spec.limits, "trial"))
    trial = Trial(**point._asdict(), seed=plan.seed, status=outcome.status, message=outcome.message)
    if outcome.status != "done":
        return trial
    run = RunRecord.model_validate(outcome.found["run"])
    loss, value = (None, None) if run.dev is None else (run.dev.loss, run.dev.value)
    scores = {"num_steps": run.num_steps, "num_forwards": run.num_forwards, "dev_loss": loss, "dev_value": value}
    return trial.model_copy(
        update={**scores, "seconds": run.seconds, "peak_memory": run.peak_memory, "measured": run.measured}
    )


def _within_budget(spec: CellSpec, execute: Callable[[Job], Outcome]) -> dict[str, Any]:
    """The options with a batch size that fits the memory budget and the steps that the budget of passes allows."""
    options, budget = dict(spec.options), spec.budget
    if budget.mib is not None:
        options |= _fitting_batch(spec, execute)
    if budget.forwards is not None:
        options["max_steps"] = max(1, budget.forwards // passes_a_step(validate(TrainConfig, options, spec.path)))
    return options


def _fitting_batch(spec: CellSpec, execute: Callable[[Job], Outcome]) -> dict[str, int]:
    """The first batch size whose peak memory stays within the budget, tested by a few steps with each."""
    assert spec.budget.mib is not None
    config = validate(TrainConfig, spec.options, spec.path)
    examples = config.per_device_train_batch_size * config.gradient_accumulation_steps
    rate = spec.search.learning_rate[0]
    least = math.inf
    for size in spec.budget.batch_sizes or (config.per_device_train_batch_size,):
        batch = {"per_device_train_batch_size": size, "gradient_accumulation_steps": max(1, examples // size)}
        few = {"learning_rate": rate, "max_steps": _STEPS_OF_A_PROBE, "num_eval": 0, "seed": spec.search.seed}
        outcome = execute(Job("train", {**spec.options, **batch, **few}, spec.limits, "probe"))
        if outcome.status not in ("done", "out_of_memory"):
            raise CellStopped(outcome.status, f"batch size {size}: {outcome.message}")
        mib = outcome.found["run"]["peak_memory"] / 2**20 if outcome.status == "done" else math.inf
        if mib <= spec.budget.mib:
            return batch
        least = min(least, mib)
    raise CellStopped("out_of_memory", f"it takes {least:.0f} MiB at least, and the budget is {spec.budget.mib:g}")


def _with_best_step(options: dict[str, Any], spec: CellSpec) -> dict[str, Any]:
    """The options with evaluations during training (ten, unless the cell sets `eval_steps`) and the best step kept."""
    steps = options.get("max_steps", TrainConfig.model_fields["max_steps"].default)
    every = min(steps, spec.options.get("eval_steps", max(1, steps // 10)))
    return {**options, "eval_steps": every, "logging_steps": every, "load_best_model_at_end": True}


def passes_a_step(config: TrainConfig) -> int:
    """The arithmetic of one step in units of a forward pass.

    A back-propagation costs about three forward passes with its own, and four with checkpointing; a forward pass with
    tangents costs about two.

    Raises:
        UsageError: the cost of the step is not known (blocks, hybrids, generated text).

    >>> [passes_a_step(TrainConfig(task="sst2", method=method)) for method in ("zo_sgd", "fo_sgd")]
    [2, 3]
    """
    if config.blocks is not None or config.hybrid_layers is not None or config.is_generated:
        raise UsageError(
            "budget: forwards does not support blocks, hybrids or generated text, whose cost it cannot tell; "
            "set max_steps instead"
        )
    batches, q = config.gradient_accumulation_steps, config.num_queries
    if config.method in FIRST_ORDER:
        return batches * (4 if config.gradient_checkpointing else 3)
    one_sided = config.difference == "forward"
    if config.method == "forward_grad":
        return batches * 2 * q
    more = {True: 2, False: 3}[one_sided] if config.method == "zo_sgd_cons" else 0
    return batches * ((q + 1 if one_sided else 2 * q) + more)


def _has_mu(options: dict[str, Any]) -> bool:
    method = options.get("method", "zo_sgd")
    return method not in FIRST_ORDER and method != "forward_grad"
