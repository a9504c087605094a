"""A ranking of methods at equal budgets: places, differences to the best, and what each method spent.

Methods share the first place if the interval of their difference to the best contains zero. A target is reached at the
first evaluation on the held-out rows from which on each one is at or above it; a run that never does counts as reaching
it after infinitely many passes, so the median of the seeds is infinite where fewer than half of them reach it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median_high

from zotune.bench.results.cells import Cell
from zotune.bench.results.costs import greatest, mean_of, search_cost
from zotune.bench.results.intervals import contrast
from zotune.bench.results.quantities import outcomes, quantity
from zotune.bench.results.records import CellResult, Evaluation, RunRecord
from zotune.bench.results.tables import interval
from zotune.bench.spec.vocabulary import Coordinate
from zotune.llm.config.method import FIRST_ORDER

# The target lies this far between the untuned model and the best method's mean on the evaluation rows.
_SHARE = 0.5
Interval = tuple[float, float] | None


@dataclass(frozen=True)
class Ranked:
    """A method in a ranking.

    Attributes:
        place: 1 for the best and for those that cannot be told from it; None for a method without a result.
        mean, low, high: its accuracy in points, with its 95 % interval.
        behind, behind_interval: how much the best is above it, in points, with the 95 % interval.
        forward_equivalents, seconds, step_gib: what a run took; None where it was not recorded.
        search_forward_equivalents, search_seconds: what its search took in all.
        passes_to_target, seconds_to_target: medians over seeds; infinite where fewer than half of them reach it.
        num_reached, num_runs: runs that reach the target, and all runs.
        source: the file of its result, below the folder of results.
        reason: why it has no result.
        is_forward_only: whether it trains without back-propagation.
    """

    name: str
    place: int | None = None
    mean: float = math.nan
    low: float | None = None
    high: float | None = None
    behind: float = 0.0
    behind_interval: Interval = None
    forward_equivalents: float | None = None
    seconds: float | None = None
    step_gib: float | None = None
    search_forward_equivalents: float | None = None
    search_seconds: float | None = None
    passes_to_target: float | None = None
    seconds_to_target: float | None = None
    num_reached: int = 0
    num_runs: int = 0
    source: str = ""
    reason: str = ""
    is_forward_only: bool = False


@dataclass(frozen=True)
class Ranking:
    """The methods of one budget, the best first; `target` is in points, None without an untuned model."""

    budget: str
    target: float | None
    lines: tuple[Ranked, ...]

    @property
    def best(self) -> Ranked | None:
        """The best method; None if no method has a result."""
        return self.lines[0] if self.lines and self.lines[0].place == 1 else None


def rankings(cells: Sequence[Cell], columns: Sequence[str], axis: str) -> list[Ranking]:
    """Rank the values of an axis, for each combination of values of the axes in `columns` that has a result."""
    places = dict.fromkeys(tuple(c.coordinates.get(a, "") for a in columns) for c in cells)
    found = []
    for place in places:
        here = [c for c in cells if tuple(c.coordinates.get(a, "") for a in columns) == place]
        if any(c.result is not None for c in here):
            found.append(ranking(", ".join(map(str, place)), here, axis))
    return found


def ranking(budget: str, cells: Sequence[Cell], axis: str) -> Ranking:
    """Rank cells by their accuracy."""
    usable = [(c, c.result) for c in cells if c.result is not None and c.is_usable and _mean(c.result) is not None]
    usable.sort(key=lambda pair: -(_mean(pair[1]) or 0.0))
    target = _target([result for _, result in usable])
    lines = [_ranked(c.coordinates[axis], c, result, usable[0][1], target) for c, result in usable]
    known = {id(c) for c, _ in usable}
    lines += [
        Ranked(str(c.coordinates[axis]), reason=c.result.message if c.result else "not run")
        for c in cells
        if id(c) not in known
    ]
    return Ranking(budget, target, tuple(_with_places(lines)))


def _mean(result: CellResult) -> float | None:
    return mean_of(result, "accuracy")


def _target(results: Sequence[CellResult]) -> float | None:
    """Half of the way from the untuned model to the best mean."""
    if not results or "zero_shot" not in results[0].baselines:
        return None
    untuned = 100 * results[0].baselines["zero_shot"].value
    return untuned + _SHARE * ((_mean(results[0]) or 0.0) - untuned)


def _ranked(name: Coordinate, cell: Cell, result: CellResult, best: CellResult, target: float | None) -> Ranked:
    low, high = interval([cell], quantity("accuracy"))
    mean = _mean(result) or 0.0
    reaching = [] if target is None else [reached(run, target) for run in result.runs]
    return Ranked(
        str(name),
        mean=mean,
        low=low,
        high=high,
        behind=(_mean(best) or 0.0) - mean,
        behind_interval=None if result is best else _difference(best, result),
        forward_equivalents=mean_of(result, "forward_equivalents"),
        seconds=mean_of(result, "seconds"),
        step_gib=greatest(result, "step_bytes"),
        search_forward_equivalents=search_cost(result, "forward_equivalents"),
        search_seconds=search_cost(result, "seconds"),
        passes_to_target=_median([None if e is None else e.forward_equivalents for e in reaching], reaching),
        seconds_to_target=_median([None if e is None else e.seconds for e in reaching], reaching),
        num_reached=sum(e is not None for e in reaching),
        num_runs=len(result.runs),
        source=cell.source,
        is_forward_only=is_forward_only(result),
    )


def is_forward_only(result: CellResult) -> bool:
    """Whether a cell's method trains without back-propagation."""
    options = result.config.get("options", {})
    return options.get("method", "zo_sgd") not in FIRST_ORDER and options.get("hybrid_layers") is None


def _difference(best: CellResult, other: CellResult) -> Interval:
    """The 95 % interval of the difference to the best; None if a cell has a single run."""
    accuracy = quantity("accuracy")
    above, below = outcomes(best, accuracy), outcomes(other, accuracy)
    if above is None or below is None:
        return None
    low, high = contrast([(1.0, above), (-1.0, below)]).interval()
    return None if math.isinf(low) else (low, high)


def reached(run: RunRecord, target: float) -> Evaluation | None:
    """The first evaluation of a run from which on each one is at or above a target in points; None if the last is not.

    >>> values = enumerate((0.5, 0.7, 0.6, 0.8))
    >>> way = tuple(Evaluation(step=n, num_forwards=n, dev_loss=None, dev_value=v) for n, v in values)
    >>> run = RunRecord(seed=0, evaluations=way)
    >>> reached(run, 65.0).step, reached(run, 90.0)
    (3, None)
    """
    return first_from_which(run, lambda e: e.dev_value is not None and 100 * e.dev_value >= target)


def first_from_which(run: RunRecord, meets: Callable[[Evaluation], bool]) -> Evaluation | None:
    """The first evaluation of a run from which on each one meets a target; None if the last does not."""
    found = None
    for evaluation in reversed(run.evaluations):
        if not meets(evaluation):
            break
        found = evaluation
    return found


def _median(values: Sequence[float | None], reaching: Sequence[Evaluation | None]) -> float | None:
    """The median, where a run that does not reach the target has infinitely many; None if a number is not recorded."""
    if not values or any(v is None and e is not None for v, e in zip(values, reaching, strict=True)):
        return None
    return median_high(math.inf if value is None else value for value in values)


def _with_places(lines: Sequence[Ranked]) -> list[Ranked]:
    """The lines with their places; those that cannot be told from the best share its place."""
    placed: list[Ranked] = []
    for i, line in enumerate(lines):
        if line.reason:
            placed.append(line)
            continue
        is_tied = line.behind_interval is not None and line.behind_interval[0] <= 0
        placed.append(replace(line, place=1 if i == 0 or is_tied else i + 1))
    return placed
