"""The cost of block-wise estimation with cached activations, and the memory of hybrid tuning by its depth.

    python benchmarks/speed/enhancements.py

Blocks: a step of `zo_sgd` with one block per layer (SmolLM2-135M, full tuning), as a multiple of one plain forward
pass, with and without `reuse_prefix`; timed in turn within one process, as ratios of medians.
Hybrid (as in the paper's Table 7): the peak memory of `zotune train` for OPT-125M with random weights, where the first
k of its 12 layers use forward passes only.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import zotune as zo
from zotune.llm.config.run import EvalConfig
from zotune.llm.models.load import load

sys.path.insert(0, str(Path(__file__).parent))
from record import write_result, zotune
from step import LR, median_seconds, objective

BATCH, LENGTH, ROUNDS = 16, 32, 5
HYBRID_BATCH, DEPTHS = 16, (0, 3, 6, 9, 12)


def blocks() -> dict[str, Any]:
    """Seconds of a block-wise step with and without cached activations, also as multiples of a forward pass."""
    lm = load(EvalConfig.model_validate({"task": "sst2", "dtype": "float32"}))
    f = objective(lm, BATCH, LENGTH)
    cut = zo.blocks_by_layer(lm.module)
    steps = {reuse: zo.zo_sgd(lm.module, lr=LR, blocks=cut, reuse_prefix=reuse) for reuse in (True, False)}

    def forward() -> None:
        with torch.no_grad():
            f()

    times = median_seconds(
        {"forward": forward, "reused": lambda: steps[True].step(f), "plain": lambda: steps[False].step(f)}, ROUNDS
    )
    seconds = {name: statistics.median(t) for name, t in times.items()}
    found = {
        "num_blocks": len(cut),
        "seconds": seconds,
        "forwards_reused": seconds["reused"] / seconds["forward"],
        "forwards_plain": seconds["plain"] / seconds["forward"],
        "ratio": seconds["reused"] / seconds["plain"],
    }
    print(
        f"{len(cut)} blocks: a step costs {found['forwards_reused']:.1f} forward passes, "
        f"{found['forwards_plain']:.1f} without reuse: {found['ratio']:.3f} x",
        flush=True,
    )
    return found


def hybrid(folder: str) -> dict[str, int]:
    """Peak bytes by the number of layers that use forward passes only."""
    peaks = {}
    for k in DEPTHS:
        peaks[str(k)] = zotune(
            *("train", "--model", "random:opt-125m", "--task", "sst2", "--num-eval", "8", "--num-dev", "0"),
            *("--num-train", "64", "--max-steps", "2", "--per-device-train-batch-size", str(HYBRID_BATCH)),
            *("--per-device-eval-batch-size", "8", "--learning-rate", "1e-6", "--method", "zo_sgd"),
            *("--hybrid-layers", str(k), "--hybrid-tied", "zeroth_order", "--hybrid-learning-rate", "1e-4"),
            *("--output-dir", f"{folder}/{k}"),
        )["peak_memory"]
        print(f"hybrid, first {k:2} layers by forward passes: peak {peaks[str(k)] / 2**20:.0f} MiB", flush=True)
    return peaks


def main() -> None:
    """Measure, print and record."""
    with tempfile.TemporaryDirectory() as folder:
        peaks = hybrid(folder)
    write_result(
        "speed-enhancements",
        {
            "blocks": {"model": "smollm2-135m", "dtype": "float32", "batch": BATCH, "length": LENGTH, **blocks()},
            "hybrid": {"model": "random:opt-125m", "task": "sst2", "batch": HYBRID_BATCH, "peak_bytes": peaks},
        },
    )


if __name__ == "__main__":
    main()
