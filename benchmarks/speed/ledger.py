"""What a ledger costs while a run writes it, and how much faster than the run it is replayed.

    python benchmarks/speed/ledger.py

SmolLM2-135M, full tuning, ZO-SGD, Rademacher. Steps are timed one by one, and within each the time spent in the
ledger (encoding, writing, syncing); then the ledger is replayed onto the base's weights, which must come out
with the same bits. Figures are medians over steps; the share is
total time in the ledger over total time. What replay does once, the check of the base's digests, is timed apart.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import zotune as zo
from zotune.ledger import LedgerWriter, read
from zotune.ledger.replay import check, header_of
from zotune.llm.config import ModelOptions
from zotune.llm.models import load

sys.path.insert(0, str(Path(__file__).parent))
from record import write_result
from step import objective


def measure(dtype: str, batch: int, length: int, num_steps: int, folder: Path) -> dict[str, Any]:
    """Seconds a step, in the ledger, and to replay."""
    lm = load(ModelOptions(dtype=dtype, device="cpu"))
    base = {name: p.detach().clone() for name, p in lm.module.named_parameters()}
    closure, opt = objective(lm, batch, length), zo.zo_sgd(lm.module, lr=1e-6)
    steps, in_ledger, replayed = [], [], []
    path = folder / f"{dtype}-{batch}-{length}.zol"
    with LedgerWriter.create(path, header_of(opt)) as writer:

        def record(taken: Any) -> None:
            began = time.perf_counter()
            writer.append(taken)
            in_ledger.append(time.perf_counter() - began)

        opt.on_step = record
        for _ in range(num_steps):
            began = time.perf_counter()
            opt.step(closure)
            steps.append(time.perf_counter() - began)
    tuned = {name: p.detach().clone() for name, p in lm.module.named_parameters()}
    with torch.no_grad():
        for name, p in lm.module.named_parameters():
            p.copy_(base[name])
    again = zo.zo_sgd(lm.module, lr=1e-6)
    ledger, began = read(path), time.perf_counter()
    check(again, ledger)
    checked = time.perf_counter() - began
    for taken in ledger:
        began = time.perf_counter()
        again.retake(taken)
        replayed.append(time.perf_counter() - began)
    assert all(torch.equal(p, tuned[name]) for name, p in lm.module.named_parameters())
    return {
        "step_seconds": statistics.median(steps),
        "ledger_share": sum(in_ledger) / sum(steps),
        "check_seconds": checked,
        "replay_seconds_a_step": statistics.median(replayed),
        "speed_up": statistics.median(steps) / statistics.median(replayed),
        "bytes": path.stat().st_size,
        "header_bytes": path.stat().st_size - 20 * num_steps,
    }


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    sides = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float32", "bfloat16"):
            for batch, length in ((4, 32), (16, 64)):
                found = measure(dtype, batch, length, args.steps, Path(folder))
                sides[f"{dtype} {batch}x{length}"] = found
                print(f"{dtype} {batch}x{length}", found)
    write_result("speed-ledger", {"steps": args.steps, "model": "smollm2-135m", "sides": sides})


if __name__ == "__main__":
    main()
