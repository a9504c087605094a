"""Check the claim of the quickstart for three seeds: ZO-SGD's accuracy and zero-shot, with the same prompt and rows.

    make bench-quickstart

This runs `zotune eval` once and `zotune train` with both built-in recipes for each seed, each command in a process of
its own, and records every result.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "speed"))
from record import write_result, zotune

RECIPES = {"zo_sgd": "sst2-smollm2", "fo_adam": "sst2-smollm2-fo"}


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    dtype = options.dtype
    zero_shot = zotune("eval", "--task", "sst2", "--dtype", dtype)
    print(f"zero-shot {100 * zero_shot['accuracy']:.1f} %", flush=True)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in RECIPES}
    with tempfile.TemporaryDirectory() as folder:
        for name, recipe in RECIPES.items():
            for seed in options.seeds:
                output = ("--output-dir", f"{folder}/{name}-{seed}", "--seed", str(seed), "--dtype", dtype)
                output += ("--reuse-folder", f"{folder}/activations")
                result = zotune("train", recipe, *output)
                gain = 100 * (result["test"]["accuracy"] - zero_shot["accuracy"])
                keys = ("test", "dev", "dev_before", "num_steps", "num_forwards", "seconds", "peak_memory", "num_tuned")
                runs[name].append({"seed": seed, **{key: result[key] for key in keys}})
                print(
                    f"{name} seed {seed}: {100 * result['test']['accuracy']:.1f} % ({gain:+.1f} points), "
                    f"{result['seconds']:.0f} s",
                    flush=True,
                )
    baseline = {key: zero_shot[key] for key in ("accuracy", "low", "high", "num_examples", "loss", "peak_memory")}
    measured = {"task": "sst2", "dtype": dtype, "recipes": RECIPES, "zero_shot": baseline, "runs": runs}
    write_result("quickstart", measured)


if __name__ == "__main__":
    main()
