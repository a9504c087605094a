"""The cost of a ZO-SGD step as a multiple of its two forward passes.

    python benchmarks/speed/step.py

Timed in turn within one process: two plain forward passes of an objective; a `zo_sgd` step with Rademacher and with
Gaussian directions; a step with the probes one by one, as for an objective that is a plain closure; a step with
directions of rank 1; and a step along the forward gradient. Then, in the same way, the forward passes and the in-place
loop of older codes (all weights moved by +μu, -2μu, +μu with `torch.normal` from a stored seed, then updated); and the
step of a LoRA adapter over two forward passes of the model with the adapter. Numbers are ratios of medians; the spread
is the quartiles of the step's times over the median of the forward passes. As in `zotune train`, the C library keeps
freed memory, for all sides.
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
from zotune.estimate.objective import Batched
from zotune.llm.config.run import EvalConfig, TrainConfig
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.models.load import load
from zotune.llm.models.tuned_parameters import prepare_tuning
from zotune.system.malloc import OWN_PAGES_OF_PASSES, tune_malloc

sys.path.insert(0, str(Path(__file__).parent))
from record import write_result

LR, MU = 1e-6, 1e-3


def tokens_and_targets(lm: LanguageModel, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random sequences of shape (batch, length), and a target token for each, of shape (batch,)."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = lm.config.vocab_size
    tokens = torch.randint(0, vocabulary, (batch, length), generator=generator).to(lm.device)
    return tokens, torch.randint(0, vocabulary, (batch,), generator=generator).to(lm.device)


def objective(lm: LanguageModel, batch: int, length: int) -> Batched:
    """The mean of `losses_of` over random sequences."""
    return zo.batched(losses_of(lm, length), *tokens_and_targets(lm, batch, length))


def losses_of(lm: LanguageModel, length: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A function from sequences and targets to the cross-entropy of the targets; the head runs at the last position."""
    # A tensor, not an int: an int makes a slice, for which torch copies a frozen head's weights for each sequence.
    last = torch.tensor([length - 1], device=lm.device)

    def losses(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = lm.module(input_ids=tokens, use_cache=False, logits_to_keep=last).logits
        return F.cross_entropy(logits[:, -1].float(), targets, reduction="none")

    return losses


def in_place_loop(model: torch.nn.Module, f: Callable[[], torch.Tensor]) -> None:
    """A step as in older codes: the weights themselves move to +μ, to -μ, back, and along the update."""
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
            start = time.perf_counter()
            run()
            settle()
            times[name].append(time.perf_counter() - start)
    return {name: seconds[2:] for name, seconds in times.items()}


def two_forwards(f: Callable[[], torch.Tensor]) -> None:
    """Two forward passes, the least work of a two-point step."""
    with torch.no_grad():
        f(), f()


def measure(lm: LanguageModel, batch: int, length: int, rounds: int, *, older: bool = True) -> dict[str, Any]:
    """Median seconds of each side and their ratios to two forward passes; `older` adds the loop of older codes."""
    f = objective(lm, batch, length)
    samplers = (zo.rademacher, zo.rademacher, zo.gaussian, zo.low_rank(zo.rademacher), zo.low_rank(zo.gaussian))
    rademacher, alone, gaussian, low_rank, low_rank_gaussian = (
        zo.zo_sgd(lm.module, lr=LR, mu=MU, sampler=sampler) for sampler in samplers
    )
    forward = zo.forward_grad(lm.module, lr=LR)

    sides: dict[str, Callable[[], object]] = {
        "forwards": lambda: two_forwards(f),
        "zo_sgd": lambda: rademacher.step(f),
        "one_by_one": lambda: alone.step(lambda: f()),
        "gaussian": lambda: gaussian.step(f),
        "low_rank": lambda: low_rank.step(f),
        "low_rank_gaussian": lambda: low_rank_gaussian.step(f),
        "forward_grad": lambda: forward.step(f),
    }
    found = ratios(median_seconds(sides, rounds))
    found["forward_grad_to_zo_sgd"] = found["forward_grad_step_seconds"] / found["zo_sgd_step_seconds"]
    if older:
        # Timed separately, because the in-place loop moves all weights to new memory in every pass.
        sides = {"forwards": sides["forwards"], "loop": lambda: in_place_loop(lm.module, f)}
        times = median_seconds(sides, max(rounds // 2, 3))
        found["in_place_loop_ratio"] = statistics.median(times["loop"]) / statistics.median(times["forwards"])
    return found


def measure_lora(lm: LanguageModel, batch: int, length: int, rounds: int) -> dict[str, Any]:
    """Median seconds and the ratio of a step of a LoRA adapter."""
    prepare_tuning(lm, TrainConfig(task="sst2", tuning="lora"))
    f = objective(lm, batch, length)
    optimizer = zo.zo_sgd(lm.module, lr=LR, mu=MU)

    found = ratios(median_seconds({"forwards": lambda: two_forwards(f), "lora": lambda: optimizer.step(f)}, rounds))
    return {"lora_two_forwards_seconds": found.pop("two_forwards_seconds"), **found}


def ratios(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """The ratios of each side's seconds to the median of the forward passes."""
    forwards = statistics.median(seconds.pop("forwards"))
    found: dict[str, Any] = {"two_forwards_seconds": forwards}
    for side, times in seconds.items():
        low, middle, high = statistics.quantiles(times, n=4)
        found |= {f"{side}_step_seconds": middle, f"{side}_step_ratio": middle / forwards}
        found[f"{side}_step_ratio_quartiles"] = [low / forwards, high / forwards]
    return found


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "random:opt-125m"])
    options = parser.parse_args()
    tune_malloc(OWN_PAGES_OF_PASSES)
    sides: dict[str, dict[str, Any]] = {}
    about = {"tuning": "full", "rounds": options.rounds, "kernels": noise.back_end(torch.device("cpu")).name}
    for model in options.models:
        for dtype in options.dtypes:
            for batch, length in ((4, 32), (16, 32), (16, 64)):
                config = EvalConfig(task="sst2", model=model, dtype=dtype)
                found = measure(load(config), batch, length, options.rounds)
                found |= measure_lora(load(config), batch, length, options.rounds)
                sides.setdefault(model, {})[f"{dtype} {batch}x{length}"] = found
                figures = {k.removesuffix("_ratio"): f"{v:.2f} x" for k, v in found.items() if k.endswith("ratio")}
                print(f"{model} {dtype:9} {batch:2} x {length}: {figures}", flush=True)
                write_result("speed-step", {**about, "models": sides})


if __name__ == "__main__":
    main()
