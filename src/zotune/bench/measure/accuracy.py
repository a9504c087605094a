"""The jobs of accuracy cells: a training run, and the evaluation of the untuned model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zotune.bench.results.records import Evaluation, RunRecord, Score
from zotune.errors import RunError
from zotune.llm.config.run import EvalConfig, TrainConfig
from zotune.llm.config.schema import validate

# The folder of activations beside the folders of jobs.
ACTIVATIONS = "activations"
# What passes cost, of a whole run and up to each evaluation.
_COSTS = ("num_forwards", "forward_equivalents", "layer_passes")


def trained(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run `zotune train`, or the rest of an earlier attempt that was interrupted.

    Raises:
        RunError: the run was stopped by a signal.
    """
    from zotune.bench.measure.step_memory import StepMemory
    from zotune.llm.training.train import train

    output = folder / "run"
    # Jobs share what no run changes: the activations below the tuned layers.
    shared = {"reuse_folder": folder.parent / ACTIVATIONS, "output_dir": output, "resume": True}
    config = validate(TrainConfig, {**options, **shared}, "the benchmark's run")
    memory = StepMemory(config.device)
    result = train(config, callbacks=[memory])
    if result.stopped_by is not None:
        raise RunError(f"the run was stopped by signal {result.stopped_by}")
    names = ("best_step", "num_steps", "num_skipped", "num_tokens", "num_tuned")
    lines = _lines(output / "metrics.jsonl")
    run = RunRecord(
        seed=config.seed,
        test=_score(result.test),
        right=_right(result.test),
        dev=_score(result.dev),
        dev_before=_score(result.dev_before),
        evaluations=tuple(_evaluations(lines, result.dev_before)),
        values={"equivalents_per_step": _equivalents_per_step(lines, result)},
        measured={**_speed(lines, result.seconds, result.num_steps), **memory.numbers()},
        seconds=result.seconds,
        peak_memory=max(result.peak_memory, memory.peak),
        **{name: getattr(result, name) for name in (*names, *_COSTS)},
    )
    return {"run": run.model_dump(mode="json")}


def evaluated(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Score the untuned model and the majority class on a task's evaluation rows."""
    from zotune.llm.training.evaluation import evaluate

    config = validate(EvalConfig, {**options, "baselines": True}, "the benchmark's zero-shot")
    measured, _ = evaluate(config)
    (task,) = measured.values()
    scores = {"zero_shot": _score(task.evaluation)}
    right = {"zero_shot": _right(task.evaluation)}
    if task.majority is not None:
        m = task.majority
        rows = task.evaluation.num_examples
        scores["majority"] = Score(value=m.accuracy, low=m.low, high=m.high, num_examples=rows)
    return {
        "scores": {name: score.model_dump(mode="json") for name, score in scores.items() if score},
        "right": {name: marks for name, marks in right.items() if marks},
    }


def _score(evaluation: Any) -> Score | None:
    if evaluation is None:
        return None
    loss = evaluation.loss if math.isfinite(evaluation.loss) else None
    return Score(
        metric=evaluation.metric,
        value=evaluation.value,
        low=evaluation.low,
        high=evaluation.high,
        num_examples=evaluation.num_examples,
        loss=loss,
    )


def _right(evaluation: Any) -> str:
    """One character for each row, 1 for a right answer, else 0; empty for metrics with values between 0 and 1."""
    if evaluation is None or not set(evaluation.values) <= {0.0, 1.0}:
        return ""
    return "".join("1" if value else "0" for value in evaluation.values)


def _lines(metrics: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]


def _speed(lines: Sequence[dict[str, Any]], seconds: float, num_steps: int) -> dict[str, float]:
    """Seconds per step in the second half of a training run, and the seconds that the run took beyond this speed."""
    first = next((x for x in lines if "dev" not in x and 2 * x["step"] >= num_steps), None)
    if first is None or first["step"] == num_steps:
        return {"seconds_per_step": seconds / num_steps, "seconds_before": 0.0}
    a_step = (seconds - first["seconds"]) / (num_steps - first["step"])
    return {"seconds_per_step": a_step, "seconds_before": max(0.0, seconds - a_step * num_steps)}


def _equivalents_per_step(lines: Sequence[dict[str, Any]], result: Any) -> float:
    """Forward-equivalents of a step after the first ones, which may have passes that are taken once."""
    training = [x for x in lines if "dev" not in x]
    if len(training) < 2:
        return float(result.forward_equivalents / result.num_steps)
    before, last = training[-2:]
    passes = last["forward_equivalents"] - before["forward_equivalents"]
    return float(passes / (last["step"] - before["step"]))


def _evaluations(lines: Sequence[dict[str, Any]], before: Any) -> list[Evaluation]:
    """The evaluations during training, each with the cost of the training up to its step."""
    training = {line["step"]: line for line in lines if "dev" not in line}
    evaluations = []
    if before is not None:
        none = dict.fromkeys(_COSTS, 0)
        evaluations.append(Evaluation(step=0, dev_loss=before.loss, dev_value=before.value, **none))
    for line in lines:
        if "dev" not in line or line["step"] not in training:
            continue
        cost, dev = training[line["step"]], line["dev"]
        evaluations.append(
            Evaluation(
                step=line["step"],
                seconds=cost["seconds"],
                dev_loss=dev["loss"],
                dev_value=next(iter(dev.values())),
                **{name: cost[name] for name in _COSTS},
            )
        )
    return evaluations
