"""The comparisons that a claim makes: which cells, in which settings, and the estimate of each difference.

Cells are compared within settings (equal values on all axes that the claim does not name). Where a claim is about the
mean over settings, all settings have equal weight and make one comparison; else each setting makes its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from zotune.bench.results.cells import Cell, matches
from zotune.bench.results.gate import have_learnt
from zotune.bench.results.intervals import Estimate, Outcomes, Term, contrast
from zotune.bench.results.quantities import Quantity, outcomes, quantity
from zotune.bench.spec.claims import Claim, Selection
from zotune.bench.spec.vocabulary import Coordinate

# With two runs the interval over seeds is about thirteen standard errors wide; with one run there is none.
FEWEST_RUNS = 3
# A step's time varies from step to step and from process to process.
FEWEST_TIMED_STEPS = 10
# Why a comparison cannot tell anything: cells without results, nobody has learnt, too few runs, too few timed steps.
Lack = Literal["", "results", "learning", "runs", "timing"]


@dataclass(frozen=True)
class Comparison:
    """One difference that a claim makes.

    Attributes:
        label: the compared value, where the claim has several comparisons, and the setting, where it compares in each.
        estimate: the difference: points, or for amounts the logarithm of a ratio; None if `lack` is results or
            learning.
        by_ratio: whether it is a ratio.
        num_settings, of_settings: number of settings that count, and number of settings.
        num_unlearnt: number of settings that do not count because no method has learnt there.
        num_cells: number of cells that are compared.
        sources: the files of their results, below the folder of results.
        lack: why the comparison tells nothing; empty otherwise.
    """

    label: str
    estimate: Estimate | None
    by_ratio: bool = False
    num_settings: int = 0
    of_settings: int = 0
    num_unlearnt: int = 0
    num_cells: int = 0
    sources: tuple[str, ...] = ()
    lack: Lack = ""

    @property
    def is_measured(self) -> bool:
        """Whether it has a number to show."""
        return self.estimate is not None

    @property
    def is_tested(self) -> bool:
        """Whether it has an interval, so that chance may decide it."""
        return self.estimate is not None and self.estimate.parts is not None and not self.lack

    @property
    def value(self) -> float:
        """The difference in points, or the ratio."""
        assert self.estimate is not None
        return math.exp(self.estimate.value) if self.by_ratio else self.estimate.value

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the value; (−∞, ∞) or (0, ∞) if it is not known."""
        assert self.estimate is not None
        low, high = self.estimate.interval()
        return (math.exp(low), math.exp(high)) if self.by_ratio else (low, high)


def comparisons(claim: Claim, cells: Sequence[Cell]) -> list[tuple[Comparison, ...]]:
    """The comparisons of a claim by setting, and within each by the compared value.

    A claim about the mean over settings has one entry for all of them. Empty if the cells lack a side of the claim.
    """
    here = [c for c in cells if matches(c, claim.among)]
    parts = _parts(claim, here)
    if not parts:
        return []
    if claim.settings == "mean":
        return [tuple(_compare(claim, part, [*_settings(claim, part, here).values()]) for part in parts)]
    # The parts of a claim name the same axes, so that they have the same settings.
    every = [_settings(claim, part, here) for part in parts]
    names = dict.fromkeys(place for settings in every for place in settings)
    by_setting = []
    for place in names:
        name = ", ".join(str(value) for axis, value in place if _varies(axis, names))
        pairs = zip(parts, every, strict=True)
        in_setting = tuple(_compare(claim, part, [s[place]], name) for part, s in pairs if place in s)
        by_setting.append(in_setting)
    return by_setting


_Setting = tuple[tuple[str, Coordinate], ...]


def _varies(axis: str, settings: Mapping[_Setting, None]) -> bool:
    return len({dict(place).get(axis) for place in settings}) > 1


# Which cells ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """Both sides of one comparison."""

    label: str
    more: tuple[Selection, ...]
    less: tuple[Selection, ...]

    def sides(self, cells: Sequence[Cell]) -> list[tuple[float, list[Cell]]]:
        """The cells of each selection with its sign."""
        signed = [*((1.0, s) for s in self.more), *((-1.0, s) for s in self.less)]
        return [(sign, [c for c in cells if matches(c, s)]) for sign, s in signed]


def _parts(claim: Claim, cells: Sequence[Cell]) -> list[_Part]:
    """The comparisons of a claim: one, or one for each value of an axis on the side with several."""
    if not all(any(matches(c, s) for c in cells) for s in (*claim.more, *claim.less)):
        return []
    axis = claim.each or claim.some
    if axis is None:
        return [_Part("", claim.more, claim.less)]
    above, below = (_values(axis, side, cells) for side in (claim.more, claim.less))
    if below and len(above) <= 1:
        return [_Part(f"against {v}", claim.more, _at(axis, v, claim.less)) for v in below if v not in above]
    return [_Part(str(v), _at(axis, v, claim.more), claim.less) for v in above if v not in below]


def _values(axis: str, side: Sequence[Selection], cells: Sequence[Cell]) -> list[Coordinate]:
    """The values of an axis on one side of a claim."""
    here = [c.coordinates[axis] for c in cells if axis in c.coordinates and any(matches(c, s) for s in side)]
    return list(dict.fromkeys(here))


def _at(axis: str, value: Coordinate, side: Sequence[Selection]) -> tuple[Selection, ...]:
    return tuple({**selection, axis: value} for selection in side)


def _settings(claim: Claim, part: _Part, cells: Sequence[Cell]) -> dict[_Setting, list[Cell]]:
    """The cells of each setting that has all sides of the comparison; its key is the values on all other axes."""
    named = {axis for s in (*part.more, *part.less) for axis in s} | ({claim.spread} if claim.spread else set())
    settings: dict[_Setting, list[Cell]] = {}
    for cell in cells:
        place = tuple((axis, v) for axis, v in cell.coordinates.items() if axis not in named)
        settings.setdefault(place, []).append(cell)
    return {place: here for place, here in settings.items() if _is_complete(claim, part.sides(here))}


def _is_complete(claim: Claim, sides: Sequence[tuple[float, Sequence[Cell]]]) -> bool:
    """Whether all sides have cells; for a spread, at the same values of its axis, and more than one."""
    if not claim.spread:
        return all(cells for _, cells in sides)
    values = [{c.coordinates.get(claim.spread) for c in cells} for _, cells in sides]
    return len(values[0]) > 1 and all(v == values[0] for v in values)


# Estimates ------------------------------------------------------------------------------------------------


def _compare(claim: Claim, part: _Part, settings: Sequence[Sequence[Cell]], name: str = "") -> Comparison:
    """One comparison in the mean of those settings that have results, and in which somebody has learnt."""
    q, label = quantity(claim.of), ", ".join(text for text in (part.label, name) if text)
    every = [(cells, _terms(claim, q, part.sides(cells))) for cells in settings]
    whole = [(_compared(part, cells), terms) for cells, terms in every if terms]
    counts = [(cells, terms) for cells, terms in whole if not _is_gated(q, terms) or have_learnt(cells)]
    unlearnt = len(whole) - len(counts)
    if not counts:
        lack: Lack = "learning" if unlearnt else "results"
        return Comparison(label, None, of_settings=len(settings), num_unlearnt=unlearnt, lack=lack)
    estimate = contrast([(w / len(counts), of_cell) for _, terms in counts for w, of_cell in terms])
    compared = [cell for cells, _ in counts for cell in cells]
    return Comparison(
        label,
        estimate,
        by_ratio=q.by_ratio,
        num_settings=len(counts),
        of_settings=len(settings),
        num_unlearnt=unlearnt,
        num_cells=len(compared),
        sources=tuple(dict.fromkeys(cell.source for cell in compared)),
        lack=_lack(q, estimate, compared),
    )


def _is_gated(q: Quantity, terms: Sequence[Term]) -> bool:
    """Whether the comparison needs a method that has learnt; with too few runs nothing can be told anyway."""
    return q.name == "accuracy" and min(len(outcomes.values) for _, outcomes in terms) >= FEWEST_RUNS


def _compared(part: _Part, cells: Sequence[Cell]) -> list[Cell]:
    """The cells that stand on a side of a comparison, each once."""
    chosen = [c for _, of_side in part.sides(cells) for c in of_side]
    return [c for c in cells if any(c is one for one in chosen)]


def _lack(q: Quantity, estimate: Estimate, cells: Sequence[Cell]) -> Lack:
    """Whether there are too few runs for a rate, or too few steps and processes for a time.

    Bytes need one run: allocations do not depend on chance.
    """
    if q.unit == "s":
        steps = min(run.num_steps for c in cells if c.result for run in c.result.runs)
        return "timing" if estimate.num_runs < FEWEST_RUNS or steps < FEWEST_TIMED_STEPS else ""
    return "runs" if not q.by_ratio and (estimate.parts is None or estimate.num_runs < FEWEST_RUNS) else ""


def _terms(claim: Claim, q: Quantity, sides: Sequence[tuple[float, Sequence[Cell]]]) -> list[Term]:
    """The weighted cells of one setting; empty if a cell lacks its result."""
    terms: list[Term] = []
    for sign, cells in sides:
        every = [outcomes(c.result, q) for c in cells if c.result is not None and c.is_usable]
        usable = [o for o in every if o is not None]
        if len(usable) < len(cells):
            return []
        weights = _spread_weights(usable) if claim.spread else [1 / len(usable)] * len(usable)
        terms += [(sign * w, o) for w, o in zip(weights, usable, strict=True)]
    return terms


def _spread_weights(of_cells: Sequence[Outcomes]) -> list[float]:
    """The gradient (m − m̄)/((k − 1) s) of the means' standard deviation s; the means weighted by it add up to s."""
    means = np.array([o.mean for o in of_cells])
    deviations = means - means.mean()
    spread = math.sqrt(float((deviations * deviations).sum()) / (len(means) - 1)) if len(means) > 1 else 0.0
    return [float(a) / ((len(means) - 1) * spread) if spread else 0.0 for a in deviations]
