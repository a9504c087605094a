"""The tables of README.md and of pages in docs/, made from benchmarks/results; a test checks that pages are current.

python benchmarks/readme_tables.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

from zotune.bench.results.cells import Cell
from zotune.bench.results.costs import cell_costs
from zotune.bench.results.quantities import quantity
from zotune.bench.results.records import mean_and_error, read_results
from zotune.bench.results.tables import interval
from zotune.bench.spec.resolve import cells, find, names
from zotune.bench.spec.vocabulary import SCALES
from zotune.llm.config.method import MethodName

RESULTS = Path(__file__).parent / "results"


def _read(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


def quickstart() -> str:
    """Accuracy before and after with its interval, seed by seed."""
    found = _read("quickstart")
    seeds = sorted(run["seed"] for run in found["runs"]["zo_sgd"])
    lines = [f"| 872 validation rows, {found['dtype']} |" + "".join(f" seed {seed} |" for seed in seeds)]
    lines.append("|---|" + "--:|" * len(seeds))
    lines.append("| zero-shot, same prompt |" + f" {_accuracy(found['zero_shot'])} |" * len(seeds))
    names = {"zo_sgd": "ZO-SGD, forward passes only", "fo_adam": "Adam by back-propagation, same adapter"}
    for method, name in names.items():
        runs = sorted(found["runs"][method], key=lambda run: run["seed"])
        lines.append(f"| {name} |" + "".join(f" {_accuracy(run['test'])} |" for run in runs))
    return "\n".join(lines)


def _accuracy(test: dict[str, float]) -> str:
    return f"{100 * test['accuracy']:.1f} % ({100 * test['low']:.1f} to {100 * test['high']:.1f})"


_SIDES = {
    "zo_sgd_step": "`zo_sgd`",
    "lora_step": "LoRA",
    "low_rank_step": "rank 1",
    "gaussian_step": "Gaussian",
    "forward_grad_step": "`forward_grad`",
    "one_by_one_step": "one by one",
    "in_place_loop": "in-place loop",
}


def step_in_short() -> str:
    """The rows of `step` for 16 × 32 tokens."""
    return "\n".join(line for i, line in enumerate(step().splitlines()) if i < 2 or "| 16 × 32 |" in line)


def step() -> str:
    """A step as a multiple of its two forward passes."""
    lines = [f"| model, precision | batch × tokens | {' | '.join(_SIDES.values())} |"]
    lines.append("|---|---|" + "--:|" * len(_SIDES))
    for model, sizes in _read("speed-step")["models"].items():
        for side, found in sizes.items():
            dtype, size = side.split()
            ratios = " | ".join(f"{found[f'{name}_ratio']:.2f} ×" for name in _SIDES)
            lines.append(f"| {model.removeprefix('random:')}, {dtype} | {size.replace('x', ' × ')} | {ratios} |")
    return "\n".join(lines)


# The goals of a step's cost: from each side to its sizes and their goals.
_GOALS = {
    "zo_sgd_step": {"float32 4x32": 1.35, "float32 16x32": 1.15, "float32 16x64": 1.15}
    | {"bfloat16 4x32": 1.8, "bfloat16 16x32": 1.35, "bfloat16 16x64": 1.35},
    "low_rank_step": {"float32 16x32": 1.08, "bfloat16 16x32": 1.08},
    "lora_step": {"float32 16x32": 1.05, "bfloat16 16x32": 1.05},
    "gaussian_step": {"float32 16x32": 1.5},
}


def goals() -> str:
    """The goals of a step's cost beside the measured cost, by model."""
    models = _read("speed-step")["models"]
    lines = [f"| | goal | {' | '.join(name.removeprefix('random:') for name in models)} |"]
    lines.append("|---|--:|" + "--:|" * len(models))
    sides = [(side, size, goal) for side, sizes in _GOALS.items() for size, goal in sizes.items()]
    for side, size, goal in sides:
        ratios = [_beside(found[size][f"{side}_ratio"], goal) for found in models.values()]
        name = f"{_SIDES[side]}, {size.replace(' ', ', ').replace('x', ' × ')}"
        lines.append(f"| {name} | ≤ {goal} | {' | '.join(ratios)} |")
    for dtype in ("float32", "bfloat16"):
        ratios = [_beside(found[f"{dtype} 16x32"]["forward_grad_to_zo_sgd"], 1.6) for found in models.values()]
        lines.append(f"| `forward_grad` over `zo_sgd`, {dtype}, 16 × 32 | ≤ 1.6 | {' | '.join(ratios)} |")
    return "\n".join(lines)


def other_goals() -> str:
    """Further goals beside the measured numbers."""
    seconds, peaks = _read("speed-peers")["seconds"], _read("speed-memory")["peaks"]
    lines = ["| | goal | measured |", "|---|--:|--:|"]
    for dtype in ("float32", "bfloat16"):
        peak = _beside(peaks[f"opt-350m {dtype} full"]["ratio"], 1.05)
        lines.append(f"| peak memory over evaluation's, opt-350m, {dtype}, all weights | ≤ 1.05 | {peak} |")
    for dtype, goal in (("float32", 3), ("bfloat16", 8)):
        found = _beside(seconds["float32"]["loop as published"] / seconds[dtype]["zotune"], goal, at_least=True)
        lines.append(f"| the loop as published over `zo_sgd`, {dtype} | ≥ {goal} | {found} |")
    return "\n".join(lines)


def _beside(found: float, goal: float, *, at_least: bool = False) -> str:
    """A rounded number, marked if it misses its goal."""
    shown = round(found, 2)
    misses = shown < goal if at_least else shown > goal
    return f"{shown:.2f}{', missed' if misses else ''}"


def peers() -> str:
    """The time of a step of other packages as a multiple of ours."""
    found = _read("speed-peers")
    lines = ["| | float32 | bfloat16 |", "|---|--:|--:|"]
    ours = {dtype: seconds["zotune"] for dtype, seconds in found["seconds"].items()}
    lines.append("| zotune, `zo_sgd` | " + " | ".join(f"{1000 * ours[d]:.0f} ms" for d in ours) + " |")
    for name in ("zotune, rank 1", *found["versions"], "loop as published"):
        theirs = {dtype: seconds.get(name) for dtype, seconds in found["seconds"].items()}
        if name == "loop as published":  # it exists in single precision only
            theirs = dict.fromkeys(theirs, theirs["float32"])
        ratios = [f"{t / ours[d]:.2f} ×" if t else "–" for d, t in theirs.items()]
        version = found["versions"].get(name)
        lines.append(f"| {f'{name} {version}' if version else name} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def growth() -> str:
    """The exponent with which a step's time grows with its size."""
    lines = ["| | from | to | ZO-SGD step | two forward passes |", "|---|--:|--:|--:|--:|"]
    for name, found in _read("speed-growth")["growth"].items():
        sizes = [int(size) for size in found["seconds"]]
        slopes = " | ".join(f"{found['slope'][kind]:.2f}" for kind in ("step", "forwards"))
        lines.append(f"| {name} | {sizes[0]:,} | {sizes[-1]:,} | {slopes} |")
    return "\n".join(lines)


def forward_gradient() -> str:
    """Peak memory of a forward gradient and of a forward pass."""
    names = {"forward": "a forward pass", "forward_gradient": "`forward_grad`, a step", "jvp": "`torch.func.jvp`"}
    lines = ["| | peak | ratio |", "|---|--:|--:|"]
    for way, found in _read("memory-forward-gradient")["memory"]["peaks"].items():
        lines.append(f"| {names[way]} | {found['bytes'] / 2**20:,.0f} MiB | {found['ratio']:.2f} |")
    return "\n".join(lines)


def memory() -> str:
    """Peak memory of training and of evaluation."""
    lines = ["| model, precision, tuning | `zotune eval` | `zotune train` | ratio |", "|---|--:|--:|--:|"]
    for side, found in _read("speed-memory")["peaks"].items():
        mib = [f"{found[key] / 2**20:.0f} MiB" for key in ("eval_bytes", "train_bytes")]
        lines.append(f"| {side.replace(' ', ', ', 2)} | {mib[0]} | {mib[1]} | {found['ratio']:.2f} |")
    return "\n".join(lines)


def zero_shot() -> str:
    """The accuracy of the untuned built-in model."""
    lines = ["| task | rows | accuracy (95 % interval) | majority class |", "|---|--:|--:|--:|"]
    for task, found in _read("zero-shot")["tasks"].items():
        accuracy, low, high = (100 * found[key] for key in ("accuracy", "low", "high"))
        majority = 100 * found["majority"]["accuracy"]
        lines.append(
            f"| {task} | {found['num_examples']} | {accuracy:.1f} % ({low:.1f} to {high:.1f}) | {majority:.1f} % |"
        )
    return "\n".join(lines)


def experiments() -> str:
    """The experiments of `zotune bench`, with their cells at each scale."""
    lines = ["| | question | smoke | cpu | paper |", "|---|---|--:|--:|--:|"]
    for name in names():
        _, experiment = find(name)
        counts = " | ".join(
            str(sum(1 for _ in cells(name, experiment, scale))) if scale in experiment.scale else "–"
            for scale in SCALES
        )
        lines.append(f"| `{name}` | {experiment.question} | {counts} |")
    return "\n".join(lines)


def reward() -> str:
    """The reward of generated text before and after tuning, on held-out prompts."""
    lines = ["| seed | before | after | gain (95 % interval, paired) | CPU time |", "|--:|--:|--:|---|--:|"]
    for run in _read("reward")["runs"]:
        before, after, gain, half = (run[key] for key in ("before", "after", "gain", "half_width"))
        interval = f"{gain:+.3f} ({gain - half:+.3f} to {gain + half:+.3f})"
        lines.append(f"| {run['seed']} | {before:.3f} | {after:.3f} | {interval} | {run['cpu_seconds'] / 60:.1f} min |")
    return "\n".join(lines)


def methods() -> str:
    """SST-2 by each method, from the available cells of Table 2 at scale cpu, with the costs of a run."""
    found = [c for c in read_results(RESULTS / "bench", "cpu", "table2") if c.status == "done"]
    order = {name: i for i, name in enumerate(get_args(MethodName))}
    found.sort(key=lambda c: (c.coordinates["tuning"] == "full", order[str(c.coordinates["method"])]))
    heads = ["method", "tuned", f"{found[0].runs[0].test.num_examples} rows, 3 seeds", "95 % interval"]
    lines = [
        f"| {' | '.join([*heads, 'forward-equivalents', 'CPU time', 'memory of a step'])} |",
        "|---|---|--:|---|--:|--:|--:|",
    ]
    untuned = found[0].baselines["zero_shot"]
    value, low, high = (100 * number for number in (untuned.value, untuned.low, untuned.high))
    lines.append(f"| none | | {value:.1f} % | {low:.1f} to {high:.1f} | | | |")
    for cell in found:
        mean, error = mean_and_error([100 * run.test.value for run in cell.runs if run.test])
        alone = [Cell(cell.coordinates, "done", cell)]
        low, high = interval(alone, quantity("accuracy"))
        (costs,) = cell_costs(alone)
        passes, step = _shown(costs["forward-equivalents"]), _shown(costs["step GiB"], 1024, " MiB")
        tuned = {"lora": "LoRA", "full": "last layer"}[str(cell.coordinates["tuning"])]
        lines.append(
            f"| `{cell.coordinates['method']}` | {tuned} | {mean:.1f} ± {error:.1f} % | {low:.1f} to {high:.1f} | "
            f"{passes} | {costs['seconds']:.0f} s | {step} |"
        )
    return "\n".join(lines)


def _shown(value: float | None, factor: float = 1.0, unit: str = "") -> str:
    """A number of a result; "–" where results of older code do not record it."""
    return "–" if value is None else f"{value * factor:,.0f}{unit}"


TABLES = {
    "methods": methods,
    "quickstart": quickstart,
    "step_in_short": step_in_short,
    "step": step,
    "goals": goals,
    "other_goals": other_goals,
    "peers": peers,
    "growth": growth,
    "forward_gradient": forward_gradient,
    "memory": memory,
    "zero_shot": zero_shot,
    "reward": reward,
    "experiments": experiments,
}

if __name__ == "__main__":
    for table in TABLES.values():
        print(table(), end="\n\n")
