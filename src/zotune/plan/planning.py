"""`zotune plan`: the paper's formulas and our prediction side by side, what fits, and what to consider."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zotune.bench.measure.process_memory import measure
from zotune.cli.plan import PlanConfig
from zotune.errors import UsageError
from zotune.llm.config.method import FIRST_ORDER
from zotune.llm.config.schema import validate
from zotune.llm.models.builtin import BUILT_IN
from zotune.plan.formulas import FORMULAS, Terms
from zotune.plan.memory import Memory
from zotune.plan.predict import HUB_IDS, Architecture, on_cpu
from zotune.plan.search import largest
from zotune.plan.workload import Workload
from zotune.system.peak_memory import free_memory, resident_memory

# Examples in a batch up to which it is searched for one that fits.
MAX_BATCH = 4096
_ONE_BY_ONE = 1 << 10
"""Tokens of a batch beyond which no two probes share a pass, so that it may take less than a smaller one."""


@dataclass(frozen=True)
class Row:
    """What one method takes.

    Attributes:
        formula: bytes by the paper's formula for it.
        prediction: ours.
        total: the most, the process with its libraries included where it is in the same memory.
        fits: whether that is within the limit; None without one.
        largest: the largest batch (or length) that fits; None without a limit.
        seconds: median of a measured step; None where none was measured.
    """

    method: str
    formula: int
    prediction: Memory
    total: int
    fits: bool | None = None
    largest: int | None = None
    seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As one JSON object."""
        return {**vars(self), "prediction": self.prediction.to_json()}


@dataclass(frozen=True)
class Plan:
    """All that `zotune plan` says.

    Attributes:
        libraries: bytes of a process with its libraries, where the model is in the same memory; else 0.
        is_papers: whether model and setting are those of the paper's Table A1.
        advice: which methods to consider.
    """

    config: PlanConfig
    terms: Terms
    libraries: int
    is_papers: bool
    rows: tuple[Row, ...]
    advice: str

    def to_json(self) -> dict[str, Any]:
        """As one JSON object."""
        formulas = [
            {
                "name": f.name,
                "method": f.method,
                "dynamic": f.dynamic,
                "state": f.state,
                "bytes": f.total(self.terms),
                "paper_gib": f.paper if self.is_papers else None,
            }
            for f in FORMULAS
        ]
        return {
            "config": self.config.model_dump(mode="json"),
            "limit": self.config.limit,
            "libraries": self.libraries,
            "terms": self.terms.to_json(),
            "formulas": formulas,
            "methods": [row.to_json() for row in self.rows],
            "advice": self.advice,
        }


def plan(config: PlanConfig) -> Plan:
    """Foretell what each method takes. No weight is read, unless a step's time is to be measured.

    Raises:
        UsageError: the model cannot be read, an option has no effect, or weights that are to be timed are not at hand.
    """
    workloads = {m: validate(Workload, config.values_of(m), "command line") for m in config.methods}
    first = next(iter(workloads.values()))
    if config.calibrate and not has_weights(config.model):
        raise UsageError(
            f"--calibrate runs a step, and the weights of {config.model!r} are not here. Give a built-in model, a "
            "local folder with weights, or random:NAME, an architecture with random weights."
        )
    architecture = Architecture(first)
    libraries = resident_memory() if on_cpu(first) else 0
    terms = architecture.terms(first)
    rows = [_row(architecture, workload, terms, libraries, config) for workload in workloads.values()]
    if config.calibrate:
        rows = [replace(row, seconds=_seconds(workloads[row.method], row)) for row in rows]
    return Plan(config, terms, libraries, _is_papers(first), tuple(rows), advice(rows, config.limit))


def has_weights(model: str) -> bool:
    """Whether a model's weights can be had without a network (but for those of a package, which are fetched once)."""
    folder = Path(model)
    return model in BUILT_IN or model.startswith("random:") or any(folder.glob("*.safetensors"))


def _row(architecture: Architecture, workload: Workload, terms: Terms, libraries: int, config: PlanConfig) -> Row:
    found = architecture.predict(workload)
    # What the paper says of ZO-SGD holds for those that keep no more than it does.
    alike = "zo_sgd" if workload.method in ("zo_sgd_sign", "zo_sgd_cons") else workload.method
    formula = next(f.total(terms) for f in FORMULAS if f.method == alike)
    row = Row(workload.method, formula, found, libraries + found.total)
    if config.limit is None:
        return row
    room = config.limit - libraries
    return replace(row, fits=found.total <= room, largest=_largest(architecture, workload, found, room, config.largest))


def _largest(architecture: Architecture, workload: Workload, found: Memory, room: int, what: str) -> int:
    """The largest batch, or length, that fits."""
    if found.weights + max(found.loading, found.state) > room:
        return 0
    is_batch = what == "batch"
    name = "per_device_train_batch_size" if is_batch else "length"
    other = workload.length if is_batch else workload.per_device_train_batch_size

    def takes(n: int) -> int:
        return architecture.predict(workload.model_copy(update={name: n})).total

    return largest(takes, room, MAX_BATCH if is_batch else architecture.lm.context, start=_ONE_BY_ONE // other + 1)


def _seconds(workload: Workload, row: Row) -> float | None:
    """Median of some steps; None where the machine has not the memory for them."""
    if on_cpu(workload) and row.total > free_memory():
        return None
    return measure(workload.model_dump(mode="json")).seconds


def _is_papers(workload: Workload) -> bool:
    """The setting of Table A1: OPT-13B, full tuning, single precision, some 400 tokens."""
    name = workload.model.removeprefix("random:")
    is_model = HUB_IDS.get(name, name) == "opt-13b"
    is_single = workload.dtype in ("auto", "float32")
    return is_model and is_single and workload.tuning == "full" and 350 <= workload.length <= 450


def advice(rows: list[Row], limit: int | None) -> str:
    """A sentence or two on which methods to consider."""
    by_total = sorted(rows, key=lambda row: row.total)
    least = by_total[0]
    if limit is None:
        most = by_total[-1]
        if len(rows) == 1:
            return f"{least.method} takes {gib(least.total)}."
        factor = most.total / least.total
        return f"{least.method} takes the least, {gib(least.total)}; {most.method} the most, {factor:.1f} times that."
    fitting = [row.method for row in rows if row.fits]
    first_order = [name for name in fitting if name in FIRST_ORDER]
    if first_order:
        return (
            f"Back-propagation fits: consider {' or '.join(reversed(first_order))} first, which needs fewer steps; "
            "forward passes only where the objective has no gradient, or for a longer text or a larger batch."
        )
    if fitting:
        return (
            f"Back-propagation does not fit; consider {', '.join(fitting)}"
            f"{_moments(rows)}. With the upper layers by back-propagation: --hybrid-layers."
        )
    if any(row.largest for row in rows):
        return "Nothing fits as asked, but a smaller batch or length does: see the last column."
    return (
        f"Nothing fits: {least.method} takes the least, {gib(least.total)}, of which {gib(least.prediction.weights)} "
        "are weights. Consider --dtype bfloat16, or a smaller model."
    )


def _moments(rows: list[Row]) -> str:
    """Where a state is all that is too large, there is a way without it."""
    waiting = [row for row in rows if not row.fits and row.method in ("zo_sgd_mmt", "zo_adam")]
    return f"; for {' and '.join(row.method for row in waiting)}, --window in place of a state" if waiting else ""


def gib(n: int) -> str:
    """Bytes in words.

    >>> gib(3 << 29), gib(5 << 20)
    ('1.50 GiB', '5 MiB')
    """
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"
