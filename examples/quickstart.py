"""Fine-tune a real language model with forward passes only, end to end, and compare it with a first-order baseline.

    make quickstart

runs three commands and prints one table. Each command is a process of its own, as if you had typed it, so the
peak memory in the table is the memory of that command alone:

    zotune eval  --task sst2                          accuracy before tuning
    zotune train sst2-smollm2                         ZO-SGD: forward passes only
    zotune train sst2-smollm2-fo                      the same tuning by Adam and back-propagation

Both runs share the activations below the tuned norm, in a folder beside theirs.
The rows come from SST-2: 1,000 for training, 500 held out, and all 872 public validation rows for the results.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

TRAIN, BASELINE = "sst2-smollm2", "sst2-smollm2-fo"


def zotune(*args: str) -> dict[str, Any]:
    """Run a zotune command, show its progress, and return its JSON result."""
    command = [sys.executable, "-m", "zotune", *args, "--json"]
    Console(stderr=True).print(f"\n$ zotune {' '.join(args)}", style="bold", highlight=False)
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if process.returncode != 0:
        sys.exit(process.returncode)
    result: dict[str, Any] = json.loads(process.stdout)
    return result


def row(name: str, test: dict[str, Any], seconds: float, forwards: int | None, peak: int) -> tuple[str, ...]:
    """Return a line of the table."""
    return (
        name,
        f"{100 * test['accuracy']:.1f} %",
        f"{100 * test['low']:.1f} to {100 * test['high']:.1f}",
        f"{seconds:.0f}",
        "–" if forwards is None else f"{forwards:,}",
        f"{peak / 2**20:.0f}",
    )


def main() -> None:
    """Run the three commands and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="seed of the directions and of the order of batches")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/quickstart"))
    options = parser.parse_args()
    start = time.perf_counter()

    zero_shot = zotune("eval", "--task", "sst2", "--dtype", "float32")
    results = {
        method: zotune(
            "train",
            recipe,
            *("--seed", str(options.seed)),
            *("--reuse-folder", str(options.output_dir / "activations")),
            *("--output-dir", str(options.output_dir / method), "--overwrite-output-dir"),
        )
        for method, recipe in (("ZO-SGD", TRAIN), ("Adam (first-order)", BASELINE))
    }

    table = Table(title="SmolLM2-135M-Instruct on SST-2, 872 validation rows")
    for column in ("", "accuracy", "95 % interval", "training seconds", "forward passes", "peak MiB"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row(*row("zero-shot", zero_shot, 0, None, zero_shot["peak_memory"]))
    for method, result in results.items():
        peak = result["peak_memory"]
        table.add_row(*row(method, result["test"], result["seconds"], result["num_forwards"], peak))
    console = Console(highlight=False) if sys.stdout.isatty() else Console(width=120, highlight=False)
    console.print()
    console.print(table)
    gain = 100 * (results["ZO-SGD"]["test"]["accuracy"] - zero_shot["accuracy"])
    console.print(f"ZO-SGD: {gain:+.1f} points over zero-shot, {time.perf_counter() - start:.0f} s in all.")
    console.print(f"The tuned models are in {options.output_dir}/. Try it on your own rows:\n")
    console.print("    source .venv/bin/activate")
    console.print("    zotune train sst2-smollm2 --train-file my.jsonl --text-column text --label-column label")


if __name__ == "__main__":
    # Ctrl-C also reaches the running command, which saves its results and ends; its exit code then ends this script.
    signal.signal(signal.SIGINT, lambda *_: None)
    main()
