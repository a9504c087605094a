"""Accuracy by task, method and tuning scheme on SmolLM2-135M, beside zero-shot: the paper's tables 2 and 3 at its size.

    make bench-tasks                                     # all of it; where there is no GPU, at the cpu budget
    python benchmarks/tasks.py --minutes 60              # as far as an hour carries; the next call goes on
    python benchmarks/tasks.py --budget paper            # 20,000 steps, three seeds
    python benchmarks/tasks.py --table                   # what is recorded, as a table

A cell is a task, a scheme and a method. Its learning rate is the one of a small grid with the lowest loss on the
held-out training rows after a short run, which reads no evaluation row; then each seed trains in full, keeps the step
that is best on the held-out rows, and reads the evaluation rows once. Each run is recorded as it ends.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "speed"))
from record import RESULTS, provenance, zotune

from zotune.llm.method_options import FIRST_ORDER
from zotune.methods import METHODS

MODEL = "smollm2-135m"
TASKS = ("sst2", "rte", "copa", "winogrande")
TUNINGS = ("lora", "prefix", "prompt", "full")
OURS = ("zo_sgd", "zo_adam", "forward_grad", "fo_adam")
PATH = RESULTS / "tasks.json"

# Around what Malladi et al. (2023) recommend for 20,000 steps of large models; a small one bears more, and must in few.
SGD_RATES = {
    "full": (1e-7, 1e-6, 1e-5),
    "lora": (1e-3, 3e-3, 1e-2),
    "prefix": (1e-3, 1e-2, 1e-1),
    "prompt": (1e-3, 1e-2, 1e-1),
}
ADAM_RATES = {
    "full": (1e-6, 1e-5, 1e-4),
    "lora": (1e-3, 3e-3, 1e-2),
    "prefix": (1e-3, 1e-2, 1e-1),
    "prompt": (1e-4, 1e-3, 1e-2),
}
MU = {"full": 1e-3, "lora": 1e-2, "prefix": 1e-1, "prompt": 1e-2}


@dataclass(frozen=True)
class Budget:
    """How much a cell may cost: steps and batch of either kind of method, the search's share of steps, rows, seeds."""

    steps: int
    first_order_steps: int
    search: float
    schedule: str
    batch: int
    first_order_batch: int
    num_evaluations: int
    num_dev: int | None
    seeds: tuple[int, ...]


BUDGETS = {
    "cpu": Budget(200, 50, 0.5, "linear", 16, 16, 4, 100, (0,)),
    "paper": Budget(20_000, 625, 0.1, "constant", 16, 8, 40, None, (0, 1, 2)),
}


@dataclass(frozen=True)
class Cell:
    """One place of the table."""

    task: str
    tuning: str
    method: str
    budget: str

    @property
    def key(self) -> str:
        """Its name in the results."""
        return f"{self.task}/{self.tuning}/{self.method}/{self.budget}"

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """The grid."""
        return (ADAM_RATES if "adam" in self.method else SGD_RATES)[self.tuning]

    def run(self, seed: int, learning_rate: float, *, searching: bool) -> dict[str, Any]:
        """The result of a run in a process of its own."""
        budget, back_propagates = BUDGETS[self.budget], self.method in FIRST_ORDER
        steps = budget.first_order_steps if back_propagates else budget.steps
        options: dict[str, Any] = {
            "task": self.task,
            "model": MODEL,
            "tuning": self.tuning,
            "method": self.method,
            "seed": seed,
            "learning-rate": learning_rate,
            # Back-propagation has no unbiased rounding: weights in half precision would not move.
            "dtype": "float32" if self.tuning == "full" else "bfloat16",
            "lr-scheduler-type": budget.schedule,
            "max-steps": max(1, round(steps * budget.search)) if searching else steps,
            "per-device-train-batch-size": budget.first_order_batch if back_propagates else budget.batch,
            "num-eval": 0 if searching else None,
            "num-dev": budget.num_dev,
            **({} if back_propagates or self.method == "forward_grad" else {"mu": MU[self.tuning]}),
        }
        flags = [] if searching else ["--load-best-model-at-end", "--eval-steps", str(steps // budget.num_evaluations)]
        given = [part for k, v in options.items() if v is not None for part in (f"--{k}", str(v))]
        with tempfile.TemporaryDirectory() as folder:
            return zotune("train", *given, *flags, "--output-dir", f"{folder}/run")


class Recorded:
    """The results file, written after every run, so that whatever ends the process, the next call goes on."""

    def __init__(self, minutes: float) -> None:
        self._until = time.monotonic() + 60 * minutes
        self.all: dict[str, Any] = {"model": MODEL, "zero_shot": {}, "cells": {}}
        if PATH.is_file():
            self.all = json.loads(PATH.read_text(encoding="utf-8"))

    @property
    def is_over(self) -> bool:
        """Whether no run may begin any more."""
        return time.monotonic() > self._until

    def save(self) -> None:
        """Write the file, whole or not at all."""
        RESULTS.mkdir(exist_ok=True)
        aside = PATH.with_suffix(".part")
        aside.write_text(json.dumps(self.all, indent=2) + "\n", encoding="utf-8")
        aside.replace(PATH)


def zero_shot(task: str, recorded: Recorded) -> None:
    """The model as it is, and the majority class, on all evaluation rows."""
    found = zotune("eval", "--task", task, "--model", MODEL, "--dtype", "bfloat16", "--baselines")
    keys = ("accuracy", "low", "high", "num_examples", "loss", "seconds", "peak_memory")
    kept = {key: found[key] for key in keys}
    recorded.all["zero_shot"][task] = {**kept, "majority": found["baselines"]["majority"], **provenance()}
    recorded.save()
    print(f"{task}: zero-shot {100 * found['accuracy']:.1f} %", flush=True)


def runs_of(cell: Cell, recorded: Recorded) -> Iterator[str]:
    """Do what is left of a cell, run by run; what each found, in words."""
    new = {**asdict(cell), "budget": asdict(BUDGETS[cell.budget]), "search": {}, "runs": {}}
    entry = recorded.all["cells"].setdefault(cell.key, new)
    for rate in cell.learning_rates:
        if str(rate) not in entry["search"]:
            result = cell.run(0, rate, searching=True)
            entry["search"][str(rate)] = {"dev_loss": result["dev"]["loss"], "seconds": result["seconds"]}
            yield f"learning rate {rate:g}: held-out loss {result['dev']['loss']:.4f}"
    rate = float(min(entry["search"], key=lambda rate: _or_infinity(entry["search"][rate]["dev_loss"])))
    entry["learning_rate"] = rate
    keys = ("test", "dev", "dev_before", "best_step", "num_steps", "num_forwards", "num_tuned", "seconds")
    for seed in BUDGETS[cell.budget].seeds:
        if str(seed) not in entry["runs"]:
            result = cell.run(seed, rate, searching=False)
            kept = {key: result[key] for key in (*keys, "peak_memory")}
            entry["runs"][str(seed)] = {**kept, **provenance()}
            test = result["test"]
            yield f"seed {seed}: {100 * test['accuracy']:.1f} % at {rate:g}, step {result['best_step']}"


def _or_infinity(loss: float | None) -> float:
    return math.inf if loss is None or not math.isfinite(loss) else loss


def table(recorded: Recorded, budget: str) -> str:
    """Mean accuracy over the seeds in percent, with its standard error where there are several; in Markdown."""
    methods = list(dict.fromkeys(cell["method"] for cell in recorded.all["cells"].values()))
    lines = [f"| {MODEL}, {budget} budget | zero-shot | majority |" + "".join(f" `{m}` |" for m in methods)]
    lines.append("|---|--:|--:|" + "--:|" * len(methods))
    for task, found in recorded.all["zero_shot"].items():
        first = f" {100 * found['accuracy']:.1f} | {100 * found['majority']['accuracy']:.1f} |"
        rows = [
            (tuning, [_mean(recorded.all["cells"].get(f"{task}/{tuning}/{m}/{budget}")) for m in methods])
            for tuning in TUNINGS
        ]
        for tuning, cells in [row for row in rows if any(row[1])] or [("", [""] * len(methods))]:
            lines.append(f"| {task} {tuning} |{first}" + "".join(f" {cell} |" for cell in cells))
    return "\n".join(lines)


def _mean(cell: dict[str, Any] | None) -> str:
    values = [100 * run["test"]["accuracy"] for run in cell["runs"].values()] if cell else []
    if not values:
        return ""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.1f} (1 seed)"
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
    return f"{mean:.1f} ± {error:.1f}"


def main() -> None:
    """Run what is not recorded yet, as far as time allows; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so many minutes")
    parser.add_argument("--budget", choices=BUDGETS, help="default: paper where there is a GPU, cpu elsewhere")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--tunings", nargs="+", default=TUNINGS, choices=TUNINGS)
    parser.add_argument("--methods", nargs="+", default=OURS, choices=(*METHODS, *FIRST_ORDER))
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    import torch

    budget = options.budget or ("paper" if torch.cuda.is_available() else "cpu")
    recorded = Recorded(0 if options.table else options.minutes)
    for task in options.tasks:
        if task not in recorded.all["zero_shot"] and not recorded.is_over:
            zero_shot(task, recorded)
    places = [(u, t, m) for u in options.tunings for t in options.tasks for m in options.methods]
    for tuning, task, method in places:
        if recorded.is_over:
            break
        cell = Cell(task, tuning, method, budget)
        try:
            for words in runs_of(cell, recorded):
                recorded.save()
                print(f"{cell.key}: {words}", flush=True)
                if recorded.is_over:
                    break
        except subprocess.CalledProcessError as error:
            print(f"{cell.key}: the run failed with {error.returncode}; it is tried again next time", flush=True)
    print(table(recorded, budget))


if __name__ == "__main__":
    main()
