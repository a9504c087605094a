"""What the authors of methods publish, restated as comparisons of our runs: of passes, or of accuracy.

A claim is judged in each place that has its method and the method it is compared with. Times fewer passes are judged by
the bootstrap interval of the ratio of medians (`zotune.bench.results.passes`); points of accuracy by the interval over
rows and seeds, as the paper's claims are (`zotune.bench.results.verdicts`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from zotune.bench.results.cells import Cell, agrees
from zotune.bench.results.passes import Median, Race, Ratio, races, times_fewer
from zotune.bench.results.verdicts import Finding, judge
from zotune.bench.spec.claims import Claim
from zotune.bench.spec.targets import Passes, Published
from zotune.bench.spec.vocabulary import Coordinate


@dataclass(frozen=True)
class Restated:
    """A published claim in one place.

    Attributes:
        place: the coordinates that the compared cells share.
        against: the method it is compared with.
        measured: how many times fewer passes, or how many points more, with the ends of the 95 % interval; None where
            accuracies cannot be compared.
        sources: the files of the compared results, below the folder of results.
    """

    claim: Published
    place: Mapping[str, Coordinate]
    against: str
    measured: Median | None
    finding: Finding
    sources: tuple[str, ...]


def restated(plan: Passes, cells: Sequence[Cell]) -> list[Restated]:
    """Judge the published claims of an experiment, each in the places that have what it compares."""
    places = races(plan.model_copy(update={"targets": (plan.published_target,)}), cells)
    return [found for claim in plan.published for race in places if (found := _in_place(claim, plan, race, cells))]


def _in_place(claim: Published, plan: Passes, race: Race, cells: Sequence[Cell]) -> Restated | None:
    against = claim.against or race.reference
    here = [c for c in cells if c.is_usable and agrees(c.coordinates, race.place)]
    of_place = {str(c.coordinates[plan.method]): c for c in here}
    if not {claim.method, against} <= of_place.keys():
        return None
    both = of_place[claim.method], of_place[against]
    judged = _by_passes(claim, race, *both) if claim.times is not None else _by_accuracy(claim, plan, *both)
    return Restated(claim, race.place, against, *judged, tuple(c.source for c in both))


def _by_passes(claim: Published, race: Race, own: Cell, other: Cell) -> tuple[Ratio, Finding]:
    assert own.result is not None and other.result is not None and claim.times is not None
    found = times_fewer(own.result, other.result, race.target)
    # An unknown ratio is NaN, which is on neither side.
    holds, fails = found.low >= claim.times, found.high < claim.times
    return found, "holds" if holds else "does not hold" if fails else "cannot be told"


def _by_accuracy(claim: Published, plan: Passes, own: Cell, other: Cell) -> tuple[Median | None, Finding]:
    assert claim.points is not None
    more, less = ({plan.method: c.coordinates[plan.method]} for c in (own, other))
    compared = Claim(sentence=claim.sentence, where=claim.source, more=(more,), less=(less,), by=claim.points)
    verdict = judge(compared, [own, other])
    if not verdict.comparisons:
        return None, verdict.finding
    (difference,) = verdict.comparisons
    return Median(difference.value, *difference.interval), verdict.finding
