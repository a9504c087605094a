"""Figures as data: panels of series of points, from which the page's SVG and the files for papers are drawn.

The colours are Okabe and Ito's (2008), which readers with colour blindness can distinguish; each series also has a
marker of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from zotune.llm.config.method import MethodName

# Okabe and Ito's palette. Its black is the text colour of the page; its yellow, which is hard to see on white, is
# replaced by a grey that stays distinct for readers with colour blindness. `page.css` has the same colours, and those
# of the dark scheme.
COLOURS = ("ink", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5A5A5A")
# Nine markers and eight colours have no common factor, so a pair repeats only after 72 series.
MARKERS = ("circle", "square", "triangle", "diamond", "down", "plus", "cross", "star", "bar")
# Largest number of lines whose names fit beside a panel.
_MOST_NAMED_LINES = 12


@dataclass(frozen=True)
class Point:
    """A point.

    Attributes:
        low, high: the ends of its interval along the measured axis.
        note: the point in words.
        dots: the numbers of single runs along the measured axis.
    """

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    note: str = ""
    dots: tuple[float, ...] = ()


@dataclass(frozen=True)
class Series:
    """Points with a common name.

    Attributes:
        style: index of the colour in `COLOURS` and of the marker in `MARKERS`, modulo their lengths.
        joined: draw a line through the points.
        hollow: draw hollow markers, for numbers of the paper or of a formula.
        banded: draw the intervals as a band along the line.
    """

    name: str
    points: tuple[Point, ...]
    style: int = 0
    joined: bool = False
    hollow: bool = False
    banded: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        categories: names of y = 0, 1, … from the top; intervals then lie along x, otherwise along y.
        log_x, log_y: whether an axis is logarithmic.
        from_zero: start the measured axis at 0, for amounts.
        equal: draw the line y = x.
        lines: names and x values of vertical lines, for the baselines.
        x_range, y_range: the least numbers that an axis must cover, so that panels share their axes.
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
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None

    @property
    def names_lines(self) -> bool:
        """Whether the lines carry their names, so that no legend is needed."""
        return not self.categories and all(s.joined for s in self.series) and len(self.series) <= _MOST_NAMED_LINES

    def points(self) -> Iterator[Point]:
        """Yield the points of all series."""
        for series in self.series:
            yield from series.points


@dataclass(frozen=True)
class Figure:
    """Panels that answer one question.

    Attributes:
        name: name of its files.
        title: the question that it answers.
        says: the caption: how to read the figure.
    """

    name: str
    title: str
    says: str
    panels: tuple[Panel, ...]

    @property
    def num_points(self) -> int:
        """Number of points in all panels."""
        return sum(len(series.points) for panel in self.panels for series in panel.series)

    def legend(self) -> list[Series]:
        """One series of each name that some panel does not write at its line, in the order of their styles."""
        by_name: dict[str, Series] = {}
        for panel in self.panels:
            for series in () if panel.names_lines else panel.series:
                by_name.setdefault(series.name, replace(series, points=()))
        return sorted(by_name.values(), key=lambda series: (series.hollow, series.style))


def style_of(name: str, among: Sequence[str] = ()) -> int:
    """The style of a series: a method has the same in all figures; any other name has that of its index in `among`.

    >>> style_of("zo_adam") == style_of("zo_adam", ["zo_adam"]), style_of("b", ["a", "b"])
    (True, 1)
    """
    known = get_args(MethodName)
    if name in known:
        return known.index(name)
    return (len(known) if any(n in known for n in among) else 0) + (list(among).index(name) if name in among else 0)


def with_shared_axes(panels: Iterable[Panel]) -> tuple[Panel, ...]:
    """The panels with axes that cover the points of all of them."""
    every = tuple(panels)
    xs, ys = ([getattr(p, axis) for panel in every for p in panel.points()] for axis in "xy")
    ys += [end for panel in every for p in panel.points() for end in (p.low, p.high) if end is not None]
    if not xs:
        return every
    log_x = any(panel.log_x for panel in every)
    x_range, y_range = (min(x for x in xs if x or not log_x), max(xs)), (min(ys), max(ys))
    return tuple(replace(panel, x_range=x_range, y_range=y_range, log_x=log_x) for panel in every)


def is_wide(values: Iterable[float], factor: float = 20.0) -> bool:
    """Whether positive numbers span more than a factor, so that a logarithmic axis shows them better.

    >>> is_wide([1, 4, 16, 64]), is_wide([0, 100]), is_wide([3, 5])
    (True, False, False)
    """
    numbers = list(values)
    return bool(numbers) and min(numbers) > 0 and max(numbers) / min(numbers) > factor
