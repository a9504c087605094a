"""What the paper says, held against what was measured: holds, does not hold, or cannot be told.

Cells are compared within settings (the axes that a claim does not name), and settings count alike. A verdict is what
the 95 % interval of the comparison allows, no more.
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
from zotune.bench.results.records import Coordinate
from zotune.bench.results.tables import Cell
from zotune.bench.spec.claims import Claim, Selection

Finding = Literal["holds", "does not hold", "cannot be told"]
# Of two runs the interval of what seeds do is some thirteen standard errors wide, and of one there is none.
FEWEST_RUNS = 3


@dataclass(frozen=True)
class Comparison:
    """One difference that a claim is about.

    Attributes:
        label: what is compared, where the claim compares several.
        value, low, high: the difference and its 95 % interval: points, or a ratio where amounts are compared.
        num_settings, of_settings: settings that had all cells, of how many.
        finding: what follows at 95 %; `stays`: whether it still does at the level of all comparisons together.
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
    """What the data say of a claim.

    Attributes:
        reason: why it cannot be told, if it cannot.
        stays: whether the finding stands when all comparisons on the experiment's claims are counted (Bonferroni).
    """

    claim: Claim
    finding: Finding
    comparisons: tuple[Comparison, ...]
    reason: str = ""
    stays: bool = False


def verdicts(claims: Sequence[Claim], cells: Sequence[Cell]) -> list[Verdict]:
    """Every claim of an experiment against its cells."""
    count = sum(max(1, len(_parts(claim, cells))) for claim in claims)
    return [judge(claim, cells, count) for claim in claims]


def judge(claim: Claim, cells: Sequence[Cell], num_comparisons: int = 1) -> Verdict:
    """A claim against cells; `num_comparisons` are made in all, which is what `stays` goes by."""
    parts = _parts(claim, cells)
    if not parts:
        return Verdict(claim, "cannot be told", (), "none of the cells that it is about was run at this scale")
    # One of several that settles a claim must do so with all of them counted.
    level = 1 - 0.05 / len(parts) if claim.some else 0.95
    every = [_compared(claim, part, cells, num_comparisons, level) for part in parts]
    found = [c for c in every if c is not None]
    missing = len(parts) - len(found)
    if not found:
        return Verdict(claim, "cannot be told", (), "no setting has all the cells that it compares")
    open_ends: list[Finding] = ["cannot be told"] * missing
    finding = _together([c.finding for c in found] + open_ends, of_one=claim.some is not None)
    settled = [c for c in found if c.finding == finding]
    # Where all comparisons must agree, all must stay; where one settles it, one.
    needs_all = (finding == "holds") == (claim.some is None)
    stays = finding != "cannot be told" and (all if needs_all else any)(c.stays for c in settled)
    return Verdict(claim, finding, tuple(found), _reason(found, missing, finding), stays)


def _together(findings: Sequence[Finding], *, of_one: bool = False) -> Finding:
    """Of several comparisons: all hold, or one does not; `of_one`: one holds, or all do not.

    >>> _together(["holds", "cannot be told"]), _together(["holds", "does not hold"])
    ('cannot be told', 'does not hold')
    >>> _together(["holds", "cannot be told"], of_one=True), _together(["does not hold", "cannot be told"], of_one=True)
    ('holds', 'cannot be told')
    """
    enough: Finding = "holds" if of_one else "does not hold"
    if enough in findings:
        return enough
    return "cannot be told" if "cannot be told" in findings else findings[0]


def _reason(found: Sequence[Comparison], missing: int, finding: Finding) -> str:
    if finding != "cannot be told":
        return ""
    if missing:
        return f"{missing} of {missing + len(found)} comparisons lack cells"
    fewest = min(c.num_runs for c in found)
    if fewest < FEWEST_RUNS:
        return f"{fewest} run{'s' * (fewest > 1)} a cell cannot tell chance from effect; it takes {FEWEST_RUNS}"
    return "the interval allows both"


# Which cells ----------------------------------------------------------------------------------------------

_Part = tuple[str, tuple[Selection, ...], tuple[Selection, ...]]


def _parts(claim: Claim, cells: Sequence[Cell]) -> list[_Part]:
    """The comparisons of a claim, by label: one, or one for each value of an axis on the side that has several."""
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
    """Whether a cell lies on all axes where a selection says."""
    return all(axis in cell.coordinates and _is(cell.coordinates[axis], v) for axis, v in selection.items())


def _is(value: Coordinate, wanted: Coordinate | tuple[Coordinate, ...]) -> bool:
    if isinstance(wanted, tuple | list):
        return any(_is(value, one) for one in wanted)
    return fnmatchcase(str(value), wanted) if isinstance(wanted, str) else value == wanted


# Contrasts ------------------------------------------------------------------------------------------------

_Terms = list[tuple[float, Outcomes]]


def _compared(
    claim: Claim, part: _Part, cells: Sequence[Cell], num_comparisons: int, level: float
) -> Comparison | None:
    """One comparison over all settings that have its cells; None where none has."""
    q, (label, more, less) = quantity(claim.of), part
    named = {axis for s in (*more, *less) for axis in s} | ({claim.spread} if claim.spread else set())
    # A setting: the places on all other axes.
    settings: dict[tuple[tuple[str, Coordinate], ...], list[Cell]] = {}
    for cell in cells:
        if matches(cell, claim.among):
            place = tuple((axis, v) for axis, v in cell.coordinates.items() if axis not in named)
            settings.setdefault(place, []).append(cell)
    of_settings = [terms for here in settings.values() if (terms := _terms(claim, q, more, less, here)) is not None]
    whole = [terms for terms in of_settings if terms]
    if not whole:
        return None
    estimate = contrast([(weight / len(whole), found) for terms in whole for weight, found in terms])
    finding = _finding(claim, estimate, q, level)
    stays = finding != "cannot be told" and _finding(claim, estimate, q, 1 - 0.05 / num_comparisons) == finding
    value, low, high = (math.exp(x) if q.by_ratio else x for x in (estimate.value, *estimate.interval()))
    return Comparison(
        label, value, low, high, estimate.num_runs, estimate.num_rows, len(whole), len(of_settings), finding, stays
    )


def _terms(
    claim: Claim, q: Quantity, more: Sequence[Selection], less: Sequence[Selection], here: Sequence[Cell]
) -> _Terms | None:
    """The weighted cells of one setting; empty where a cell lacks its result, None where there are no such cells."""
    sides = [(sign, [c for c in here if matches(c, s)]) for sign, side in ((1.0, more), (-1.0, less)) for s in side]
    if not all(chosen for _, chosen in sides) or (claim.spread and not _spreads_alike(claim.spread, sides)):
        return None
    found: _Terms = []
    for sign, chosen in sides:
        read = [outcomes(c.result, q) for c in chosen if c.result is not None and c.is_usable]
        usable = [o for o in read if o is not None]
        if len(usable) < len(chosen):
            return []
        weights = _spread_weights(usable) if claim.spread else [1 / len(usable)] * len(usable)
        found += [(sign * w, o) for w, o in zip(weights, usable, strict=True)]
    return found


def _spreads_alike(axis: str, sides: Sequence[tuple[float, Sequence[Cell]]]) -> bool:
    """Whether all sides have the same values on an axis, and several: else their spreads are not of the same thing."""
    values = [{c.coordinates.get(axis) for c in chosen} for _, chosen in sides]
    return len(values[0]) > 1 and all(v == values[0] for v in values)


def _spread_weights(found: Sequence[Outcomes]) -> list[float]:
    """The gradient (m − m̄)/((k − 1) s) of the means' standard deviation s; weighted by it, the means add up to s."""
    means = np.array([o.mean for o in found])
    away = means - means.mean()
    spread = math.sqrt(float((away * away).sum()) / (len(means) - 1)) if len(means) > 1 else 0.0
    return [float(a) / ((len(means) - 1) * spread) if spread else 0.0 for a in away]


def _finding(claim: Claim, estimate: Estimate, q: Quantity, level: float) -> Finding:
    """What an interval says of `by`, or of `within`.

    Amounts of which there was one measurement have no interval; they are taken as they are.
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


def counted(found: Sequence[Verdict]) -> Iterator[tuple[Finding, int]]:
    """How often each finding came."""
    order: tuple[Finding, ...] = ("holds", "does not hold", "cannot be told")
    for finding in order:
        yield finding, sum(v.finding == finding for v in found)
