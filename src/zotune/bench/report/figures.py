"""Figures as data: panels of series of points, from which both the page's SVG and the files for papers are drawn.

Colours are Okabe and Ito's (2008), told apart also by those who see few; each series has a marker of its own too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from zotune.llm.config.method import MethodName

# Okabe and Ito's palette; its black is the ink of the page, and in place of its yellow, which white paper swallows, a
# grey that is none of the others to those who see few colours. `page.css` has the same, and what differs in the dark.
COLOURS = ("ink", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5A5A5A")
# As many again that no factor is shared: the same pair comes back after 72 series.
MARKERS = ("circle", "square", "triangle", "diamond", "down", "plus", "cross", "star", "bar")


@dataclass(frozen=True)
class Point:
    """A point; `low` and `high` are the ends of its interval along the measured axis, `note` says it in words."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one name.

    Attributes:
        style: which colour and marker, as an index of `COLOURS` and of `MARKERS`.
        joined: drawn as a line. hollow: not ours, or not found but reckoned: the paper's, a formula's.
    """

    name: str
    points: tuple[Point, ...]
    style: int = 0
    joined: bool = False
    hollow: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        categories: names of y = 0, 1, …, from the top; then intervals lie along x, else along y.
        log_x, log_y: axes of powers.
        from_zero: the measured axis begins at 0, as amounts need.
        equal: the line y = x is drawn.
        lines: upright lines and their names: what needs no tuning.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    categories: tuple[str, ...] = ()
    log_x: bool = False
    log_y: bool = False
    from_zero: bool = False
    equal: bool = False
    lines: tuple[tuple[str, float], ...] = ()

    def points(self) -> Iterator[Point]:
        """Those of all series."""
        for series in self.series:
            yield from series.points


@dataclass(frozen=True)
class Figure:
    """Panels that answer one question.

    Attributes:
        name: of its files; title: the question or what is shown; says: what to look for, also for who cannot see it.
    """

    name: str
    title: str
    says: str
    panels: tuple[Panel, ...]

    @property
    def num_points(self) -> int:
        """How many points are to be seen."""
        return sum(len(series.points) for panel in self.panels for series in panel.series)

    def legend(self) -> list[Series]:
        """One series of each name, in the order of their styles."""
        found: dict[str, Series] = {}
        for panel in self.panels:
            for series in panel.series:
                found.setdefault(series.name, replace(series, points=()))
        return sorted(found.values(), key=lambda series: (series.hollow, series.style))


def style_of(name: str, among: Sequence[str] = ()) -> int:
    """The style of a series: a method's is the same in all figures, others go by their place.

    >>> style_of("zo_adam") == style_of("zo_adam", ["zo_adam"]), style_of("b", ["a", "b"])
    (True, 1)
    """
    known = get_args(MethodName)
    if name in known:
        return known.index(name)
    return (len(known) if any(n in known for n in among) else 0) + (list(among).index(name) if name in among else 0)


def is_wide(values: Iterable[float], factor: float = 20.0) -> bool:
    """Whether positive numbers span so much that an axis of powers shows them better.

    >>> is_wide([1, 4, 16, 64]), is_wide([0, 100]), is_wide([3, 5])
    (True, False, False)
    """
    found = list(values)
    return bool(found) and min(found) > 0 and max(found) / min(found) > factor
