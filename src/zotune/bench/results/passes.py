"""Passes until a target is reached: medians over seeds, ratios to a reference, and bootstrap intervals of both.

A run reaches a target at the first evaluation from which on each one meets it. A run that never does is kept as
infinitely many passes (censored), so a median is infinite where fewer than half of the runs reach the target. Runs of
one seed share their batches, so the bootstrap draws seeds, the same for both sides of a ratio (Efron, 1979).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from zotune.bench.results.cells import Cell, agrees, matches
from zotune.bench.results.ranking import first_from_which
from zotune.bench.results.records import CellResult, Evaluation
from zotune.bench.spec.targets import Passes, Target
from zotune.bench.spec.vocabulary import Coordinate

REPLICATES = 10_000
# The passes of each seed.
BySeed = Mapping[int, float]


@dataclass(frozen=True)
class Median:
    """A median over seeds, or a ratio of two, with the ends of its 95 % interval; infinite where runs are censored."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Ratio(Median):
    """A ratio of two medians.

    Attributes:
        bound: where one of the medians is infinite, so that the ratio is infinite or 0, the ratio with the budget in
            its place: the true one is above, or below.
    """

    bound: float | None = None


@dataclass(frozen=True)
class Way:
    """A method's way to a target.

    Attributes:
        passes: forward-equivalents until the target is reached.
        ratio: how many times fewer these are than the reference's; None for the reference and those beside it.
        num_reached, num_runs: of the runs, those that reach the target.
        source: the file of its result, below the folder of results.
    """

    method: str
    passes: Median
    ratio: Ratio | None
    num_reached: int
    num_runs: int
    source: str


@dataclass(frozen=True)
class Race:
    """The methods of one place on their way to one target; the fewest passes first.

    Attributes:
        place: the coordinates that the cells share.
        target: what they have to reach, a loss or an accuracy.
        reference: the method that the others are compared with: of those that the experiment names, the one with the
            fewest passes. Empty if none has a result.
    """

    place: Mapping[str, Coordinate]
    target: Target
    reference: str
    ways: tuple[Way, ...]


def races(plan: Passes, cells: Sequence[Cell]) -> list[Race]:
    """Compare the methods of an experiment by their passes to its targets, in the order of targets and places."""
    found = []
    for target in plan.targets:
        here = [cell for cell in cells if cell.is_usable and matches(cell, target.when)]
        places = dict.fromkeys(tuple((k, v) for k, v in cell.coordinates.items() if k != plan.method) for cell in here)
        for place in places:
            of_place = [c for c in here if agrees(c.coordinates, dict(place))]
            number = _in_numbers(target, plan, of_place)
            if number is not None:
                found.append(_race(plan, dict(place), number, of_place))
    return found


def _in_numbers(target: Target, plan: Passes, cells: Sequence[Cell]) -> Target | None:
    """A target as a loss or an accuracy, in three digits; None if the reference has no trials to define its way."""
    if target.way is None:
        return target
    results = [c.result for c in cells if c.result is not None and _is_named(str(c.coordinates[plan.method]), plan)]
    trials = [trial for result in results for trial in result.search if trial.dev_loss is not None]
    starts = [run.dev_before for result in results for run in result.runs if run.dev_before is not None]
    if not trials or not starts:
        return None
    best, start = min(trials, key=lambda trial: trial.dev_loss or 0.0), starts[0]
    if target.measure == "loss":
        begin, end, unit = start.loss, best.dev_loss, 1
    else:
        begin, end, unit = start.value, best.dev_value, 100
    if begin is None or end is None:
        return None
    return Target(when=target.when, **{target.measure: float(f"{unit * (begin + target.way * (end - begin)):.3g}")})


def _is_named(method: str, plan: Passes) -> bool:
    return any(fnmatchcase(method, one) for one in plan.reference)


def _race(plan: Passes, place: Mapping[str, Coordinate], target: Target, cells: Sequence[Cell]) -> Race:
    results = {str(c.coordinates[plan.method]): c.result for c in cells if c.result is not None}
    passes = {name: passes_to(result, target) for name, result in results.items()}
    named = [name for name in passes if _is_named(name, plan)]
    reference = min(named, key=lambda name: median(passes[name]).value, default="")
    ways = []
    for cell in cells:
        name = str(cell.coordinates[plan.method])
        own = passes[name]
        is_compared = reference and name != reference and not any(fnmatchcase(name, one) for one in plan.beside)
        ways.append(
            Way(
                method=name,
                passes=median(own),
                ratio=times_fewer(results[name], results[reference], target) if is_compared else None,
                num_reached=sum(map(math.isfinite, own.values())),
                num_runs=len(own),
                source=cell.source,
            )
        )
    return Race(place, target, reference, tuple(sorted(ways, key=lambda way: way.passes.value)))


def times_fewer(result: CellResult, reference: CellResult, target: Target) -> Ratio:
    """How many times fewer passes to a target one result takes than another, within the smaller of their budgets."""
    budget = min(_budget_of(result), _budget_of(reference))
    return ratio(passes_to(reference, target), passes_to(result, target), budget)


def _budget_of(result: CellResult) -> float:
    """The most forward-equivalents that a run of a cell took."""
    return max((e.forward_equivalents or 0.0 for run in result.runs for e in run.evaluations), default=0.0)


def meets(target: Target) -> Callable[[Evaluation], bool]:
    """Whether an evaluation meets a target."""
    if target.loss is not None:
        most = target.loss
        return lambda e: e.dev_loss is not None and e.dev_loss <= most
    least = target.accuracy or 0.0
    return lambda e: e.dev_value is not None and 100 * e.dev_value >= least


def passes_to(result: CellResult, target: Target) -> dict[int, float]:
    """The forward-equivalents after which each run of a cell has reached a target, by its seed."""
    found = {}
    for run in result.runs:
        evaluation = first_from_which(run, meets(target))
        passes = None if evaluation is None else evaluation.forward_equivalents
        found[run.seed] = math.inf if passes is None else passes
    return found


def median(passes: BySeed) -> Median:
    """The median of a method's passes.

    >>> median(dict(enumerate([10, 20, 30, 40, math.inf]))).value
    30.0
    """
    values = _of_seeds(passes, sorted(passes))
    low, high = np.quantile(_medians(values, _draws(len(values))), (0.025, 0.975), method="inverted_cdf")
    return Median(float(_medians(values, _all(len(values)))[0]), float(low), float(high))


def ratio(reference: BySeed, passes: BySeed, budget: float = math.inf) -> Ratio:
    """How many times fewer passes a method takes than a reference: median over median, on the seeds of both.

    It is infinite where the reference alone is censored, 0 where the method alone is, and unknown (NaN) where both are.
    A censored run needs more than the `budget`, so each end of the interval takes the budget for what bounds it: the
    lower one of a censored reference, the upper one of a censored method.

    >>> ratio({0: math.inf, 1: math.inf}, {0: 100.0, 1: 100.0}, budget=600.0)
    Ratio(value=inf, low=6.0, high=inf, bound=6.0)

    Raises:
        ValueError: they share no seed.
    """
    seeds = sorted(reference.keys() & passes.keys())
    if not seeds:
        raise ValueError("the reference and the method share no seed")
    draws = np.concatenate([_all(len(seeds)), _draws(len(seeds))])
    above, below = (_medians(_of_seeds(side, seeds), draws) for side in (reference, passes))
    with np.errstate(invalid="ignore"):
        least = np.nan_to_num(np.minimum(above, budget) / below, nan=0.0, posinf=math.inf)
        most = np.nan_to_num(above / np.minimum(below, budget), nan=math.inf, posinf=math.inf)
        value = float(above[0] / below[0])
    low, high = (float(np.quantile(x[1:], p, method="inverted_cdf")) for x, p in ((least, 0.025), (most, 0.975)))
    bound = float((least if math.isinf(value) else most)[0])
    is_bounded = math.isfinite(budget) and (math.isinf(value) or value == 0)
    return Ratio(value, low, high, bound if is_bounded else None)


def _of_seeds(passes: BySeed, seeds: Sequence[int]) -> NDArray[np.float64]:
    return np.array([passes[seed] for seed in seeds], dtype=float)


def _draws(number: int) -> NDArray[np.int64]:
    # The same draws for each ratio of a report, and in each report.
    return np.random.default_rng(0).integers(number, size=(REPLICATES, number))


def _all(number: int) -> NDArray[np.int64]:
    return np.arange(number)[None]


def _medians(values: NDArray[np.float64], draws: NDArray[np.int64]) -> NDArray[np.float64]:
    """The median of each draw; of an even number the upper of the middle two, which is a number that occurred."""
    drawn = np.sort(values[draws], axis=1)
    middle: NDArray[np.float64] = drawn[:, drawn.shape[1] // 2]
    return middle
