"""The growth of the time of a ZO-SGD step with tokens and with parameters, each over a factor of eight, with a plot.

    python benchmarks/speed/growth.py

Tokens: the built-in model with 4 to 32 sequences of 32 tokens. Parameters: models of the LLaMA architecture with random
weights and 1 to 8 times as many equal layers, with 16 sequences. Full tuning in float32 is timed beside two plain
forward passes, all sizes in turn within one process; numbers are medians. The slope is that of a straight line through
the logarithms: 1 means linear growth, less means a fixed cost that small sizes pay.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import zotune as zo
from zotune.llm.config.run import EvalConfig
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.models.load import load
from zotune.llm.models.random_models import byte_tokenizer
from zotune.system.malloc import OWN_PAGES_OF_PASSES, tune_malloc

sys.path.insert(0, str(Path(__file__).parent))
from record import RESULTS, write_result
from step import LR, MU, median_seconds, objective, two_forwards

LENGTH = 32
BATCHES = (4, 8, 16, 32)
LAYERS = (3, 6, 12, 24)
WIDTH = 768


def llama(num_layers: int) -> LanguageModel:
    """A model of the LLaMA architecture with random weights; its vocabulary is small, so that the layers dominate."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=num_layers,
        num_attention_heads=WIDTH // 64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LanguageModel(LlamaForCausalLM(config).eval(), byte_tokenizer(config), f"llama-{num_layers}", False)


def seconds(models: dict[int, LanguageModel], batches: dict[int, int], rounds: int) -> dict[int, dict[str, float]]:
    """The median seconds of a step and of two forward passes for each size."""
    sides = {}
    for size, lm in models.items():
        f = objective(lm, batches[size], LENGTH)
        sides[f"{size} step"] = partial(zo.zo_sgd(lm.module, lr=LR, mu=MU).step, f)
        sides[f"{size} forwards"] = partial(two_forwards, f)
    medians = {name: statistics.median(times) for name, times in median_seconds(sides, rounds).items()}
    return {size: {kind: medians[f"{size} {kind}"] for kind in ("step", "forwards")} for size in models}


def slope(sizes: Sequence[float], times: Sequence[float]) -> float:
    """The slope of the least-squares line through the logarithms.

    >>> round(slope([1, 2, 4, 8], [3.0, 6.0, 12.0, 24.0]), 6)
    1.0
    """
    x, y = [math.log(v) for v in sizes], [math.log(v) for v in times]
    return statistics.linear_regression(x, y).slope


def plot(growth: dict[str, Any], path: Path) -> None:
    """Plot seconds over size on logarithmic axes, with a line of linear growth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, (name, found) in zip(figure.subplots(1, 2), growth.items(), strict=True):
        sizes = [float(s) for s in found["seconds"]]
        for kind, colour, marker in (("step", "#0072b2", "o"), ("forwards", "#d55e00", "s")):
            times = [v[kind] for v in found["seconds"].values()]
            label = "ZO-SGD step" if kind == "step" else "two forward passes"
            axes.loglog(sizes, times, color=colour, marker=marker, label=f"{label}, slope {found['slope'][kind]:.2f}")
        last = found["seconds"][next(reversed(found["seconds"]))]["step"]
        axes.loglog(sizes, [last * s / sizes[-1] for s in sizes], color="0.5", linestyle=":", label="linear")
        axes.set(xlabel=name, ylabel="seconds")
        axes.set_xticks(sizes, [f"{s / 1e6:.0f} M" if s >= 1e6 else f"{s:.0f}" for s in sizes])
        low, high = axes.get_ylim()
        seconds_ = [2.0**i for i in range(-8, 8) if low <= 2.0**i <= high]
        axes.set_yticks(seconds_, [f"{s:g}" for s in seconds_])
        axes.minorticks_off()
        axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    """Measure, print, plot and record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    tune_malloc(OWN_PAGES_OF_PASSES)
    lm = load(EvalConfig(task="sst2", dtype="float32"))
    by_tokens = seconds(
        dict.fromkeys((b * LENGTH for b in BATCHES), lm), {b * LENGTH: b for b in BATCHES}, options.rounds
    )
    models = {m.module.num_parameters(): m for m in map(llama, LAYERS)}
    by_size = seconds(models, dict.fromkeys(models, 16), options.rounds)
    growth: dict[str, Any] = {}
    for name, found in (("tokens a step", by_tokens), ("parameters", by_size)):
        slopes = {kind: slope(list(found), [v[kind] for v in found.values()]) for kind in ("step", "forwards")}
        growth[name] = {"seconds": {str(size): v for size, v in found.items()}, "slope": slopes}
        print(f"{name}: slope {slopes['step']:.2f} of a step, {slopes['forwards']:.2f} of two forward passes")
    write_result("speed-growth", {"rounds": options.rounds, "growth": growth})
    plot(growth, RESULTS / "speed-growth.svg")


if __name__ == "__main__":
    main()
