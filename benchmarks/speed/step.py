"""What a ZO-SGD step costs, as a multiple of its two forward passes.

    python benchmarks/speed/step.py

Two plain forward passes of the objective and one `zo_sgd` step (full tuning, Rademacher) are timed in
turn within one process; then, likewise, the forwards and a loop as the older codes write it (all
weights moved by +μu, -2μu, +μu with `torch.normal` from a stored seed, then updated). Figures are
ratios of medians; the spread is the quartiles of the step's times over the forwards' median.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import zotune as zo
from zotune import noise
from zotune.closures import Batched
from zotune.llm.config import EvalConfig
from zotune.llm.models import LanguageModel, load

sys.path.insert(0, str(Path(__file__).parent))
from record import write_result

LR, MU = 1e-6, 1e-3


def objective(lm: LanguageModel, batch: int, length: int) -> Batched:
    """Cross-entropy of the last token of random sequences; the head at the last position only."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = lm.config.vocab_size
    tokens = torch.randint(0, vocabulary, (batch, length), generator=generator).to(lm.device)
    targets = torch.randint(0, vocabulary, (batch,), generator=generator).to(lm.device)

    def losses(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = lm.module(input_ids=tokens, use_cache=False, logits_to_keep=1).logits
        return F.cross_entropy(logits[:, -1].float(), targets, reduction="none")

    return zo.batched(losses, tokens, targets)


def in_place_loop(model: torch.nn.Module, f: Callable[[], torch.Tensor]) -> None:
    """A step as the older codes write it: the weights themselves walk to +μ, -μ, back, and down."""
    parameters = list(model.parameters())
    device = parameters[0].device
    generator = torch.Generator(device)

    def move(a: float) -> None:
        generator.manual_seed(1)
        for p in parameters:
            u = torch.normal(0.0, 1.0, size=p.shape, dtype=p.dtype, device=device, generator=generator)
            p.data = p.data + a * u

    with torch.no_grad():
        move(MU)
        plus = float(f())
        move(-2 * MU)
        minus = float(f())
        move(MU)
        move(-LR * (plus - minus) / (2 * MU))


def median_seconds(
    sides: dict[str, Callable[[], object]], rounds: int, settle: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each side, run in turn; the first two rounds are not counted. `settle` waits for the device."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 2):
        for name, run in sides.items():
            settle()
            began = time.perf_counter()
            run()
            settle()
            times[name].append(time.perf_counter() - began)
    return {name: seconds[2:] for name, seconds in times.items()}


def measure(lm: LanguageModel, batch: int, length: int, rounds: int) -> dict[str, Any]:
    """Median seconds of each side, and their ratios to the two forwards of the same phase."""
    f = objective(lm, batch, length)
    optimizer = zo.zo_sgd(lm.module, lr=LR, mu=MU)

    def two_forwards() -> None:
        with torch.no_grad():
            f(), f()

    # Apart, for the in-place loop moves all weights to new memory in every pass.
    ours = median_seconds({"forwards": two_forwards, "step": lambda: optimizer.step(f)}, rounds)
    older = median_seconds({"forwards": two_forwards, "loop": lambda: in_place_loop(lm.module, f)}, max(rounds // 2, 3))
    forwards = statistics.median(ours["forwards"])
    low, middle, high = statistics.quantiles(ours["step"], n=4)
    return {
        "two_forwards_seconds": forwards,
        "zo_sgd_step_seconds": middle,
        "zo_sgd_step_ratio": middle / forwards,
        "zo_sgd_step_ratio_quartiles": [low / forwards, high / forwards],
        "in_place_loop_ratio": statistics.median(older["loop"]) / statistics.median(older["forwards"]),
    }


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args()
    rows = {}
    for dtype in options.dtypes:
        for batch, length in ((4, 32), (16, 32), (16, 64)):
            lm = load(EvalConfig(task="sst2", model="smollm2-135m", dtype=dtype))
            found = rows[f"{dtype} {batch}x{length}"] = measure(lm, batch, length, options.rounds)
            print(
                f"{dtype:9} {batch:2} x {length}: two forwards {found['two_forwards_seconds']:.3f} s, "
                f"zo_sgd {found['zo_sgd_step_ratio']:.2f} x, in-place loop {found['in_place_loop_ratio']:.2f} x",
                flush=True,
            )
    write_result(
        "speed-step",
        {
            "model": "smollm2-135m",
            "tuning": "full",
            "rounds": options.rounds,
            "kernels": noise._cpu().__name__,
            "sides": rows,
        },
    )


if __name__ == "__main__":
    main()
