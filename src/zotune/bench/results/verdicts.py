"""Verdicts on the paper's claims from our results: a claim holds, does not hold, or cannot be told.

Cells are compared within settings (equal values on all axes that the claim does not name), and all settings have equal
weight. A verdict follows from the 95 % interval of the comparison.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import numpy as np

from zotune.bench.results.intervals import Estimate, Outcomes, contrast
from zotune.bench.results.quantities import Quantity, outcomes, quantity
from zotune.bench.results.tables import Cell
from zotune.bench.spec.claims import Claim, Selection
from zotune.bench.spec.vocabulary import Coordinate

Finding = Literal["holds", "does not hold", "cannot be told"]
# With two runs the interval over seeds is about thirteen standard errors wide; with one run there is none.
FEWEST_RUNS = 3


@dataclass(frozen=True)
class Comparison:
    """One difference that a claim makes.

    Attributes:
        label: the compared value, where the claim has several comparisons.
        value, low, high: the difference and its 95 % interval: points, or a ratio for amounts.
        num_runs, num_rows: runs of the cell with the fewest, and evaluation rows.
        num_settings, of_settings: number of settings that had all cells, and number of settings.
        finding: the finding at the 95 % level.
        stays: whether the finding is the same at the level of all comparisons together (Bonferroni).
    """

    label: str
    value: float
    low: float
    high: float
    num_runs: int
    num_rows: int
    num_settings: int
    of_settings: int
    finding: Finding
    stays: bool


@dataclass(frozen=True)
class Verdict:
    """The verdict on a claim.

    Attributes:
        reason: why the claim cannot be told; empty otherwise.
        stays: whether the finding is the same when all comparisons of the experiment's claims are counted (Bonferroni).
    """

    claim: Claim
    finding: Finding
    comparisons: tuple[Comparison, ...]
    reason: str = ""
    stays: bool = False


def verdicts(claims: Sequence[Claim], cells: Sequence[Cell]) -> list[Verdict]:
    """Judge every claim of an experiment by its cells."""
    count = sum(max(1, len(_parts(claim, cells))) for claim in claims)
    return [judge(claim, cells, count) for claim in claims]


def judge(claim: Claim, cells: Sequence[Cell], num_comparisons: int = 1) -> Verdict:
    """Judge a claim by its cells.

    Args:
        claim: the claim.
        cells: all cells of the experiment.
        num_comparisons: number of comparisons of all claims of the experiment, for `Verdict.stays`.
    """
    parts = _parts(claim, cells)
    if not parts:
        return Verdict(claim, "cannot be told", (), "none of the cells that the claim compares was run at this scale")
    # If one of several comparisons is enough for a claim, its level must count all of them.
    level = 1 - 0.05 / len(parts) if claim.some else 0.95
    every = [_compare(claim, part, cells, num_comparisons, level) for part in parts]
    comparisons = [c for c in every if c is not None]
    missing = len(parts) - len(comparisons)
    if not comparisons:
        return Verdict(claim, "cannot be told", (), "no setting has all the cells that the claim compares")
    unknown: list[Finding] = ["cannot be told"] * missing
    finding = _combine([c.finding for c in comparisons] + unknown, one_is_enough=claim.some is not None)
    agreeing = [c for c in comparisons if c.finding == finding]
    # If all comparisons must agree, all must stay; if one is enough, one must stay.
    needs_all = (finding == "holds") == (claim.some is None)
    stays = finding != "cannot be told" and (all if needs_all else any)(c.stays for c in agreeing)
    return Verdict(claim, finding, tuple(comparisons), _reason(comparisons, missing, finding), stays)


def _combine(findings: Sequence[Finding], *, one_is_enough: bool = False) -> Finding:
    """The finding on a claim from those of its comparisons: all of them must hold, or one if `one_is_enough`.

    >>> _combine(["holds", "cannot be told"]), _combine(["holds", "does not hold"])
    ('cannot be told', 'does not hold')
    >>> _combine(["holds", "cannot be told"], one_is_enough=True)
    'holds'
    >>> _combine(["does not hold", "cannot be told"], one_is_enough=True)
    'cannot be told'
    """
    decisive: Finding = "holds" if one_is_enough else "does not hold"
    if decisive in findings:
        return decisive
    return "cannot be told" if "cannot be told" in findings else findings[0]


def _reason(comparisons: Sequence[Comparison], missing: int, finding: Finding) -> str:
    if finding != "cannot be told":
        return ""
    if missing:
        return f"{missing} of {missing + len(comparisons)} comparisons lack cells"
    fewest = min(c.num_runs for c in comparisons)
    if fewest < FEWEST_RUNS:
        runs = "1 run" if fewest == 1 else f"{fewest} runs"
        return f"{runs} per cell cannot separate an effect from chance; it takes {FEWEST_RUNS}"
    return "the interval allows both findings"


# Which cells ----------------------------------------------------------------------------------------------

_Part = tuple[str, tuple[Selection, ...], tuple[Selection, ...]]


def _parts(claim: Claim, cells: Sequence[Cell]) -> list[_Part]:
    """The comparisons of a claim with their labels: one, or one for each value of an axis on the side with several."""
    cells = [c for c in cells if matches(c, claim.among)]
    if not all(any(matches(c, s) for c in cells) for s in (*claim.more, *claim.less)):
        return []
    axis = claim.each or claim.some
    if axis is None:
        return [("", claim.more, claim.less)]
    above, below = (_values(axis, side, cells) for side in (claim.more, claim.less))
    if below and len(above) <= 1:
        return [(f"against {v}", claim.more, _at(axis, v, claim.less)) for v in below if v not in above]
    return [(str(v), _at(axis, v, claim.more), claim.less) for v in above if v not in below]


def _values(axis: str, side: Sequence[Selection], cells: Sequence[Cell]) -> list[Coordinate]:
    """The values of an axis on one side of a claim."""
    here = [c.coordinates[axis] for c in cells if axis in c.coordinates and any(matches(c, s) for s in side)]
    return list(dict.fromkeys(here))


def _at(axis: str, value: Coordinate, side: Sequence[Selection]) -> tuple[Selection, ...]:
    return tuple({**selection, axis: value} for selection in side)


def matches(cell: Cell, selection: Mapping[str, Coordinate | tuple[Coordinate, ...]]) -> bool:
    """Whether a cell matches a selection on all of its axes."""
    return all(axis in cell.coordinates and _is(cell.coordinates[axis], v) for axis, v in selection.items())


def _is(value: Coordinate, wanted: Coordinate | tuple[Coordinate, ...]) -> bool:
    if isinstance(wanted, tuple | list):
        return any(_is(value, one) for one in wanted)
    return fnmatchcase(str(value), wanted) if isinstance(wanted, str) else value == wanted


# Contrasts ------------------------------------------------------------------------------------------------

_Terms = list[tuple[float, Outcomes]]


def _compare(claim: Claim, part: _Part, cells: Sequence[Cell], num_comparisons: int, level: float) -> Comparison | None:
    """One comparison over all settings that have its cells; None if no setting has them."""
    q, (label, more, less) = quantity(claim.of), part
    named = {axis for s in (*more, *less) for axis in s} | ({claim.spread} if claim.spread else set())
    # The key of a setting is the values on all other axes.
    settings: dict[tuple[tuple[str, Coordinate], ...], list[Cell]] = {}
    for cell in cells:
        if matches(cell, claim.among):
            place = tuple((axis, v) for axis, v in cell.coordinates.items() if axis not in named)
            settings.setdefault(place, []).append(cell)
    of_settings = [terms for here in settings.values() if (terms := _terms(claim, q, more, less, here)) is not None]
    whole = [terms for terms in of_settings if terms]
    if not whole:
        return None
    estimate = contrast([(weight / len(whole), of_cell) for terms in whole for weight, of_cell in terms])
    finding = _finding(claim, estimate, q, level)
    stays = finding != "cannot be told" and _finding(claim, estimate, q, 1 - 0.05 / num_comparisons) == finding
    value, low, high = (math.exp(x) if q.by_ratio else x for x in (estimate.value, *estimate.interval()))
    return Comparison(
        label, value, low, high, estimate.num_runs, estimate.num_rows, len(whole), len(of_settings), finding, stays
    )


def _terms(
    claim: Claim, q: Quantity, more: Sequence[Selection], less: Sequence[Selection], here: Sequence[Cell]
) -> _Terms | None:
    """The weighted cells of one setting; empty if a cell lacks its result, None if the setting lacks such cells."""
    sides = [(sign, [c for c in here if matches(c, s)]) for sign, side in ((1.0, more), (-1.0, less)) for s in side]
    if not all(cells_of_side for _, cells_of_side in sides):
        return None
    if claim.spread and not _have_equal_values(claim.spread, sides):
        return None
    terms: _Terms = []
    for sign, cells_of_side in sides:
        every = [outcomes(c.result, q) for c in cells_of_side if c.result is not None and c.is_usable]
        usable = [o for o in every if o is not None]
        if len(usable) < len(cells_of_side):
            return []
        weights = _spread_weights(usable) if claim.spread else [1 / len(usable)] * len(usable)
        terms += [(sign * w, o) for w, o in zip(weights, usable, strict=True)]
    return terms


def _have_equal_values(axis: str, sides: Sequence[tuple[float, Sequence[Cell]]]) -> bool:
    """Whether all sides have the same values on an axis, and more than one; only then can their spreads be compared."""
    values = [{c.coordinates.get(axis) for c in cells_of_side} for _, cells_of_side in sides]
    return len(values[0]) > 1 and all(v == values[0] for v in values)


def _spread_weights(of_cells: Sequence[Outcomes]) -> list[float]:
    """The gradient (m − m̄)/((k − 1) s) of the means' standard deviation s; the means weighted by it add up to s."""
    means = np.array([o.mean for o in of_cells])
    deviations = means - means.mean()
    spread = math.sqrt(float((deviations * deviations).sum()) / (len(means) - 1)) if len(means) > 1 else 0.0
    return [float(a) / ((len(means) - 1) * spread) if spread else 0.0 for a in deviations]


def _finding(claim: Claim, estimate: Estimate, q: Quantity, level: float) -> Finding:
    """The finding that an interval allows about `by`, or about `within`.

    An amount with a single measurement has no interval; its value alone decides.
    """
    if q.by_ratio and estimate.parts is None:
        low = high = estimate.value
    elif estimate.parts is None or estimate.num_runs < FEWEST_RUNS:
        return "cannot be told"
    else:
        low, high = estimate.interval(level)
    if claim.within is not None:
        most = math.log1p(claim.within) if q.by_ratio else claim.within
        if -most < low and high < most:
            return "holds"
        return "does not hold" if low > most or high < -most else "cannot be told"
    least = math.log1p(claim.by) if q.by_ratio else claim.by
    if low > least:
        return "holds"
    return "does not hold" if high < least else "cannot be told"


def count_findings(verdicts: Sequence[Verdict]) -> Iterator[tuple[Finding, int]]:
    """Yield each finding with the number of verdicts that have it."""
    order: tuple[Finding, ...] = ("holds", "does not hold", "cannot be told")
    for finding in order:
        yield finding, sum(v.finding == finding for v in verdicts)
