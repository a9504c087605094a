"""The cost of a forward gradient: peak memory relative to a forward pass, and time relative to two forward passes.

    python benchmarks/speed/forward_gradient.py

Memory: OPT-350M with random weights (full tuning, loss over every token of 2 x 128, float32), each case in a process of
its own; the peak is the process's high-water mark of resident memory, with and without that of loading. The cases are a
plain forward pass, a step of the forward gradient, and `torch.func.jvp`, which stores the whole direction. Time:
medians of one evaluation of the forward gradient and of two plain forward passes, in turn within one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import zotune as zo
from zotune import noise
from zotune.llm.config.step import ModelOptions
from zotune.llm.models.load import load
from zotune.system.peak_memory import peak_memory

sys.path.insert(0, str(Path(__file__).parent))
from record import write_result
from step import median_seconds

MEMORY_MODEL, MEMORY_SHAPE = "random:opt-350m", (2, 128)
TIME_MODELS, TIME_SHAPE = ("random:opt-125m", "smollm2-135m"), (16, 32)
SEED, LR = 7, 1e-6


def objective(name: str, batch: int, length: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A model in float32 and a closure that computes its causal language-modelling loss on random sequences."""
    model = load(ModelOptions(model=name, dtype="float32", device="cpu")).module
    ids = torch.randint(5, 1000, (batch, length), generator=torch.Generator().manual_seed(0))
    return model, lambda: model(input_ids=ids, labels=ids, use_cache=False).loss


def forward(model: nn.Module, loss: Callable[[], Tensor]) -> float:
    """One plain forward pass."""
    with torch.no_grad():
        return float(loss())


def streamed(model: nn.Module, loss: Callable[[], Tensor]) -> float:
    """Take one step of gradient descent along the forward gradient; return its coefficient."""
    optimizer = zo.ZerothOrder(model, LR, estimator=zo.forward_gradient, seed=SEED)
    estimate = optimizer.estimate(loss)
    optimizer.apply(estimate)
    return estimate.terms[0][0]


def all_tangents(model: nn.Module, loss: Callable[[], Tensor]) -> float:
    """Compute the coefficient along the same direction by `torch.func.jvp`."""
    (u,) = zo.ZerothOrder(model, LR, seed=SEED).directions()
    x = {name: p.detach() for name, p in model.named_parameters()}

    def f(x: dict[str, Tensor]) -> Tensor:
        by_place = {id(p): x[name] for name, p in model.named_parameters()}
        with _Replaced(by_place):
            return loss()

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        return float(torch.func.jvp(f, (x,), ({name: u.of(model, name) for name in x},))[1])


class _Replaced(torch.overrides.TorchFunctionMode):
    """A context that replaces parameters by tensors of a table, like a functional call for closures."""

    def __init__(self, by_id: dict[int, Tensor]) -> None:
        super().__init__()
        self._by_id = by_id

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def swap(t: Tensor) -> Tensor:
            return self._by_id.get(id(t), t)

        args, kwargs = torch.utils._pytree.tree_map_only(Tensor, swap, (args, kwargs or {}))
        return func(*args, **kwargs)


WAYS = {"forward": forward, "forward_gradient": streamed, "jvp": all_tangents}


def measure_peak(way: str) -> dict[str, float]:
    """Measure a case in this process: peak bytes while loading, after loading, and overall, with the case's result."""
    model, loss = objective(MEMORY_MODEL, *MEMORY_SHAPE)
    loading = peak_memory()
    # Resets the high-water mark to the present resident memory (Linux 4.0 and later).
    Path("/proc/self/clear_refs").write_text("5")
    result = WAYS[way](model, loss)
    running = peak_memory()
    return {"bytes": max(loading, running), "loading_bytes": loading, "running_bytes": running, "result": result}


def peaks() -> dict[str, Any]:
    """The peaks of the three cases, each in a fresh process."""
    found: dict[str, Any] = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--peak", way]
        row = found[way] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        row["ratio"] = row["bytes"] / found["forward"]["bytes"]
        row["running_ratio"] = row["running_bytes"] / found["forward"]["running_bytes"]
        print(
            f"{way:17} {row['bytes'] / 2**20:6.0f} MiB: {row['ratio']:.3f} x a forward pass, "
            f"{row['running_ratio']:.3f} x without the peak of loading",
            flush=True,
        )
    return found


def times(name: str, rounds: int) -> dict[str, Any]:
    """Median seconds of two forward passes and of one forward gradient, and their ratio."""
    model, loss = objective(name, *TIME_SHAPE)
    rows = {}
    for sampler in zo.SAMPLERS.values():
        optimizer = zo.ZerothOrder(model, LR, estimator=zo.forward_gradient, sampler=sampler, seed=SEED)
        sides = {
            "two_forwards": lambda: (forward(model, loss), forward(model, loss)),
            "forward_gradient": partial(optimizer.estimate, loss),
        }
        seconds = median_seconds(sides, rounds)
        plain = statistics.median(seconds["two_forwards"])
        low, middle, high = statistics.quantiles(seconds["forward_gradient"], n=4)
        rows[repr(sampler)] = {
            "two_forwards_seconds": plain,
            "forward_gradient_seconds": middle,
            "ratio": middle / plain,
            "ratio_quartiles": [low / plain, high / plain],
        }
        print(f"{name:17} {sampler!r:10} forward gradient {middle / plain:.2f} x two forwards", flush=True)
    return rows


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak is not None:
        print(json.dumps(measure_peak(options.peak)))
        return
    memory = {"model": MEMORY_MODEL, "batch_and_length": MEMORY_SHAPE, "peaks": peaks()}
    models = {name: times(name, options.rounds) for name in TIME_MODELS}
    common = {"dtype": "float32", "tuning": "full", "seed": SEED, "threads": torch.get_num_threads()}
    speed = {"batch_and_length": TIME_SHAPE, "rounds": options.rounds, "models": models}
    kernels = noise.back_end(torch.device("cpu")).name
    write_result("memory-forward-gradient", {**common, "kernels": kernels, "memory": memory, "speed": speed})


if __name__ == "__main__":
    main()
