"""The numbers that can be read from a run: accuracy, passes, seconds, bytes, and further ones for each kind of cell.

Each quantity has a name, a unit for readers, and a way of comparison: rates by difference, amounts by ratio. The
currency of passes is the forward-equivalent: a back-propagation counts as its three forward passes. The memory of a
step is its own peak; that of loading the model is another quantity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from zotune.bench.results.intervals import Outcomes
from zotune.bench.results.records import CellResult, RunRecord
from zotune.bench.spec.vocabulary import is_amount


@dataclass(frozen=True)
class Quantity:
    """One number of a run.

    Attributes:
        label, unit: the texts in tables and on axes.
        read: returns the number in the unit; None if the run has none.
        digits: digits after the decimal point; None for three significant digits.
    """

    name: str
    label: str
    unit: str
    read: Callable[[RunRecord], float | None]
    digits: int | None = None

    @property
    def by_ratio(self) -> bool:
        """Whether it is an amount, which is compared by ratio; all others are compared by difference."""
        return is_amount(self.name)

    def text(self, value: float) -> str:
        """Format a value for tables, without its unit.

        >>> quantity("accuracy").text(91.234), quantity("peak_memory").text(1234.5), quantity("seconds").text(0.01234)
        ('91.2', '1,234', '0.0123')
        """
        if self.digits is not None:
            return f"{value:.{self.digits}f}"
        return significant(value)


def significant(value: float, digits: int = 3) -> str:
    """Format a number with `digits` significant digits, all digits before the point, and integers in full.

    >>> significant(0.00012345), significant(12.345), significant(123456.7), significant(64.0), significant(1e-9)
    ('0.000123', '12.3', '123,457', '64', '1e-09')
    """
    if not math.isfinite(value):
        return f"{value:g}"
    if value == round(value):
        return f"{value:,.0f}"
    exponent = math.floor(math.log10(abs(value)))
    if exponent < -4:
        return f"{value:.{digits}g}"
    return f"{value:,.{max(digits - 1 - exponent, 0)}f}"


def signed(text: str) -> str:
    """A formatted number with its sign; the minus is the typographic one.

    >>> signed("1.2"), signed("-1.2"), signed("0.0"), signed("-0.0")
    ('+1.2', '−1.2', '±0.0', '±0.0')
    """
    if not text.strip("-0.,"):
        return "±" + text.lstrip("-")
    return "−" + text[1:] if text.startswith("-") else "+" + text


def _score(run: RunRecord) -> float | None:
    return None if run.test is None else 100 * run.test.value


_GIB = 2**30
_LOADING = "load"
"""The phase of a measurement that belongs to no step."""


def _step_bytes(run: RunRecord) -> float | None:
    """The peak of a step's own phases above the process without a model."""
    return _bytes(run, "step_bytes", [peaks["peak"] for phase, peaks in run.phases.items() if phase != _LOADING])


def _loading_bytes(run: RunRecord) -> float | None:
    return _bytes(run, "loading_bytes", [peaks["peak"] for phase, peaks in run.phases.items() if phase == _LOADING])


def _bytes(run: RunRecord, name: str, peaks: Sequence[float | None]) -> float | None:
    """The recorded number of a run in GiB, or that of its phases in results that do not record it."""
    recorded, baseline = run.measured.get(name), run.measured.get("baseline_bytes")
    known = [peak for peak in peaks if peak is not None]
    if recorded is None and known and baseline is not None:
        recorded = max(known) - baseline
    return None if recorded is None else recorded / _GIB


_KNOWN = (
    Quantity("accuracy", "accuracy", "%", _score, digits=1),
    Quantity("forward_equivalents", "forward-equivalents", "", lambda run: run.forward_equivalents),
    Quantity("layer_passes", "layer passes", "", lambda run: run.layer_passes),
    Quantity("num_forwards", "calls of the model", "", lambda run: run.num_forwards),
    Quantity("step_bytes", "memory of a step", "GiB", _step_bytes),
    Quantity("loading_bytes", "memory of loading", "GiB", _loading_bytes),
    Quantity("num_tokens", "tokens read", "", lambda run: run.num_tokens),
    Quantity("seconds", "training time", "s", lambda run: run.seconds),
    Quantity("peak_memory", "peak memory", "GiB", lambda run: run.peak_memory / _GIB),
    Quantity("dev_loss", "held-out loss", "", lambda run: None if run.dev is None else run.dev.loss),
)
# Labels of further quantities whose names do not make good labels.
_LABELS = {
    "over_baseline_bytes": "memory of all phases",
    "formula_bytes": "memory by formula",
    "seconds_per_step": "time of a step",
}
QUANTITIES: dict[str, Quantity] = {q.name: q for q in _KNOWN}
"""The quantities that every run has; `quantity` also finds those in a run's `measured` and `values`."""


def quantity(name: str) -> Quantity:
    """A quantity by name: one that every run has, a key of a run's `measured` or `values`, or the ratio `A/B` of two.

    A key with the word `bytes` or `seconds` has that unit; other keys are plain numbers.

    >>> quantity("seconds_per_step").unit, quantity("formula_bytes").unit, quantity("relative_variance").label
    ('s', 'GiB', 'relative variance')
    """
    if "/" in name:
        return _ratio(name, *map(quantity, name.split("/", 1)))
    return QUANTITIES.get(name) or _from_key(name)


def _ratio(name: str, above: Quantity, below: Quantity) -> Quantity:
    def read(run: RunRecord) -> float | None:
        a, b = above.read(run), below.read(run)
        return a / b if a is not None and b else None

    return Quantity(name, f"{above.label} ÷ {below.label}", "", read)


def _from_key(name: str) -> Quantity:
    """The quantity of a key in a run's `measured` or `values`."""
    words = name.split("_")
    text = _LABELS.get(name, " ".join(word for word in words if word != "bytes"))
    is_bytes, is_time = "bytes" in words, "seconds" in words
    per = _GIB if is_bytes else 1

    def read(run: RunRecord) -> float | None:
        value = run.measured.get(name, run.values.get(name))
        return None if value is None else value / per

    return Quantity(name, text, "GiB" if is_bytes else "s" if is_time else "", read)


def label_of(q: Quantity, metric: str = "accuracy") -> str:
    """A quantity's label with its unit; `metric` replaces the label of accuracy, for instance by f1.

    >>> label_of(quantity("accuracy"), "f1"), label_of(quantity("num_forwards"))
    ('f1, %', 'calls of the model')
    """
    label = metric if q.name == "accuracy" else q.label
    return f"{label}, {q.unit}" if q.unit else label


def run_values(result: CellResult, q: Quantity) -> list[float]:
    """The quantity in each of a cell's runs that has it as a finite number."""
    values = (q.read(run) for run in result.runs)
    return [value for value in values if value is not None and math.isfinite(value)]


def outcomes(result: CellResult, q: Quantity) -> Outcomes | None:
    """The data of contrasts: right answers row by row, in points, where runs have these; else one number for each run.

    Amounts are returned as logarithms, so that a difference is a ratio. None if the cell has no usable number.
    """
    rows = [run.right for run in result.runs]
    if q.name == "accuracy" and rows and all(rows) and len({len(row) for row in rows}) == 1:
        return Outcomes(np.array([in_points(row) for row in rows]), task_of(result), _seeds(result.runs))
    runs = [run for run in result.runs if (value := q.read(run)) is not None and math.isfinite(value)]
    values = run_values(result, q)
    if not values or (q.by_ratio and min(values) <= 0):
        return None
    column = np.array(values)[:, None]
    return Outcomes(np.log(column) if q.by_ratio else column, f"{result.cell}", _seeds(runs))


def in_points(right: str) -> list[float]:
    """Right answers as points: 100 for a right one, 0 for a wrong one.

    >>> in_points("101")
    [100.0, 0.0, 100.0]
    """
    return [100.0 * (mark == "1") for mark in right]


def task_of(result: CellResult) -> str:
    """The task of a cell's evaluation rows; empty for a cell without a task."""
    return str(result.config.get("options", {}).get("task", ""))


def _seeds(runs: Sequence[RunRecord]) -> tuple[int, ...]:
    """The seeds of runs; empty where seeds repeat, so that they do not tell the runs apart."""
    seeds = tuple(run.seed for run in runs)
    return seeds if len(set(seeds)) == len(seeds) else ()
