"""Check that a step costs no more than recorded: fail on a ratio more than 15 % above that of `speed-step.json`.

    make bench-check

This measures the built-in model with a batch of 16 x 32 tokens as `step.py` does. A ratio that is too high is measured
a second time, since other work on the machine can raise a single measurement; the check fails if both are too high.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from record import RESULTS
from step import measure, measure_lora

from zotune.llm.config.run import EvalConfig
from zotune.llm.models.load import load
from zotune.system.malloc import OWN_PAGES_OF_PASSES, tune_malloc

ALLOWED = 1.15
# The ending of the checked ratios; the loop of older codes is slow and not checked.
_OURS = "_step_ratio"


def slower(recorded: dict[str, float], found: dict[str, float], allowed: float = ALLOWED) -> dict[str, float]:
    """The ratios that exceed the allowed growth, as multiples of the recorded ratios.

    >>> slower({"zo_sgd_step_ratio": 1.2, "lora_step_ratio": 1.0}, {"zo_sgd_step_ratio": 1.5, "lora_step_ratio": 1.1})
    {'zo_sgd_step_ratio': 1.25}
    """
    growth = {k: found[k] / recorded[k] for k in recorded if k.endswith(_OURS) and k in found}
    return {k: round(g, 3) for k, g in growth.items() if g > allowed}


def ratios(model: str, dtype: str, batch: int, length: int, rounds: int) -> dict[str, float]:
    """The ratios that `step.py` records for one size, without the loop of older codes."""
    options = EvalConfig(task="sst2", model=model, dtype=dtype)
    found = measure(load(options), batch, length, rounds, older=False)
    return found | measure_lora(load(options), batch, length, rounds)


def main() -> int:
    """Measure, compare, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--size", default="16x32")
    parser.add_argument("--recorded", type=Path, default=RESULTS / "speed-step.json")
    options = parser.parse_args()
    tune_malloc(OWN_PAGES_OF_PASSES)
    batch, length = map(int, options.size.split("x"))
    recorded = json.loads(options.recorded.read_text(encoding="utf-8"))["models"][options.model]
    failed = False
    for dtype in ("float32", "bfloat16"):
        before = recorded[f"{dtype} {options.size}"]
        found = ratios(options.model, dtype, batch, length, options.rounds)
        if slow := slower(before, found):
            again = ratios(options.model, dtype, batch, length, options.rounds)
            slow = {k: v for k, v in slower(before, again).items() if k in slow}
        for name in (k for k in before if k.endswith(_OURS) and k in found):
            verdict = f"slower: {slow[name]:.2f} times" if name in slow else "fine"
            print(f"{dtype} {name.removesuffix(_OURS)}: {found[name]:.2f}, recorded {before[name]:.2f}: {verdict}")
        failed = failed or bool(slow)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
