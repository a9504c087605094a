"""Made-up results of the benchmark: cells whose true accuracies the tests choose."""

import numpy as np

from zotune.bench.results.cells import Cell
from zotune.bench.results.records import CellResult, Chosen, Evaluation, RunRecord, Score, Trial
from zotune.bench.spec.schema import Experiment
from zotune.llm.config.schema import validate

METHODS = ("fo_sgd", "fo_adam", "forward_grad", "zo_sgd", "zo_sgd_sign", "zo_sgd_mmt", "zo_sgd_cons", "zo_adam")


def experiment(**changes):
    """Methods × tuning schemes, with the paper's numbers of another model."""
    plain = {
        "title": "Table 2: methods × schemes",
        "question": "Which method is best?",
        "layout": {"rows": ["model", "method"], "columns": ["tuning"]},
        "comparable": "Only the order of the methods.\nThe model is another one.",
        "axes": {},
        "scale": {"cpu": {}},
        "paper": [
            {
                "source": "Tab. 2",
                "row": "method",
                "fixed": {"model": "opt-1.3b"},
                "columns": [{"tuning": "lora"}, {"tuning": "full"}],
                "values": {"zo_sgd": [90.1, 90.8], "zo_adam": [92.3, 84.4]},
            }
        ],
    }
    return validate(Experiment, {**plain, **changes}, "test")


def answers(rng, accuracy, num_runs=3, num_rows=200, luck=0.0, rows=None):
    """Right answers of some runs: rows are as hard for all cells (`rows`), and each run has its luck (in logits)."""
    rows = np.zeros(num_rows) if rows is None else rows
    centre = np.log(accuracy / (1 - accuracy))
    chance = 1 / (1 + np.exp(-(centre + rows + rng.normal(0, luck or 1e-12, (num_runs, 1)))))
    return rng.random((num_runs, len(rows))) < chance


def cell(coordinates, right=None, state="done", values=None, measured=None, **changes):
    """A cell of these coordinates; `right` is [runs, rows], `values` and `measured` one dictionary a run."""
    count = len(right) if right is not None else len(values or measured or [{}])
    runs = [_run(seed, right, values, measured, changes.pop("metric", "accuracy")) for seed in range(count)]
    plain = {
        "experiment": "table2",
        "scale": "cpu",
        "cell": "--".join(map(str, coordinates.values())),
        "coordinates": coordinates,
        "kind": "accuracy" if right is not None else "memory",
        "key": "0" * 16,
        "status": state if state in ("failed", "timed_out", "out_of_memory") else "done",
        "config": {"options": {"task": coordinates.get("task", "sst2")}},
        "runs": runs,
        "environment": {"torch": "2.13", "gpu": "none"},
        "commit": "0123456789abcdef",
        "time": "2026-01-02T03:04:05+00:00",
    }
    if right is not None:
        plain["chosen"] = Chosen(learning_rate=1e-3, mu=1e-2, max_steps=100)
        plain["search"] = (Trial(learning_rate=1e-3, mu=1e-2, seed=0, num_forwards=20, seconds=3.0, dev_loss=0.5),)
        plain["baselines"] = {
            "zero_shot": Score(value=0.6, low=0.55, high=0.65, num_examples=200),
            "majority": Score(value=0.5, num_examples=200),
        }
    return Cell(coordinates, state, None if state == "missing" else CellResult(**{**plain, **changes}))


def _run(seed, right, values, measured, metric):
    found = {
        "seed": seed,
        "num_steps": 100,
        "seconds": 60.0 + seed,
        "peak_memory": (900 + seed) << 20,
        "num_tuned": 4096,
    }
    found |= {"values": (values or [{}] * 9)[seed], "measured": (measured or [{}] * 9)[seed]}
    if right is None:
        return RunRecord(**found)
    value = float(np.mean(right[seed]))
    score = Score(
        metric=metric, value=value, low=value - 0.05, high=value + 0.05, num_examples=len(right[seed]), loss=0.4
    )
    way = [
        Evaluation(
            step=s, num_forwards=2 * s, dev_loss=0.7 - s / 500, dev_value=0.6 + (value - 0.6) * s / 100, seconds=s * 0.6
        )
        for s in (0, 25, 50, 75, 100)
    ]
    marks = "".join("1" if hit else "0" for hit in right[seed])
    return RunRecord(
        **found, test=score, dev=score, right=marks, evaluations=way, best_step=100, num_forwards=200, num_tokens=10_000
    )


def table_of_methods(accuracies, tunings=("lora", "full"), seed=0, **options):
    """A cell for each method and scheme; `accuracies` by method."""
    rng = np.random.default_rng(seed)
    return [
        cell({"method": m, "tuning": t, "model": "smollm2-135m"}, answers(rng, a, **options))
        for m, a in accuracies.items()
        for t in tunings
    ]
