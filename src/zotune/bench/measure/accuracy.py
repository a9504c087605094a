"""How well a tuned model answers: baselines, a search on held-out rows, then a full run a seed.

Each run keeps the step that is best on the held-out rows and reads the evaluation rows once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from zotune.bench.measure.found import Found, Stopped
from zotune.bench.measure.search import Point, search
from zotune.bench.results.records import Chosen, Evaluation, RunRecord, Score, Trial
from zotune.bench.run.jobs import Job, Outcome
from zotune.bench.spec.experiments import CellSpec, SearchPlan
from zotune.errors import RunError, UsageError
from zotune.llm.config.method import FIRST_ORDER
from zotune.llm.config.run import EvalConfig, TrainConfig
from zotune.llm.config.schema import validate

# What an evaluation of the untuned model shares with the runs.
_SHARED = ("task", "model", "dtype", "device", "data_source", "prompt", "data_seed", "num_train", "num_eval")
_STEPS_OF_A_PROBE = 3


# In the runner ---------------------------------------------------------------------------------------------


def accuracy(spec: CellSpec, execute: Callable[[Job], Outcome], found: Found) -> None:
    """Find a cell's accuracy, job by job; what is known goes into `found` as it comes.

    Raises:
        Stopped: a job that the cell cannot do without did not end well.
    """
    found.baselines = _baselines(spec, execute, found)
    options = _within_budget(spec, execute)
    found.chosen, speed = _searched(spec, options, execute, found)
    options |= found.chosen.model_dump(exclude_none=True)
    if spec.budget.seconds is not None:
        options["max_steps"] = _steps_in(spec.budget.seconds, speed)
    settled = {key: options.get(key) for key in ("max_steps", "per_device_train_batch_size")}
    found.chosen = found.chosen.model_copy(update=settled)
    for seed in spec.seeds:
        outcome = execute(Job("train", {**_keeping_the_best(options, spec), "seed": seed}, spec.limits))
        if outcome.status != "done":
            raise Stopped(outcome.status, f"seed {seed}: {outcome.message}")
        found.add(outcome)


def _steps_in(seconds: float, speed: Mapping[str, float | None]) -> int:
    """How many steps so many seconds pay for, at a trial's speed."""
    a_step, before = speed.get("seconds_per_step"), speed.get("seconds_before") or 0.0
    if not a_step:
        raise Stopped("failed", "a budget of seconds needs a search of two points or more, which time a step")
    return max(1, int((seconds - before) / a_step))


def _baselines(spec: CellSpec, execute: Callable[[Job], Outcome], found: Found) -> dict[str, Score]:
    """The untuned model and the majority class on the evaluation rows."""
    if spec.options.get("task") is None:
        return {}
    options = {name: spec.options[name] for name in _SHARED if name in spec.options}
    options["per_device_eval_batch_size"] = spec.options.get("per_device_eval_batch_size", 32)
    outcome = execute(Job("evaluate", options, spec.limits))
    if outcome.status != "done":
        raise Stopped(outcome.status, f"zero-shot: {outcome.message}")
    found.environment = outcome.found["environment"]
    return {k: Score.model_validate(v) for k, v in outcome.found["scores"].items()}


def _searched(
    spec: CellSpec, options: dict[str, Any], execute: Callable[[Job], Outcome], found: Found
) -> tuple[Chosen, dict[str, float | None]]:
    """The best point of the search, and how fast a trial is there (nothing where there was nothing to search)."""
    plan, has_mu = spec.search, _has_mu(spec.options)
    if not plan.learning_rate:
        raise Stopped("failed", "the search names no learning rate")
    if plan.by == "grid" and len(plan.learning_rate) * max(1, len(plan.mu) if has_mu else 1) == 1:
        return Chosen(learning_rate=plan.learning_rate[0], mu=plan.mu[0] if has_mu and plan.mu else None), {}
    points = search(plan, has_mu=has_mu)
    trials: list[Trial] = []
    point: Point | None = next(points)
    while point is not None:
        trial = _tried(point, options, spec, execute)
        trials.append(trial)
        found.search = tuple(trials)
        try:
            point = points.send(math.inf if trial.dev_loss is None else trial.dev_loss)
        except StopIteration:
            point = None
    best = min(trials, key=lambda t: math.inf if t.dev_loss is None else t.dev_loss)
    if best.dev_loss is None:
        raise Stopped(best.status if best.status != "done" else "failed", f"no trial has a loss: {best.message}")
    return Chosen(learning_rate=best.learning_rate, mu=best.mu), best.measured


def _tried(point: Point, options: dict[str, Any], spec: CellSpec, execute: Callable[[Job], Outcome]) -> Trial:
    """A short run at a point."""
    plan: SearchPlan = spec.search
    steps = max(1, round(plan.steps * options.get("max_steps", TrainConfig.model_fields["max_steps"].default)))
    at = {k: v for k, v in point._asdict().items() if v is not None}
    short = {**options, **at, "max_steps": steps, "num_eval": 0, "seed": plan.seed}
    outcome = execute(Job("train", short, spec.limits))
    trial = Trial(**point._asdict(), seed=plan.seed, status=outcome.status, message=outcome.message)
    if outcome.status != "done":
        return trial
    run = RunRecord.model_validate(outcome.found["run"])
    loss, value = (None, None) if run.dev is None else (run.dev.loss, run.dev.value)
    told = {"num_steps": run.num_steps, "num_forwards": run.num_forwards, "dev_loss": loss, "dev_value": value}
    return trial.model_copy(
        update={**told, "seconds": run.seconds, "peak_memory": run.peak_memory, "measured": run.measured}
    )


def _within_budget(spec: CellSpec, execute: Callable[[Job], Outcome]) -> dict[str, Any]:
    """The options with a batch that the budget of memory holds, and the steps that the budget of passes pays."""
    options, budget = dict(spec.options), spec.budget
    if budget.mib is not None:
        options |= _fitting(spec, execute)
    if budget.forwards is not None:
        options["max_steps"] = max(1, budget.forwards // passes_a_step(validate(TrainConfig, options, spec.path)))
    return options


def _fitting(spec: CellSpec, execute: Callable[[Job], Outcome]) -> dict[str, int]:
    """The first batch size that stays below the budget's bytes, found by some steps with each."""
    assert spec.budget.mib is not None
    config = validate(TrainConfig, spec.options, spec.path)
    examples = config.per_device_train_batch_size * config.gradient_accumulation_steps
    rate = spec.search.learning_rate[0]
    least = math.inf
    for size in spec.budget.batch_sizes or (config.per_device_train_batch_size,):
        batch = {"per_device_train_batch_size": size, "gradient_accumulation_steps": max(1, examples // size)}
        few = {"learning_rate": rate, "max_steps": _STEPS_OF_A_PROBE, "num_eval": 0, "seed": spec.search.seed}
        outcome = execute(Job("train", {**spec.options, **batch, **few}, spec.limits))
        if outcome.status not in ("done", "out_of_memory"):
            raise Stopped(outcome.status, f"batch size {size}: {outcome.message}")
        taken = outcome.found["run"]["peak_memory"] / 2**20 if outcome.status == "done" else math.inf
        if taken <= spec.budget.mib:
            return batch
        least = min(least, taken)
    raise Stopped("out_of_memory", f"it takes {least:.0f} MiB at least, and the budget is {spec.budget.mib:g}")


def _keeping_the_best(options: dict[str, Any], spec: CellSpec) -> dict[str, Any]:
    """Evaluations on the way, ten unless the cell says otherwise, of which the best is kept."""
    steps = options.get("max_steps", TrainConfig.model_fields["max_steps"].default)
    every = min(steps, spec.options.get("eval_steps", max(1, steps // 10)))
    return {**options, "eval_steps": every, "logging_steps": every, "load_best_model_at_end": True}


def passes_a_step(config: TrainConfig) -> int:
    """Forward passes' worth of arithmetic of one step.

    A back-propagation takes about two forward passes beside its own, and with checkpointing its own once more; a pass
    with tangents about two.

    >>> [passes_a_step(TrainConfig(task="sst2", method=method)) for method in ("zo_sgd", "fo_sgd")]
    [2, 3]
    """
    if config.blocks is not None or config.hybrid_layers is not None or config.is_generated:
        raise UsageError("budget: forwards knows no blocks, hybrids or generated text; give max_steps")
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


# In the worker ---------------------------------------------------------------------------------------------


def trained(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A run of `zotune train`; where an earlier attempt was interrupted, its rest."""
    from zotune.llm.training.train import train

    output = folder / "run"
    config = validate(TrainConfig, {**options, "output_dir": output, "resume": True}, "the benchmark's run")
    result = train(config)
    if result.stopped_by is not None:
        raise RunError(f"it was stopped by signal {result.stopped_by}")
    names = ("best_step", "num_steps", "num_skipped", "num_forwards", "num_tokens", "num_tuned")
    run = RunRecord(
        seed=config.seed,
        test=_score(result.test),
        right=_right(result.test),
        dev=_score(result.dev),
        dev_before=_score(result.dev_before),
        evaluations=tuple(_evaluations(output / "metrics.jsonl", result.dev_before)),
        measured=_speed(output / "metrics.jsonl", result.seconds, result.num_steps),
        seconds=result.seconds,
        peak_memory=result.peak_memory,
        **{name: getattr(result, name) for name in names},
    )
    return {"run": run.model_dump(mode="json")}


def evaluated(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The untuned model and the majority class on a task's evaluation rows."""
    from zotune.llm.training.evaluation import evaluate

    config = validate(EvalConfig, {**options, "baselines": True}, "the benchmark's zero-shot")
    measured, _ = evaluate(config)
    (found,) = measured.values()
    scores = {"zero_shot": _score(found.evaluation)}
    if found.majority is not None:
        m = found.majority
        rows = found.evaluation.num_examples
        scores["majority"] = Score(value=m.accuracy, low=m.low, high=m.high, num_examples=rows)
    return {"scores": {name: score.model_dump(mode="json") for name, score in scores.items() if score}}


def _score(found: Any) -> Score | None:
    if found is None:
        return None
    loss = found.loss if math.isfinite(found.loss) else None
    return Score(
        metric=found.metric,
        value=found.value,
        low=found.low,
        high=found.high,
        num_examples=found.num_examples,
        loss=loss,
    )


def _right(found: Any) -> str:
    """Row by row whether the answer was right; nothing for a metric that has degrees."""
    if found is None or not set(found.values) <= {0.0, 1.0}:
        return ""
    return "".join("1" if value else "0" for value in found.values)


def _lines(metrics: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]


def _speed(metrics: Path, seconds: float, num_steps: int) -> dict[str, float]:
    """Seconds a step in the second half of a training, and what the whole took beyond that."""
    first = next((x for x in _lines(metrics) if "dev" not in x and 2 * x["step"] >= num_steps), None)
    if first is None or first["step"] == num_steps:
        return {"seconds_per_step": seconds / num_steps, "seconds_before": 0.0}
    a_step = (seconds - first["seconds"]) / (num_steps - first["step"])
    return {"seconds_per_step": a_step, "seconds_before": max(0.0, seconds - a_step * num_steps)}


def _evaluations(metrics: Path, before: Any) -> list[Evaluation]:
    """The evaluations on the way, each with the passes and seconds of the training up to it."""
    lines = _lines(metrics)
    training = {line["step"]: line for line in lines if "dev" not in line}
    found = []
    if before is not None:
        found.append(Evaluation(step=0, num_forwards=0, dev_loss=before.loss, dev_value=before.value))
    for line in lines:
        if "dev" not in line or line["step"] not in training:
            continue
        spent, dev = training[line["step"]], line["dev"]
        found.append(
            Evaluation(
                step=line["step"],
                num_forwards=spent["num_forwards"],
                seconds=spent["seconds"],
                dev_loss=dev["loss"],
                dev_value=next(iter(dev.values())),
            )
        )
    return found
