"""The cost of writing a ledger during a run, and the speed and memory of replaying it.

    python benchmarks/speed/ledger.py
    python benchmarks/speed/ledger.py --only speed

Speed: SmolLM2-135M, full tuning, ZO-SGD, Rademacher. Each step is timed, and within it the time in the ledger
(encoding, writing, syncing). Then the ledger is replayed onto the base weights in two ways, both of which must
reproduce the run's weights bit by bit: tensor by tensor through all steps, as `zotune ledger replay` does, and step by
step over the whole model, as `--resume` does. Numbers of the run are medians over steps; numbers of replays are the
total time over the number of steps; the share is the total time in the ledger over the total time. The check of the
base's digests, which a replay does once, is timed separately.

Memory: OPT-350M's architecture with random float32 weights, 1.3 GB, in a folder. `zotune train` tunes all weights for
two steps and `zotune ledger replay` rebuilds them, each in a process of its own that reports its peak resident memory.
A model of 0.2 MB gives the peaks of Python and the libraries. The rebuilt weights must equal the run's to the byte.
"""

from __future__ import annotations

import argparse
import json
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
from zotune.ledger.stream import Trace
from zotune.llm.config.step import ModelOptions
from zotune.llm.models.load import load

sys.path.insert(0, str(Path(__file__).parent))
from record import write_result, zotune
from step import objective


def measure(dtype: str, batch: int, length: int, num_steps: int, folder: Path) -> dict[str, Any]:
    """Seconds of a step, of its time in the ledger, and of its replay."""
    lm = load(ModelOptions(dtype=dtype, device="cpu"))
    base = {name: p.detach().clone() for name, p in lm.module.named_parameters()}
    closure, opt = objective(lm, batch, length), zo.zo_sgd(lm.module, lr=1e-6)
    steps, in_ledger = [], []
    path = folder / f"{dtype}-{batch}-{length}.zol"
    with LedgerWriter.create(path, header_of(opt)) as writer:

        def record(step: Any) -> None:
            start = time.perf_counter()
            writer.append(step)
            in_ledger.append(time.perf_counter() - start)

        opt.on_step = record
        for _ in range(num_steps):
            start = time.perf_counter()
            opt.step(closure)
            steps.append(time.perf_counter() - start)
    tuned = {name: p.detach().clone() for name, p in lm.module.named_parameters()}
    with torch.no_grad():
        for name, p in lm.module.named_parameters():
            p.copy_(base[name])
    again = zo.zo_sgd(lm.module, lr=1e-6)
    ledger, start = read(path), time.perf_counter()
    check(again, ledger)
    check_seconds = time.perf_counter() - start
    start = time.perf_counter()
    for step in ledger:
        again.replay_step(step)
    resume_seconds = (time.perf_counter() - start) / num_steps
    assert all(torch.equal(p, tuned[name]) for name, p in lm.module.named_parameters())
    start = time.perf_counter()
    trace = Trace(zo.zo_sgd(lm.module, lr=1e-6), ledger)
    for name, x in base.items():
        trace.apply(name, x.view(-1))
    replay_seconds = (time.perf_counter() - start) / num_steps
    assert all(torch.equal(x, tuned[name]) for name, x in base.items())
    return {
        "step_seconds": statistics.median(steps),
        "ledger_share": sum(in_ledger) / sum(steps),
        "check_seconds": check_seconds,
        "replay_seconds_a_step": replay_seconds,
        "speed_up": statistics.median(steps) / replay_seconds,
        "resume_seconds_a_step": resume_seconds,
        "speed_up_of_resuming": statistics.median(steps) / resume_seconds,
        "bytes": path.stat().st_size,
        "header_bytes": path.stat().st_size - 20 * num_steps,
    }


def peaks(architecture: str, folder: Path) -> dict[str, Any]:
    """Bytes of a model's weights and of its largest tensor, and the peaks of a run and of its replay."""
    lm = load(ModelOptions(model=f"random:{architecture}", device="cpu"))
    sizes = [p.numel() * p.element_size() for p in lm.module.parameters()]
    lm.module.save_pretrained(folder / "base")
    lm.tokenizer.save_pretrained(folder / "base")
    del lm
    rows = [{"text": f"{word} film", "label": label} for word, label in (("good", "yes"), ("bad", "no"))] * 2
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run, again = folder / "run", folder / "again"
    trained = zotune(
        *("train", "--model", str(folder / "base"), "--train-file", str(folder / "rows.jsonl"), "--num-dev", "0"),
        *("--output-dir", str(run), "--max-steps", "2", "--learning-rate", "1e-4", "--device", "cpu"),
    )
    replayed = zotune("ledger", "replay", str(run), "--output-dir", str(again), "--device", "cpu")
    assert (run / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    return {
        "weights_bytes": sum(sizes),
        "largest_tensor_bytes": max(sizes),
        "train_peak_bytes": trained["peak_memory"],
        "replay_peak_bytes": replayed["peak_memory"],
    }


def memory() -> dict[str, Any]:
    """The peaks of a large model and of a tiny one, whose peaks are those of Python and the libraries."""
    found = {}
    for architecture in ("llama-tiny", "opt-350m"):
        with tempfile.TemporaryDirectory() as folder:
            found[architecture] = peaks(architecture, Path(folder))
    small, large = found["llama-tiny"], found["opt-350m"]
    above = large["replay_peak_bytes"] - small["replay_peak_bytes"]
    return {
        "dtype": "float32",
        "models": found,
        "replay_above_libraries_bytes": above,
        "replay_above_libraries_in_largest_tensors": above / large["largest_tensor_bytes"],
        "replay_peak_over_weights": large["replay_peak_bytes"] / large["weights_bytes"],
    }


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", choices=("speed", "memory"))
    args = parser.parse_args()
    if args.only != "speed":
        measured = memory()
        print(measured)
        write_result("ledger-memory", measured)
    if args.only == "memory":
        return
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
