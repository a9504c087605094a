"""Panels of figures as SVG for the page: text stays text, and every point has its numbers as a tooltip.

The SVG is written without a plotting library, so a panel takes some kilobytes instead of megabytes of script, follows
the page's light and dark colours, prints, needs no network, and is one named image for a screen reader.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from zotune.bench.report.figures import COLOURS, MARKERS, Panel, Point, Series
from zotune.bench.results.quantities import significant

# In CSS pixels at full size; a phone shows a panel at about this width.
WIDTH, HEIGHT = 360, 250
_TOP, _RIGHT, _BOTTOM = 26, 14, 44
_ROW, _LETTER = 22, 6.3
# Size of markers, of small markers, and the number of points above which markers are small, so that the curve shows.
_SIZE, _SMALL, _CROWD = 4.5, 1.8, 40
# Radius of the dot of a single run, and its distance from the interval.
_DOT, _ASIDE = 1.8, 6.5
# Distance between the names of lines, and the letters of a name that fit.
_GAP, _MOST_LETTERS = 12.0, 18


@dataclass(frozen=True)
class Scale:
    """The map from numbers to pixels along one axis."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """The position of a number in pixels."""
        transform: Callable[[float], float] = math.log10 if self.is_log else float
        low, high = transform(self.low), transform(self.high)
        share = (transform(value) - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """Round numbers within the scale, about `count` of them."""
        return _decades(self.low, self.high) if self.is_log else round_numbers(self.low, self.high, count)


def round_numbers(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within [low, high], 1, 2 or 5 times a power of ten apart, about `count` of them.

    >>> round_numbers(0, 97), round_numbers(0.31, 0.42)
    ([0.0, 20.0, 40.0, 60.0, 80.0], [0.35, 0.4])
    """
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high], also 2 and 5 times these if the range is short."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1,) if math.log10(high / low) > 2.5 else (1, 2, 5)
    return [m * 10.0**p for p in powers for m in steps if low <= m * 10.0**p <= high]


def short(value: float) -> str:
    """Format a number for the label of a tick.

    >>> short(12000.0), short(0.25), short(2e6), short(1500.0), short(-3.0)
    ('12k', '0.25', '2M', '1.5k', '−3')
    """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}".replace("-", "−")
    return f"{value:.4g}".replace("-", "−")


def draw(panel: Panel, name: str) -> str:
    """Draw a panel as an SVG element; `name` makes its ids unique within the page."""
    height = _TOP + _BOTTOM + _ROW * len(panel.categories) if panel.categories else HEIGHT
    y = _scale(_along(panel, "y"), height - _BOTTOM, _TOP, panel.log_y)
    if panel.categories:
        y = Scale(-0.5, len(panel.categories) - 0.5, _TOP, height - _BOTTOM)
    # Space on the left for the names of categories, or for ticks and the label beside them.
    texts = panel.categories or [short(value) for value in y.ticks(5)]
    left = max([_LETTER * len(text) for text in texts], default=0) + (12 if panel.categories else 30)
    right = WIDTH - _RIGHT - _room_for_names(panel)
    x = _scale([*_along(panel, "x"), *(v for _, v in panel.lines)], left, right, panel.log_x)
    parts = [*_frame(panel, x, y, height)]
    for series in panel.series:
        parts += _series(panel, series, x, y)
    parts += _names_of_lines(panel, x, y) if panel.names_lines else []
    label = escape(f"{panel.title}: {panel.y_label} against {panel.x_label}" if panel.y_label else panel.title)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="{name}">'
        f'<title id="{name}">{label}</title>{"".join(parts)}</svg>'
    )


def _along(panel: Panel, axis: str) -> list[float]:
    """All numbers that an axis must cover."""
    measured = "x" if panel.categories else "y"
    values = [getattr(p, axis) for p in panel.points()] + list((panel.x_range if axis == "x" else panel.y_range) or ())
    if axis == measured:
        values += [end for p in panel.points() for end in (p.low, p.high, *p.dots) if end is not None]
        values += [0.0] if panel.from_zero else []
    if panel.equal:
        values += [v for p in panel.points() for v in (p.x, p.y)] + [0.0] * panel.from_zero
    return values


def _scale(values: Sequence[float], start: float, end: float, is_log: bool) -> Scale:
    """A scale that covers all values, with a margin at both ends except at zero.

    >>> _scale([1250.1, 1250.3], 0, 100, False).ticks(5)
    [1200.0, 1250.0, 1300.0]
    """
    finite = [v for v in values if math.isfinite(v) and (v > 0 or not is_log)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if is_log:
        factor = (high / low) ** 0.06 if high > low else 2.0
        return Scale(low / factor, high * factor, start, end, is_log=True)
    # Values that differ by less than a hundredth get a wide margin; filling the axis, they would look very different.
    margin = 0.06 * (high - low) if high - low > 0.01 * abs(high) else 0.05 * abs(high) or 1.0
    return Scale(low - margin * (low != 0), high + margin, start, end)


def _frame(panel: Panel, x: Scale, y: Scale, height: float) -> list[str]:
    """The title, grid, ticks and labels of a panel."""
    bottom, parts = height - _BOTTOM, [_text(0, 14, panel.title, "head")]
    for value in x.ticks(5):
        parts.append(_line(x(value), _TOP, x(value), bottom, "grid"))
        parts.append(_text(x(value), bottom + 15, short(value), "tick", "middle"))
    if panel.categories:
        for i, category in enumerate(panel.categories):
            parts.append(_line(x.start, y(i), x.end, y(i), "grid"))
            parts.append(_text(x.start - 6, y(i) + 4, category, "tick", "end"))
    else:
        for value in y.ticks(5):
            parts.append(_line(x.start, y(value), x.end, y(value), "grid"))
            parts.append(_text(x.start - 6, y(value) + 4, short(value), "tick", "end"))
        parts.append(_text(13, (_TOP + bottom) / 2, panel.y_label, "label", "middle", turned=True))
    parts.append(_text((x.start + x.end) / 2, height - 8, panel.x_label, "label", "middle"))
    if panel.equal:
        low, high = max(x.low, y.low), min(x.high, y.high)
        parts.append(_line(x(low), y(low), x(high), y(high), "guide"))
    for name, value in panel.lines:
        parts.append(_line(x(value), _TOP, x(value), bottom, "guide", title=f"{name}: {significant(value)}"))
    return parts


def _series(panel: Panel, series: Series, x: Scale, y: Scale) -> list[str]:
    parts, colour = [], colour_class(series)
    # Points that a logarithmic axis cannot show are left out.
    points = [p for p in series.points if not (panel.log_x and p.x <= 0) and not (panel.log_y and p.y <= 0)]
    if series.joined and len(points) > 1:
        path = " ".join(f"{x(p.x):.1f},{y(p.y):.1f}" for p in points)
        parts.append(f'<polyline class="run {colour}" points="{path}"/>')
    size = _SIZE if len(points) <= _CROWD else _SMALL
    parts += [_band(points, x, y, colour)] if series.banded and len(points) > 1 else []
    for p in points:
        parts += _dots(panel, p, x, y, colour)
        if p.low is not None and p.high is not None and not series.banded:
            parts.append(_whisker(panel, p, x, y, colour))
        title = f"{series.name}: {p.note}" if p.note else f"{series.name}: {significant(p.x)}, {significant(p.y)}"
        parts.append(marker(series, x(p.x), y(p.y), title, size))
    return parts


def _whisker(panel: Panel, p: Point, x: Scale, y: Scale, colour: str) -> str:
    assert p.low is not None and p.high is not None
    if panel.categories:
        return _line(x(p.low), y(p.y), x(p.high), y(p.y), f"run {colour}")
    return _line(x(p.x), y(p.low), x(p.x), y(p.high), f"run {colour}")


def _band(points: Sequence[Point], x: Scale, y: Scale, colour: str) -> str:
    """The area between the ends of the points' intervals."""
    upper = [(x(p.x), y(p.y if p.high is None else p.high)) for p in points]
    lower = [(x(p.x), y(p.y if p.low is None else p.low)) for p in reversed(points)]
    corners = " ".join(f"{a:.1f},{b:.1f}" for a, b in (*upper, *lower))
    return f'<polygon class="band {colour}" points="{corners}"/>'


def _dots(panel: Panel, p: Point, x: Scale, y: Scale, colour: str) -> list[str]:
    """The single runs of a point, beside its interval."""
    places = [(x(v), y(p.y) + _ASIDE) if panel.categories else (x(p.x) + _ASIDE, y(v)) for v in p.dots]
    return [f'<circle class="dot {colour}" cx="{a:.1f}" cy="{b:.1f}" r="{_DOT}"/>' for a, b in places]


def _room_for_names(panel: Panel) -> float:
    """The width on the right that the names of the lines take."""
    names = [_in_short(s.name) for s in panel.series] if panel.names_lines else []
    return _LETTER * max(map(len, names)) + 10 if names else 0.0


def _in_short(name: str) -> str:
    return name if len(name) <= _MOST_LETTERS else f"{name[: _MOST_LETTERS - 1]}…"


def _names_of_lines(panel: Panel, x: Scale, y: Scale) -> list[str]:
    """The name of each line beside its end; names that would overlap move apart."""
    ends = [(s, s.points[-1]) for s in panel.series if s.points]
    wanted = [min(max(y(p.y) + 4, _TOP + 8), y.start) for _, p in ends]
    heights = spread(wanted, _GAP, _TOP + 8, y.start)
    parts = []
    for (series, _), height in zip(ends, heights, strict=True):
        parts.append(marker(series, x.end + 9, height - 4, size=_SIZE - 1, kind="key"))
        parts.append(_text(x.end + 16, height, _in_short(series.name), "tick"))
    return parts


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the wanted ones, in their order, at least `gap` apart and within [low, high] if they fit.

    >>> spread([10, 11, 40], 8, 0, 50)
    [10.0, 18.0, 40.0]
    >>> spread([48, 49, 50], 8, 0, 50)
    [34.0, 42.0, 50.0]
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    found = [0.0] * len(wanted)
    below = low - gap
    for i in order:
        found[i] = below = max(float(wanted[i]), below + gap)
    above = float(high + gap)
    for i in reversed(order):
        found[i] = above = min(found[i], above - gap)
    return found


def colour_class(series: Series) -> str:
    """The CSS classes for the colour of a series and for hollow markers."""
    return f"c{series.style % len(COLOURS)}{' hollow' if series.hollow else ''}"


def marker(series: Series, x: float, y: float, title: str = "", size: float = _SIZE, kind: str = "mark") -> str:
    """Draw the marker of a series at a position in pixels: of a point (`kind` mark), or beside a name (key)."""
    inside = f"<title>{escape(title)}</title>" if title else ""
    kind = f'class="{kind} {colour_class(series)}"'
    shape = MARKERS[series.style % len(MARKERS)]
    if shape == "circle":
        return f'<circle {kind} cx="{x:.1f}" cy="{y:.1f}" r="{size}">{inside}</circle>'
    corners = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in SHAPES[shape])
    return f'<polygon {kind} points="{corners}">{inside}</polygon>'


def _star() -> tuple[tuple[float, float], ...]:
    turns = [(math.pi * i / 5, 1.3 if i % 2 == 0 else 0.55) for i in range(10)]
    return tuple((r * math.sin(a), -r * math.cos(a)) for a, r in turns)


_HALF_PLUS = ((-0.4, -1.1), (0.4, -1.1), (0.4, -0.4), (1.1, -0.4), (1.1, 0.4), (0.4, 0.4))
_PLUS = (*_HALF_PLUS, *((-a, -b) for a, b in _HALF_PLUS))
# Corners of markers around (0, 0); the y axis points down.
SHAPES: dict[str, tuple[tuple[float, float], ...]] = {
    "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "triangle": ((0, -1.2), (1.1, 0.8), (-1.1, 0.8)),
    "diamond": ((0, -1.3), (1.1, 0), (0, 1.3), (-1.1, 0)),
    "down": ((0, 1.2), (1.1, -0.8), (-1.1, -0.8)),
    "plus": _PLUS,
    "cross": tuple(((a - b) * 0.78, (a + b) * 0.78) for a, b in _PLUS),
    "star": _star(),
    "bar": ((-0.45, -1.3), (0.45, -1.3), (0.45, 1.3), (-0.45, 1.3)),
}


def _line(x1: float, y1: float, x2: float, y2: float, kind: str, title: str = "") -> str:
    inside = f"<title>{escape(title)}</title>" if title else ""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}">{inside}</line>'


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start", *, turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turn}>{escape(text)}</text>'
