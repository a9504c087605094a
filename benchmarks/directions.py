"""A step with one direction an example beside the step with one direction: time in one process, memory in others.

    LoRA, rank one           directions b aᵀ of the adapter's matrices
    all weights, flipped     directions U ⊙ (r sᵀ) of all matrices

    python benchmarks/directions.py           # both, on SmolLM2-135M with 16 rows of 64 tokens; six minutes on one core
    python benchmarks/directions.py --profile flipped  # where a step's time goes, without a result

Steps of the two kinds alternate in one thread, whose seconds on the processor count: what else the machine does meets
both. The ratio is the median over pairs of
neighbours, its interval that of the median (95 %, by order statistics). No GPU, no network.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "directions.json"
SHAPE = {"model": "smollm2-135m", "dtype": "float32", "per_device_train_batch_size": 16, "length": 64, "device": "cpu"}
# By name: what both tune, what the step with a direction an example has beside, and the bar.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "rank one": ({"tuning": "lora"}, {"rank": 1}, 1.15),
    "flipped": ({"tuning": "full"}, {"flipped": True}, 2.2),
}
PAIRS, WARM_UP = 9, 1


def step_of(options: dict[str, Any]) -> Callable[[], float]:
    """Load the model; return a function that takes one step and returns its loss."""
    from zotune.llm.models.load import load
    from zotune.llm.models.tuned_parameters import prepare_tuning
    from zotune.llm.scoring.closures import candidate_loss, candidate_loss_per_example
    from zotune.llm.scoring.objectives import OBJECTIVES
    from zotune.llm.training.optimizers import make_optimizer
    from zotune.plan.workload import Workload, synthetic_examples
    from zotune.system.malloc import keep_activations

    made = Workload(**options, learning_rate=1e-7)
    lm = load(made, seed=0)
    prepare_tuning(lm, made)
    keep_activations()
    closure_of = candidate_loss_per_example if made.reads_examples else candidate_loss
    closure = closure_of(lm, OBJECTIVES[made.objective], lm.score, synthetic_examples(made, lm), 0, ())
    return partial(make_optimizer(lm.module, made, 0).step, closure)


def options_of(case: str, *, per_example: bool) -> dict[str, Any]:
    """The options of a workload of a case, with one direction or with one an example."""
    tuning, kind, _ = CASES[case]
    many = {"directions_per_batch": SHAPE["per_device_train_batch_size"], **kind}
    return {**SHAPE, **tuning, **(many if per_example else {})}


def seconds_of(step: Callable[[], float]) -> float:
    """The processor's seconds for one step, in one thread."""
    start = time.process_time()
    step()
    return time.process_time() - start


def times(case: str) -> dict[str, Any]:
    """Seconds of alternating steps, their medians, and the median of their ratios with its interval."""
    one, many = (step_of(options_of(case, per_example=kind)) for kind in (False, True))
    for _ in range(WARM_UP):
        one(), many()
    pairs = [(seconds_of(one), seconds_of(many)) for _ in range(PAIRS)]
    ratios = sorted(b / a for a, b in pairs)
    low, high = ratios[1], ratios[-2]  # of 9: the binomial probability of leaving the median out is 3.9 %
    return {
        "seconds_one": statistics.median(a for a, _ in pairs),
        "seconds_per_example": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "interval": [low, high],
        "pairs": pairs,
    }


def memory(case: str) -> dict[str, int]:
    """Peak bytes of a process during three steps, with one direction and with one an example."""
    found = {}
    for name, kind in (("bytes_one", False), ("bytes_per_example", True)):
        call = [sys.executable, __file__, "--peak-of", case, *(["--per-example"] if kind else [])]
        found[name] = int(subprocess.run(call, check=True, capture_output=True, text=True).stdout.split()[-1])
    return found


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--peak-of", choices=CASES)
    parser.add_argument("--per-example", action="store_true")
    parser.add_argument("--profile", choices=CASES)
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    if given.peak_of:
        from zotune.system.peak_memory import forget_peak, peak_memory

        step = step_of(options_of(given.peak_of, per_example=given.per_example))
        # Loading has a peak of its own, and a process's maximum begins with that of the process which started it.
        forget_peak()
        for _ in range(3):
            step()
        print(peak_memory(torch.device("cpu")))
        return
    if given.profile:
        step = step_of(options_of(given.profile, per_example=True))
        step()
        with torch.profiler.profile() as seen:
            step()
        print(seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60))
        return
    cases = {case: {**times(case), **memory(case), "bar": CASES[case][2]} for case in CASES}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    about = {
        "config": SHAPE,
        "seeds": [0],
        "commit": commit,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "device": f"{platform.machine()}, one thread",
        "budget": f"{WARM_UP} steps of each to warm up, {PAIRS} pairs",
    }
    RESULTS.write_text(json.dumps({**about, "cases": cases}, indent=1) + "\n", encoding="utf-8")
    for case, found in cases.items():
        print(f"{case}: {found['ratio']:.2f} ({found['interval'][0]:.2f} to {found['interval'][1]:.2f})")


if __name__ == "__main__":
    main()
