"""`zotune plan`: the paper's formulas, our prediction, which methods fit into memory, and advice."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zotune.errors import UsageError
from zotune.llm.config.method import FIRST_ORDER
from zotune.llm.config.schema import validate
from zotune.llm.models.builtin import BUILT_IN
from zotune.plan.formulas import FORMULAS, Terms
from zotune.plan.memory import Memory
from zotune.plan.options import PlanConfig
from zotune.plan.predict import HUB_IDS, Architecture, on_cpu
from zotune.plan.process_memory import measure
from zotune.plan.search import largest
from zotune.plan.workload import Workload
from zotune.system.peak_memory import free_memory, resident_memory

# The largest batch that the search for a fitting batch tries.
MAX_BATCH = 4096
_ONE_BY_ONE = 1 << 10
"""Tokens of a batch above which each probe has a pass of its own, so that a larger batch may need less memory."""


@dataclass(frozen=True)
class Row:
    """The memory and time of one method.

    Attributes:
        formula: bytes by the paper's formula.
        prediction: our prediction by parts.
        total: predicted peak bytes; on a CPU with the process and its libraries.
        fits: whether the total is within the limit; None without a limit.
        largest: the largest batch (or length) that fits; None without a limit.
        seconds: median time of a measured step; None if no step was measured.
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
    """The content of `zotune plan`.

    Attributes:
        libraries: bytes of the process with its libraries if the model is in the same memory, else 0.
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
    """Predict the memory of each method. Weights are read only to measure the time of a step.

    Raises:
        UsageError: the model cannot be read, an option has no effect, or `calibrate` lacks the weights.
    """
    workloads = {m: validate(Workload, config.values_of(m), "command line") for m in config.methods}
    first = next(iter(workloads.values()))
    if config.calibrate and not has_weights(config.model):
        raise UsageError(
            f"--calibrate runs a step, but the weights of {config.model!r} are not on this machine. Give a built-in "
            "model, a local folder with weights, or random:NAME, an architecture with random weights."
        )
    architecture = Architecture(first)
    libraries = resident_memory() if on_cpu(first) else 0
    terms = architecture.terms(first)
    rows = [_row(architecture, workload, terms, libraries, config) for workload in workloads.values()]
    if config.calibrate:
        rows = [replace(row, seconds=_seconds(workloads[row.method], row)) for row in rows]
    return Plan(config, terms, libraries, _is_papers(first), tuple(rows), advice(rows, config.limit))


def has_weights(model: str) -> bool:
    """Whether a model's weights are available offline; those of a built-in model may be downloaded once."""
    folder = Path(model)
    return model in BUILT_IN or model.startswith("random:") or any(folder.glob("*.safetensors"))


def _row(architecture: Architecture, workload: Workload, terms: Terms, libraries: int, config: PlanConfig) -> Row:
    prediction = architecture.predict(workload)
    # The paper's formula of ZO-SGD also holds for methods that store no more than ZO-SGD; those in subspaces store
    # little more.
    formulas = {f.method: f for f in FORMULAS}
    formula = formulas.get(workload.method, formulas["zo_sgd"]).total(terms)
    row = Row(workload.method, formula, prediction, libraries + prediction.total)
    if config.limit is None:
        return row
    free = config.limit - libraries
    fitting = _largest(architecture, workload, prediction, free, config.largest)
    return replace(row, fits=prediction.total <= free, largest=fitting)


def _largest(architecture: Architecture, workload: Workload, prediction: Memory, free: int, quantity: str) -> int:
    """The largest batch, or length, that fits into `free` bytes."""
    if prediction.weights + max(prediction.loading, prediction.state) > free:
        return 0
    is_batch = quantity == "batch"
    name = "per_device_train_batch_size" if is_batch else "length"
    other = workload.length if is_batch else workload.per_device_train_batch_size

    def bytes_of(n: int) -> int:
        return architecture.predict(workload.model_copy(update={name: n})).total

    return largest(bytes_of, free, MAX_BATCH if is_batch else architecture.lm.context, start=_ONE_BY_ONE // other + 1)


def _seconds(workload: Workload, row: Row) -> float | None:
    """Median time of some steps; None if the machine lacks the memory for them."""
    if on_cpu(workload) and row.total > free_memory():
        return None
    return measure(workload.model_dump(mode="json")).seconds


def _is_papers(workload: Workload) -> bool:
    """Whether this is the setting of Table A1: OPT-13B, full tuning, single precision, about 400 tokens."""
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
            return f"{least.method} needs {gib(least.total)}."
        factor = most.total / least.total
        return (
            f"{least.method} needs the least memory, {gib(least.total)}; {most.method} needs the most, "
            f"{factor:.1f} times as much."
        )
    fitting = [row.method for row in rows if row.fits]
    first_order = [name for name in fitting if name in FIRST_ORDER]
    if first_order:
        return (
            f"Back-propagation fits: consider {' or '.join(reversed(first_order))} first, which needs fewer steps. "
            "Use a zeroth-order method if the objective has no gradient, or for longer texts or larger batches."
        )
    if fitting:
        return (
            f"Back-propagation does not fit; consider {', '.join(fitting)}"
            f"{_window_advice(rows)}. --hybrid-layers trains the upper layers by back-propagation."
        )
    if any(row.largest for row in rows):
        return "No method fits with this batch and length, but smaller ones do: see the last column."
    return (
        f"No method fits: {least.method} needs the least memory, {gib(least.total)}, of which "
        f"{gib(least.prediction.weights)} are weights. Consider --dtype bfloat16, or a smaller model."
    )


def _window_advice(rows: list[Row]) -> str:
    """The advice to use `--window` for methods that do not fit because of their state."""
    methods = [row.method for row in rows if not row.fits and row.method in ("zo_sgd_mmt", "zo_adam")]
    return f"; for {' and '.join(methods)}, use --window in place of a state" if methods else ""


def gib(n: int) -> str:
    """Format a number of bytes in GiB or MiB.

    >>> gib(3 << 29), gib(5 << 20)
    ('1.50 GiB', '5 MiB')
    """
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"
