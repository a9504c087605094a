"""Peak memory of zeroth-order training against evaluation with the same batch, each a process of its own.

    python benchmarks/speed/memory.py

Both run the command a user would: `zotune eval` and `zotune train --tuning full` on SmolLM2-135M and
SST-2 rows, 16 at a time. The peak is the process's high-water mark of resident memory, loading, saving
and Python included.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from record import write_result, zotune

BATCH = 16


def peaks(dtype: str, tuning: tuple[str, ...], folder: Path) -> dict[str, float]:
    """Peak bytes of an evaluation and of a training run, and their ratio."""
    common = ("--task", "sst2", "--dtype", dtype, "--num-eval", "64", "--per-device-eval-batch-size", str(BATCH))
    evaluation = zotune("eval", *common)["peak_memory"]
    training = zotune(
        *("train", *common, "--num-dev", "0", "--num-train", "64", "--max-steps", "4", *tuning),
        *("--learning-rate", "1e-6", "--per-device-train-batch-size", str(BATCH)),
        *("--output-dir", str(folder / f"{dtype}-{len(tuning)}"), "--overwrite-output-dir"),
    )["peak_memory"]
    return {"eval_bytes": evaluation, "train_bytes": training, "ratio": training / evaluation}


def main() -> None:
    """Measure, print and record."""
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float32", "bfloat16"):
            for name, tuning in (("full", ("--tuning", "full")), ("lora", ("--tuning", "lora", "--mu", "0.01"))):
                found = rows[f"{dtype} {name}"] = peaks(dtype, tuning, Path(folder))
                mib = {k: v / 2**20 for k, v in found.items() if k != "ratio"}
                print(
                    f"{dtype:9} {name:5} eval {mib['eval_bytes']:6.0f} MiB, zo_sgd {mib['train_bytes']:6.0f} MiB: "
                    f"{found['ratio']:.3f} x",
                    flush=True,
                )
    write_result("speed-memory", {"model": "smollm2-135m", "batch": BATCH, "peaks": rows})


if __name__ == "__main__":
    main()
