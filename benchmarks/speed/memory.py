"""Peak memory of zeroth-order training and of evaluation with the same batch, each in a process of its own.

    python benchmarks/speed/memory.py

The commands are those of a user: `zotune eval` and `zotune train` on batches of 16 SST-2 rows, with SmolLM2-135M and
with OPT-350M with random weights, also with 16 directions per step. The peak is the process's high-water mark of
resident memory, which includes loading, saving and Python.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from record import write_result, zotune

BATCH = 16
FULL, LORA = ("--tuning", "full"), ("--tuning", "lora", "--mu", "0.01")
# The measured cases by name: a model, a precision, and options of training.
SIDES = {
    **{
        f"smollm2-135m {dtype} {tuning[1]}": ("smollm2-135m", dtype, tuning)
        for dtype in ("float32", "bfloat16")
        for tuning in (FULL, LORA)
    },
    **{f"opt-350m {dtype} full": ("random:opt-350m", dtype, FULL) for dtype in ("float32", "bfloat16")},
    **{
        f"opt-350m {dtype} full, 16 directions": ("random:opt-350m", dtype, (*FULL, "--num-queries", "16"))
        for dtype in ("float32", "bfloat16")
    },
}


def peaks(model: str, dtype: str, options: tuple[str, ...], folder: Path) -> dict[str, float]:
    """Peak bytes of an evaluation and of a training run, and their ratio."""
    common = ("--task", "sst2", "--model", model, "--dtype", dtype, "--per-device-eval-batch-size", str(BATCH))
    evaluation = zotune("eval", *common, "--num-eval", "64")["peak_memory"]
    training = zotune(
        *("train", *common, "--num-eval", "64", "--num-dev", "0", "--num-train", "64", "--max-steps", "2", *options),
        *("--learning-rate", "1e-6", "--per-device-train-batch-size", str(BATCH)),
        *("--output-dir", str(folder), "--overwrite-output-dir"),
    )["peak_memory"]
    return {"eval_bytes": evaluation, "train_bytes": training, "ratio": training / evaluation}


def main() -> None:
    """Measure, print and record."""
    rows = {}
    for name, (model, dtype, options) in SIDES.items():
        with tempfile.TemporaryDirectory() as folder:
            found = rows[name] = peaks(model, dtype, options, Path(folder))
        mib = {k: v / 2**20 for k, v in found.items() if k != "ratio"}
        sizes = f"eval {mib['eval_bytes']:6.0f} MiB, zo_sgd {mib['train_bytes']:6.0f} MiB"
        print(f"{name:39} {sizes}: {found['ratio']:.3f} x", flush=True)
        write_result("speed-memory", {"batch": BATCH, "peaks": rows})


if __name__ == "__main__":
    main()
