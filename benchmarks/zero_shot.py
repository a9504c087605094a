"""Accuracy of the untuned built-in model and of the majority class on all evaluation rows of four tasks.

    make bench-zero-shot

These accuracies are the baseline for tuned models, which `zotune bench run tasks` measures.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "speed"))
from record import write_result, zotune

MODEL = "smollm2-135m"
TASKS = ("sst2", "rte", "copa", "winogrande")


def main() -> None:
    """Evaluate, print and record."""
    found = {}
    for task in TASKS:
        result = zotune("eval", "--task", task, "--model", MODEL, "--dtype", "bfloat16", "--baselines")
        keys = ("accuracy", "low", "high", "num_examples", "loss", "seconds", "peak_memory")
        found[task] = {**{key: result[key] for key in keys}, "majority": result["baselines"]["majority"]}
        print(f"{task}: {100 * result['accuracy']:.1f} %", flush=True)
    write_result("zero-shot", {"model": MODEL, "dtype": "bfloat16", "tasks": found})


if __name__ == "__main__":
    main()
