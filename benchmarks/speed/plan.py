"""The memory that `zotune plan` predicts and the measured memory, for every method, model, tuning and precision.

    python benchmarks/speed/plan.py

Each measurement is a fresh process (`zotune.plan.process_memory`): the peak resident memory of the whole run minus
that of the process with its libraries. The paper's formulas (Tables 5, A1 and A2) stand beside it at the same
scale. Rows that the same code and libraries have already recorded are not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from record import RESULTS, write_result

from zotune.bench.keys.content_key import key_of
from zotune.llm.config.method import FIRST_ORDER
from zotune.llm.config.schema import validate
from zotune.methods.paper import METHODS
from zotune.plan.formulas import FORMULAS
from zotune.plan.memory import Memory
from zotune.plan.predict import Architecture
from zotune.plan.process_memory import measure
from zotune.plan.workload import Workload

MODELS = ("random:opt-125m", "smollm2-135m", "random:opt-350m")
BATCH, LENGTH, STEPS, MU, LR = 4, 128, 1, 1e-2, 1e-7
HYBRID_MODEL, HYBRID_DEPTHS = "random:opt-125m", (0, 3, 6, 9, 12)
LENGTHS, LENGTH_MODEL = (64, 128, 256, 512, 1024), "random:opt-125m"


@dataclass(frozen=True)
class Prediction:
    """A workload with its predicted memory and the bytes of the paper's formula."""

    options: dict[str, Any]
    workload: Workload
    prediction: Memory
    formula: int | None


def predict(options: dict[str, Any], known: dict[Any, Architecture]) -> Prediction:
    """Predict a workload; `known` caches architectures."""
    workload = validate(Workload, {"device": "cpu", "learning_rate": LR, **options}, "plan")
    key = (workload.model, workload.tuning, workload.dtype)
    architecture = known[key] = known[key] if key in known else Architecture(workload)
    terms = architecture.terms(workload)
    formula = next((f.total(terms) for f in FORMULAS if f.method == workload.method), None)
    return Prediction(options, workload, architecture.predict(workload), formula)


def row(each: Prediction) -> dict[str, Any]:
    """Measure a workload; return the measurement with the prediction."""
    measured = measure(each.workload.model_dump(mode="json"), num_steps=STEPS)
    phases = {name: phase.peak - measured.baseline for name, phase in measured.phases.items()}
    running = max(peak for name, peak in phases.items() if name != "load")
    found = {
        **each.options,
        "predicted": each.prediction.to_json(),
        "measured": measured.over_baseline,
        "baseline": measured.baseline,
        "phases": phases,
        "ratio": measured.over_baseline / each.prediction.total,
        "running_ratio": running / each.prediction.running,
        "paper_formula": each.formula,
        "num_threads": measured.num_threads,
    }
    mib = [n / 2**20 for n in (each.prediction.total, measured.over_baseline)]
    name = " ".join(str(v) for v in each.options.values())
    print(
        f"{name:60} predicted {mib[0]:6.0f} MiB, measured {mib[1]:6.0f} MiB: {found['ratio']:.3f}, "
        f"without the load {found['running_ratio']:.3f}",
        flush=True,
    )
    return found


def grid() -> list[dict[str, Any]]:
    """Every method for every model, tuning and precision."""
    methods = (*METHODS, *FIRST_ORDER)
    sizes = {"per_device_train_batch_size": BATCH, "length": LENGTH}
    rows = product(MODELS, ("full", "lora"), ("float32", "bfloat16"), methods)
    return [
        {"model": model, "tuning": tuning, "dtype": dtype, "method": method, **sizes, **_probing(method)}
        for model, tuning, dtype, method in rows
    ]


def _probing(method: str) -> dict[str, float]:
    """A μ that is large enough for bfloat16 weights, for methods that have one."""
    return {} if method in ("forward_grad", *FIRST_ORDER) else {"mu": MU}


def lengths() -> list[dict[str, Any]]:
    """The workloads of the paper's figure 3: two examples of growing length."""
    sizes = {"model": LENGTH_MODEL, "tuning": "full", "dtype": "float32", "per_device_train_batch_size": 2}
    return [{**sizes, "method": method, "length": n} for n in LENGTHS for method in ("zo_sgd", "fo_sgd")]


def depths() -> list[dict[str, Any]]:
    """The workloads of the paper's Table 7: the first k layers with forward passes only."""
    sizes = {"model": HYBRID_MODEL, "tuning": "full", "dtype": "float32", "per_device_train_batch_size": BATCH}
    hybrid = {"method": "zo_sgd", "length": LENGTH, "hybrid_tied": "zeroth_order"}
    return [{**sizes, **hybrid, "hybrid_layers": k} for k in HYBRID_DEPTHS]


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=1, help="processes at once; memory does not depend on it")
    options = parser.parse_args()
    parts = {"methods": grid(), "lengths": lengths(), "hybrid": depths()}
    keys = {name: [key_of_row(each) for each in rows] for name, rows in parts.items()}
    known: dict[Any, Architecture] = {}
    rows_by_key = recorded()
    missing = {
        key_of_row(each): each for rows in parts.values() for each in rows if key_of_row(each) not in rows_by_key
    }
    predictions = [predict(each, known) for each in missing.values()]
    with ThreadPoolExecutor(options.jobs) as pool:
        for key, measured in zip(missing, pool.map(row, predictions), strict=True):
            rows_by_key[key] = {"key": key, **measured}
            record(rows_of(keys, rows_by_key))  # after each row, since all rows take nearly an hour
    found = rows_of(keys, rows_by_key)
    low, high = ratio_range(found)
    print(f"measured / predicted: {low:.3f} to {high:.3f} over {sum(map(len, found.values()))} workloads")


def recorded() -> dict[str, dict[str, Any]]:
    """The recorded rows by their keys."""
    path = RESULTS / "plan.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {row["key"]: row for name in ("methods", "lengths", "hybrid") for row in known.get(name, [])}


def key_of_row(options: dict[str, Any]) -> str:
    """The content key of a row: a hash of its options and of today's code and libraries."""
    return key_of({"kind": "memory", "device": "cpu", "steps": STEPS, **options})


def rows_of(keys: dict[str, list[str]], rows: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The available rows of each part, in order."""
    return {name: [rows[key] for key in part if key in rows] for name, part in keys.items()}


def ratio_range(found: dict[str, list[dict[str, Any]]]) -> tuple[float, float]:
    """The least and greatest ratio of measured to predicted memory, for the whole run and for the steps alone."""
    ratios = [r[name] for rows in found.values() for r in rows for name in ("ratio", "running_ratio")]
    return min(ratios), max(ratios)


def record(found: dict[str, list[dict[str, Any]]]) -> None:
    """Write the available rows."""
    write_result("plan", {"steps": STEPS, "ratio_range": ratio_range(found), **found})


if __name__ == "__main__":
    main()
