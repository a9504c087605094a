"""The cost of a ZO-SGD step on a GPU: milliseconds, multiples of two forward passes and of the older loop, and memory.

    make bench-gpu, or: python benchmarks/speed/gpu.py

The sides are those of `step.py`, on OPT-1.3B and OPT-13B with random weights and 4 x 400 tokens; the time of a side
ends when the GPU has finished. `low_rank_step` uses directions of rank 1, `graphed_step` replays its probes as a CUDA
graph, `update` is the last part of the step alone, one pass over the weights. Memory is torch's peak of allocated
memory while a side runs, with the weights. A side that does not fit is recorded as null.

A small model on a CPU tests the command: `--device cpu --models opt-tiny --length 8`.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import zotune as zo
from zotune import noise
from zotune.estimate.cuda_graph import CUDAGraphDifference
from zotune.llm.config.run import EvalConfig
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.models.load import load

sys.path.insert(0, str(Path(__file__).parent))
from record import RESULTS, write_result
from step import LR, MU, in_place_loop, losses_of, median_seconds, objective, tokens_and_targets


def sides_of(lm: LanguageModel, batch: int, length: int) -> dict[str, Callable[[], object]]:
    """The timed functions by name."""
    f = objective(lm, batch, length)
    optimizer = zo.zo_sgd(lm.module, lr=LR, mu=MU)
    low_rank = zo.zo_sgd(lm.module, lr=LR, mu=MU, sampler=zo.low_rank(zo.gaussian))
    probe = CUDAGraphDifference(losses_of(lm, length), *tokens_and_targets(lm, batch, length), mu=MU)
    graphed = zo.ZerothOrder(lm.module, lr=LR, estimator=probe)
    estimate = optimizer.estimate(f)

    def two_forwards() -> None:
        with torch.no_grad():
            f(), f()

    return {
        "two_forwards": two_forwards,
        "zo_sgd_step": partial(optimizer.step, f),
        "low_rank_step": partial(low_rank.step, f),
        "graphed_step": lambda: graphed.step(probe.on(*tokens_and_targets(lm, batch, length))),
        "update": partial(optimizer.apply, estimate),
        # This side is last, because it moves all weights to new memory in every pass.
        "in_place_loop": partial(in_place_loop, lm.module, f),
    }


def measure(device: torch.device, run: Callable[[], object], rounds: int) -> dict[str, Any] | None:
    """Median and quartiles of a side's milliseconds, and its peak of allocated memory; None if it does not fit."""
    on_gpu = device.type == "cuda"
    settle = partial(torch.cuda.synchronize, device) if on_gpu else (lambda: None)
    if on_gpu:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        seconds = median_seconds({"side": run}, rounds, settle)["side"]
    except torch.OutOfMemoryError:
        return None
    low, middle, high = (1000 * s for s in statistics.quantiles(seconds, n=4))
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else None
    return {"ms": middle, "ms_quartiles": [low, high], "peak_allocated_bytes": peak}


def row_of(lm: LanguageModel, batch: int, length: int, rounds: int) -> dict[str, Any]:
    """All sides of one model, and the step's ratios to two forwards and to the loop."""
    found = {name: measure(lm.device, run, rounds) for name, run in sides_of(lm, batch, length).items()}
    others = {name: found[name] for name in ("two_forwards", "in_place_loop")}
    ratios = {
        f"{side}_to_{name}": step["ms"] / other["ms"]
        for side in ("zo_sgd_step", "low_rank_step", "graphed_step")
        for name, other in others.items()
        if (step := found[side]) and other
    }
    return {"sides": found, **ratios}


def line_of(name: str, row: dict[str, Any]) -> str:
    """Format a row as one line."""
    step = row["sides"]["zo_sgd_step"]
    if step is None:
        return f"{name}: a step does not fit"
    peak = step["peak_allocated_bytes"]
    memory = "" if peak is None else f", {peak / 2**30:.2f} GiB"
    loop = row.get("zo_sgd_step_to_in_place_loop")
    against = "the in-place loop does not fit" if loop is None else f"{loop:.2f} x the in-place loop"
    floor = row["zo_sgd_step_to_two_forwards"]
    return f"{name}: {step['ms']:.1f} ms a step, {floor:.2f} x two forwards, {against}{memory}"


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["opt-1.3b", "opt-13b"])
    parser.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16", "float32"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder of speed-gpu.json")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("torch finds no GPU (torch.cuda.is_available() is False); give --device cpu to test the command")
    rows = {}
    for model in options.models:
        for dtype in options.dtypes:
            with device:  # the GPU draws random weights in seconds, a CPU in minutes
                lm = load(EvalConfig(task="sst2", model=f"random:{model}", dtype=dtype, device=options.device))
            name = f"{model} {dtype} {options.batch}x{options.length}"
            rows[name] = row_of(lm, options.batch, options.length, options.rounds)
            print(line_of(name, rows[name]), flush=True)
            del lm
    about = {"tuning": "full", "rounds": options.rounds, "kernels": noise.back_end(device).name}
    write_result("speed-gpu", {**about, "rows": rows}, options.output)


if __name__ == "__main__":
    main()
