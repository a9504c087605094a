"""The time of a ZO-SGD step compared with other packages and with the loop of older codes.

    pip install torchzero==0.4.4 && pip install --no-deps eggroll-es==0.2.0
    python benchmarks/speed/peers.py

All packages tune every weight of one model for the same objective and batch, in one process, in turn. A step is two
evaluations and an update: a central difference (zotune, torchzero's MeZO), or a mirrored pair (eggroll-es, rank 1).
The older loop is MeZO's as it was published: float32, weights perturbed in place with `torch.normal` four times per
step, logits of every position over the whole vocabulary, and a key/value cache that is not used. It is compared with
zotune's step in float32 and in bfloat16. A package that is not installed is left out; its version is then null. Numbers
are medians and ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import zotune as zo
from zotune.llm.config.run import EvalConfig
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.models.load import load
from zotune.system.malloc import OWN_PAGES_OF_PASSES, tune_malloc

sys.path.insert(0, str(Path(__file__).parent))
from record import write_result
from step import LR, MU, in_place_loop, median_seconds, objective, tokens_and_targets, two_forwards

Step = Callable[[], object]


def torchzero_step(lm: LanguageModel, f: Callable[[], torch.Tensor]) -> Step:
    """A step of torchzero's MeZO."""
    import torchzero as tz

    optimizer = tz.Optimizer(lm.module.parameters(), tz.m.MeZO(h=MU), tz.m.LR(LR))

    def closure(backward: bool = True) -> torch.Tensor:
        with torch.no_grad():
            return f()

    return lambda: optimizer.step(closure)


def eggroll_step(lm: LanguageModel, f: Callable[[], torch.Tensor]) -> Step:
    """A generation of eggroll-es with one mirrored pair."""
    from eggroll import EggrollConfig, EggrollTrainer

    config = EggrollConfig(population_size=1, rank=1, sigma=MU, lr=LR, generations=1, device="cpu")

    def quietly() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            EggrollTrainer(lm.module, config, lambda model, batch: -float(f())).evolve([None])

    return quietly


PEERS = {"torchzero": torchzero_step, "eggroll-es": eggroll_step}


def as_published(lm: LanguageModel, batch: int, length: int) -> Callable[[], torch.Tensor]:
    """The same loss with the logits of all positions and a key/value cache."""
    tokens, targets = tokens_and_targets(lm, batch, length)
    return lambda: F.cross_entropy(lm.module(input_ids=tokens, use_cache=True).logits[:, -1].float(), targets)


def installed(name: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def measure(model: str, dtype: str, batch: int, length: int, rounds: int) -> dict[str, Any]:
    """Median seconds of two forward passes, of our step, and of the step of each other package."""
    lm = load(EvalConfig(task="sst2", model=model, dtype=dtype))
    f = objective(lm, batch, length)
    low_rank = zo.zo_sgd(lm.module, lr=LR, mu=MU, sampler=zo.low_rank(zo.rademacher, rank=1))
    sides: dict[str, Step] = {
        "two forwards": partial(two_forwards, f),
        "zotune": partial(zo.zo_sgd(lm.module, lr=LR, mu=MU).step, f),
        "zotune, rank 1": partial(low_rank.step, f),
    }
    sides |= {name: make(lm, f) for name, make in PEERS.items() if installed(name)}
    if dtype == "float32":
        sides["loop as published"] = partial(in_place_loop, lm.module, as_published(lm, batch, length))
    return {name: statistics.median(times) for name, times in median_seconds(sides, rounds).items()}


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=32)
    options = parser.parse_args()
    tune_malloc(OWN_PAGES_OF_PASSES)
    seconds = {
        dtype: measure(options.model, dtype, options.batch, options.length, options.rounds)
        for dtype in ("float32", "bfloat16")
    }
    published = seconds["float32"]["loop as published"]
    for dtype, found in seconds.items():
        for name in (*PEERS, "loop as published"):
            theirs = published if name == "loop as published" else found.get(name)
            if theirs is not None:
                print(f"{dtype}: a step of {name} takes {theirs / found['zotune']:.2f} x ours ({theirs:.2f} s)")
    versions = {name: installed(name) for name in PEERS}
    write_result("speed-peers", {**vars(options), "versions": versions, "seconds": seconds})


if __name__ == "__main__":
    main()
