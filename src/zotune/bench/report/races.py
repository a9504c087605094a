"""The texts of methods on their way to targets, and of what their authors claim: for HTML pages and for Markdown."""

from __future__ import annotations

import math

from zotune.bench.results.passes import Median, Race, Ratio, Way
from zotune.bench.results.published import Restated

RACED = ("method", "passes (95 %)", "times fewer (95 %)", "runs that reach it")
"""The heads of the columns of `raced`."""


RESTATED = ("claim", "place", "against", "measured (95 %)", "here")
"""The heads of the columns of `restated_texts`."""
RESTATED_TITLE = "What the methods' authors publish, and what these runs say"


def race_title(race: Race) -> str:
    """What is to be reached where.

    >>> from zotune.bench.spec.targets import Target
    >>> race_title(Race({"task": "sst2", "tuned": "last norm"}, Target(loss=0.6), "", ()))
    'sst2, last norm: passes to a held-out loss of 0.6'
    """
    target = race.target
    what = f"a held-out loss of {target.loss:g}" if target.loss is not None else f"{target.accuracy:g} % held-out"
    return f"{', '.join(map(str, race.place.values()))}: passes to {what}"


def race_reading(race: Race) -> str:
    """How to read the numbers."""
    fewer = f" Times fewer than {race.reference}, the best of the references." if race.reference else ""
    return (
        "Medians over seeds, in forward-equivalents; ∞ where fewer than half of the runs reach the target. Of a ratio "
        f"with such a median the budget gives a bound, > or <.{fewer}"
    )


def raced(way: Way) -> tuple[str, ...]:
    """A method's entries under the heads `RACED`."""
    ratio = "" if way.ratio is None else _text(way.ratio, digits=1)
    return way.method, _text(way.passes, digits=0), ratio, f"{way.num_reached} of {way.num_runs}"


def restated_texts(found: Restated) -> tuple[str, ...]:
    """A published claim's entries under the heads `RESTATED`."""
    unit = "times fewer" if found.claim.times is not None else "points"
    measured = "–" if found.measured is None else _text(found.measured, digits=1)
    measured += f" {unit}" if measured != "–" else ""
    place = ", ".join(map(str, found.place.values()))
    return f"{found.claim.sentence} ({found.claim.source})", place, found.against, measured, found.finding


def _text(median: Median, digits: int) -> str:
    """A median with its interval.

    >>> _text(Median(1200.0, 900.0, math.inf), 0), _text(Median(2.04, 1.5, 3.1), 1)
    ('1,200 (900 to ∞)', '2.0 (1.5 to 3.1)')
    >>> _text(Ratio(math.inf, 2.5, math.inf, bound=3.8), 1), _text(Ratio(0.0, 0.0, 1.1, bound=0.7), 1)
    ('> 3.8 (2.5 to ∞)', '< 0.7 (0.0 to 1.1)')
    """
    value = _number(median.value, digits)
    if isinstance(median, Ratio) and median.bound is not None:
        value = f"{'>' if median.value else '<'} {_number(median.bound, digits)}"
    if math.isnan(median.value):
        return "–"
    return f"{value} ({_number(median.low, digits)} to {_number(median.high, digits)})"


def _number(value: float, digits: int) -> str:
    return "∞" if math.isinf(value) else f"{value:,.{digits}f}"
