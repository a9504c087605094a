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

from zotune.bench.cells import Coordinate
from zotune.bench.claims import Claim, Selection
from zotune.bench.contrasts import Estimate, Outcomes, contrast
from zotune.bench.quantities import Quantity, outcomes, quantity
from zotune.bench.tables import Cell

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
    found = [c for label, more, less in parts if (c := _compared(claim, label, more, less, cells, num_comparisons))]
    missing = len(parts) - len(found)
    if not found:
        return Verdict(claim, "cannot be told", (), "no setting has all the cells that it compares")
    finding = _together([c.finding for c in found] + ["cannot be told"] * missing)
    settled = [c for c in found if c.finding == finding]
    # All of several comparisons must hold, but one that fails is enough.
    stays = (all if finding == "holds" else any)(c.stays for c in settled) and finding != "cannot be told"
    return Verdict(claim, finding, tuple(found), _reason(found, missing, finding), stays)


def _together(findings: Sequence[Finding]) -> Finding:
    """Of several comparisons: all hold, or one does not.

    >>> _together(["holds", "cannot be told"]), _together(["holds", "does not hold"])
    ('cannot be told', 'does not hold')
    """
    if "does not hold" in findings:
        return "does not hold"
    return "holds" if all(f == "holds" for f in findings) else "cannot be told"


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
    """The comparisons of a claim, by label: one, or one for each value of the axis `each`."""
    axis = claim.each
    if axis is None:
        is_known = all(any(matches(c, s) for c in cells) for s in (*claim.more, *claim.less))
        return [("", claim.more, claim.less)] if is_known else []
    one = {c.coordinates.get(axis) for c in cells if any(matches(c, s) for s in claim.more)}
    others = dict.fromkeys(
        c.coordinates[axis] for c in cells if axis in c.coordinates and any(matches(c, s) for s in claim.less)
    )
    given = claim.more if one else ()
    return [(str(v), given, tuple({**s, axis: v} for s in claim.less)) for v in others if given and v not in one]


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
    claim: Claim,
    label: str,
    more: Sequence[Selection],
    less: Sequence[Selection],
    cells: Sequence[Cell],
    num_comparisons: int,
) -> Comparison | None:
    """One comparison over all settings that have its cells; None where none has."""
    q = quantity(claim.of)
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
    finding = _finding(claim, estimate, q, 0.95)
    stays = finding != "cannot be told" and _finding(claim, estimate, q, 1 - 0.05 / num_comparisons) == finding
    value, low, high = (math.exp(x) if q.by_ratio else x for x in (estimate.value, *estimate.interval()))
    return Comparison(
        label, value, low, high, estimate.num_runs, estimate.num_rows, len(whole), len(of_settings), finding, stays
    )


def _terms(
    claim: Claim, q: Quantity, more: Sequence[Selection], less: Sequence[Selection], here: Sequence[Cell]
) -> _Terms | None:
    """The weighted cells of one setting; empty where a cell lacks its result, None where there are no such cells."""
    found: _Terms = []
    for sign, selection in (*((1.0, s) for s in more), *((-1.0, s) for s in less)):
        chosen = [c for c in here if matches(c, selection)]
        if not chosen:
            return None
        read = [outcomes(c.result, q) for c in chosen if c.result is not None and c.is_usable]
        usable = [o for o in read if o is not None]
        if len(usable) < len(chosen):
            return []
        weights = _spread_weights(usable) if claim.spread else [1 / len(usable)] * len(usable)
        found += [(sign * w, o) for w, o in zip(weights, usable, strict=True)]
    return found


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
