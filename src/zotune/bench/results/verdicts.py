"""Verdicts on the paper's claims from our results: a claim holds, does not hold, or cannot be told.

A claim is a statement about comparisons ("each of these in half of the settings"). A verdict is found when the
comparisons whose intervals decide them settle the statement, whatever the others are. The chance of a wrong verdict is
5 % at most: where one of several comparisons is enough for a verdict, its level counts all of them (Bonferroni). Over
all claims of a report, `adjusted` marks the verdicts that stand when all claims are counted (Holm, 1979).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from zotune.bench.results.cells import Cell
from zotune.bench.results.comparisons import FEWEST_RUNS, FEWEST_TIMED_STEPS, Comparison, Lack, comparisons
from zotune.bench.spec.claims import Claim

Finding = Literal["holds", "does not hold", "cannot be told"]
ALPHA = 0.05
"""The chance of a wrong verdict on one claim, and, for verdicts that stay, on any claim of a report."""


@dataclass(frozen=True)
class Verdict:
    """The verdict on a claim.

    Attributes:
        by_setting: the comparisons by setting, as `comparisons` returns them.
        reason: why the claim cannot be told; empty otherwise.
        stays: whether the finding is the same when all claims of the report are counted.
    """

    claim: Claim
    finding: Finding
    by_setting: tuple[tuple[Comparison, ...], ...] = ()
    reason: str = ""
    stays: bool = True

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """All comparisons that have a number."""
        return tuple(c for in_setting in self.by_setting for c in in_setting if c.is_measured)

    @property
    def sources(self) -> tuple[str, ...]:
        """The files of all results that are compared, below the folder of results."""
        return tuple(dict.fromkeys(source for c in self.comparisons for source in c.sources))

    @property
    def is_tested(self) -> bool:
        """Whether chance may decide it; an amount that was measured once is taken as it is."""
        return any(c.is_tested for c in self.comparisons)


def judge(claim: Claim, cells: Sequence[Cell]) -> Verdict:
    """Judge a claim by the cells of its experiment."""
    by_setting = tuple(comparisons(claim, cells))
    if not by_setting:
        return Verdict(
            claim, "cannot be told", reason="none of the cells that the claim compares was run at this scale"
        )
    finding = _decide(claim, by_setting, ALPHA)
    return Verdict(claim, finding, by_setting, _reason(by_setting) if finding == "cannot be told" else "")


def verdicts(claims: Sequence[Claim], cells: Sequence[Cell]) -> list[Verdict]:
    """Judge every claim of an experiment by its cells."""
    return [judge(claim, cells) for claim in claims]


def finding_of_values(claim: Claim, cells: Sequence[Cell]) -> Finding | None:
    """What the cells' values alone say about a claim, without regard to chance; None if they lack a number."""
    by_setting = [tuple(map(_as_it_is, in_setting)) for in_setting in comparisons(claim, cells)]
    finding = _decide(claim, by_setting, ALPHA)
    return None if finding == "cannot be told" else finding


def _as_it_is(comparison: Comparison) -> Comparison:
    """A comparison whose value is taken for the truth."""
    if comparison.estimate is None:
        return comparison
    return replace(comparison, estimate=replace(comparison.estimate, parts=None), lack="")


# All claims together --------------------------------------------------------------------------------------


def adjusted(every: Sequence[Verdict]) -> list[Verdict]:
    """The verdicts of all claims of a report, each marked by whether it stays when all of them are counted.

    Holm's procedure over the claims that chance may decide: the surest verdict must stand at α/n, the next at
    α/(n − 1), and so on; after the first that does not stand, none does.
    """
    tested = [i for i, verdict in enumerate(every) if verdict.is_tested]
    stays = [verdict.finding != "cannot be told" for verdict in every]
    is_standing = True
    for rank, (alpha, i) in enumerate(sorted((_least_alpha(every[i]), i) for i in tested)):
        is_standing = is_standing and alpha <= ALPHA / (len(tested) - rank)
        stays[i] = is_standing and stays[i]
    return [replace(verdict, stays=stay) for verdict, stay in zip(every, stays, strict=True)]


def _least_alpha(verdict: Verdict) -> float:
    """The smallest chance of error at which the finding is the same: the claim's p-value; 1 if it cannot be told."""
    if verdict.finding == "cannot be told":
        return 1.0
    low, high = -40.0, math.log(ALPHA)
    for _ in range(30):
        middle = (low + high) / 2
        is_found = _decide(verdict.claim, verdict.by_setting, math.exp(middle)) == verdict.finding
        low, high = (low, middle) if is_found else (middle, high)
    return math.exp(high)


def finding_of(claim: Claim, comparison: Comparison) -> Finding:
    """What one comparison by itself says about a claim."""
    return _find(claim, comparison, 1 - ALPHA, 1 - ALPHA)


# One claim ------------------------------------------------------------------------------------------------


def _decide(claim: Claim, by_setting: Sequence[Sequence[Comparison]], alpha: float) -> Finding:
    """The finding on a claim whose chance of error is at most `alpha`."""
    # Settings where nobody has learnt do not count.
    counted = [s for s in by_setting if not all(c.lack == "learning" for c in s)]
    if not counted:
        return "cannot be told"
    num_parts, num_settings = max(map(len, counted)), len(counted)
    ways_to_hold = (num_parts if claim.some else 1) * (num_settings if claim.settings in ("some", "half") else 1)
    ways_to_fail = (1 if claim.some else num_parts) * (num_settings if claim.settings in ("all", "half") else 1)
    levels = 1 - alpha / ways_to_hold, 1 - alpha / ways_to_fail
    in_settings = [
        settle([_find(claim, c, *levels) for c in in_setting], 1 if claim.some else len(in_setting))
        for in_setting in counted
    ]
    needed = {"mean": num_settings, "all": num_settings, "half": -(-num_settings // 2), "some": 1}
    return settle(in_settings, needed[claim.settings])


def settle(findings: Sequence[Finding], needed: int) -> Finding:
    """The finding on "at least `needed` of these hold", where some cannot be told.

    >>> settle(["holds", "cannot be told"], 2), settle(["holds", "does not hold"], 2)
    ('cannot be told', 'does not hold')
    >>> settle(["holds", "cannot be told"], 1), settle(["does not hold", "cannot be told"], 1)
    ('holds', 'cannot be told')
    """
    if findings.count("holds") >= needed:
        return "holds"
    return "does not hold" if len(findings) - findings.count("does not hold") < needed else "cannot be told"


def _find(claim: Claim, comparison: Comparison, level_to_hold: float, level_to_fail: float) -> Finding:
    """What an interval at either level allows about `by`, or about `within`.

    An amount that was measured once has no interval; its value alone decides.
    """
    if comparison.estimate is None or comparison.lack:
        return "cannot be told"
    estimate, is_known = comparison.estimate, comparison.estimate.parts is not None
    low, high = estimate.interval(level_to_hold) if is_known else (estimate.value, estimate.value)
    lower, upper = estimate.interval(level_to_fail) if is_known else (estimate.value, estimate.value)
    margin = claim.by if claim.within is None else claim.within
    margin = math.log1p(margin) if comparison.by_ratio else margin
    if claim.within is not None:
        if -margin < low and high < margin:
            return "holds"
        return "does not hold" if lower > margin or upper < -margin else "cannot be told"
    if low > margin:
        return "holds"
    return "does not hold" if upper < margin else "cannot be told"


_REASONS: dict[Lack, str] = {
    "learning": "no method is above the untuned model and the majority class beyond noise: there is nothing to compare",
    "runs": f"fewer than {FEWEST_RUNS} runs per cell cannot separate an effect from chance",
    "timing": f"a time counts from {FEWEST_RUNS} processes of {FEWEST_TIMED_STEPS} steps each",
    "": "the interval allows both findings",
}


def _reason(by_setting: Sequence[Sequence[Comparison]]) -> str:
    """Why a claim cannot be told."""
    every = [c for in_setting in by_setting for c in in_setting]
    lacking = sum(c.lack == "results" for c in every)
    if lacking == len(every):
        return "no setting has all the cells that the claim compares"
    if lacking:
        return f"{lacking} of {len(every)} comparisons lack cells"
    lacks = [c.lack for c in every]
    if all(lack == "learning" for lack in lacks):
        return _REASONS["learning"]
    return _REASONS[next((lack for lack in lacks if lack and lack != "learning"), "")]


def count_findings(verdicts: Sequence[Verdict]) -> Iterator[tuple[Finding, int]]:
    """Yield each finding with the number of verdicts that have it."""
    order: tuple[Finding, ...] = ("holds", "does not hold", "cannot be told")
    for finding in order:
        yield finding, sum(v.finding == finding for v in verdicts)
