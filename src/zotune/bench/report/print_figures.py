"""Figures for papers: the panels of the page, drawn by matplotlib as PDF and SVG."""

from __future__ import annotations

import io
from typing import Any

from zotune.bench.report.figures import COLOURS, MARKERS, Figure, Panel, Series
from zotune.bench.report.svg import SHAPES

# Width of a panel in inches, its height with numbers on the y axis, and the height of a row with categories.
_WIDTH, _HEIGHT, _ROW = 3.4, 2.4, 0.22
_COLUMNS = 3
_STYLE: Any = {
    "font.size": 8,
    "axes.linewidth": 0.6,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "zotune",
}


def figure_files(figure: Figure) -> dict[str, bytes]:
    """Draw a figure; return the contents of its files by their endings, `pdf` and `svg`.

    Equal figures give equal bytes.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas

    columns = min(_COLUMNS, len(figure.panels))
    lines = -(-len(figure.panels) // columns)
    height = max(map(_height, figure.panels))
    with mpl.rc_context(_STYLE):
        canvas = Canvas(figsize=(_WIDTH * columns, height * lines), layout="constrained")
        for i, panel in enumerate(figure.panels):
            draw_panel(panel, canvas.add_subplot(lines, columns, i + 1))
        _add_legend(canvas, figure)
        files = {}
        for ending, dates in (("pdf", {"CreationDate": None}), ("svg", {"Date": None})):
            out = io.BytesIO()
            canvas.savefig(out, format=ending, metadata=dates)
            files[ending] = out.getvalue()
    return files


def _height(panel: Panel) -> float:
    return 0.8 + _ROW * len(panel.categories) if panel.categories else _HEIGHT


def draw_panel(panel: Panel, axes: Any) -> None:
    """Draw a panel on matplotlib's axes."""
    axes.set_title(panel.title, fontsize=8)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.grid(linewidth=0.3, alpha=0.5)
    if panel.log_x:
        axes.set_xscale("log")
    if panel.log_y:
        axes.set_yscale("log")
    for series in panel.series:
        _draw_series(series, axes, is_upright=not panel.categories)
    for _, value in panel.lines:
        axes.axvline(value, color="0.5", linewidth=0.7, linestyle=":")
    if panel.equal:
        axes.axline((1, 1), (2, 2), color="0.5", linewidth=0.7, linestyle=":")
    if panel.categories:
        axes.set_yticks(range(len(panel.categories)), [str(c) for c in panel.categories])
        axes.set_ylim(len(panel.categories) - 0.5, -0.5)
    if panel.x_range and panel.y_range:
        axes.update_datalim([(panel.x_range[0], panel.y_range[0]), (panel.x_range[1], panel.y_range[1])])
        axes.autoscale_view()
    if panel.from_zero:
        (axes.set_xlim if panel.categories else axes.set_ylim)(0)


def _draw_series(series: Series, axes: Any, *, is_upright: bool) -> None:
    colour = _colour(series)
    xs, ys = [p.x for p in series.points], [p.y for p in series.points]
    if series.banded:
        band = [(p.y if p.low is None else p.low, p.y if p.high is None else p.high) for p in series.points]
        axes.fill_between(xs, [low for low, _ in band], [high for _, high in band], color=colour, alpha=0.15, lw=0)
    for p in series.points:
        if p.dots:
            along = [p.x] * len(p.dots), p.dots
            axes.scatter(*(along if is_upright else (p.dots, [p.y] * len(p.dots))), s=2, color=colour, alpha=0.5)
        if p.low is not None and p.high is not None and not series.banded:
            ends = ([p.x, p.x], [p.low, p.high]) if is_upright else ([p.low, p.high], [p.y, p.y])
            axes.plot(*ends, color=colour, linewidth=0.8)
    axes.plot(xs, ys, **_style(series))


def _style(series: Series) -> dict[str, Any]:
    colour = _colour(series)
    return {
        "color": colour,
        "marker": _marker(series),
        "markersize": 4,
        "markeredgewidth": 0.8,
        "markeredgecolor": colour,
        "markerfacecolor": "none" if series.hollow else colour,
        "linewidth": 0.9 if series.joined else 0,
        "linestyle": ("--" if series.hollow else "-") if series.joined else "none",
        "label": series.name,
    }


def _marker(series: Series) -> Any:
    """The marker of the page with its corners mirrored, since the y axis of SVG points down."""
    shape = MARKERS[series.style % len(MARKERS)]
    return "o" if shape == "circle" else [(x, -y) for x, y in (*SHAPES[shape], SHAPES[shape][0])]


def _colour(series: Series) -> str:
    colour = COLOURS[series.style % len(COLOURS)]
    return "black" if colour == "ink" else colour


def _add_legend(canvas: Any, figure: Figure) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], **_style(series)) for series in figure.legend()]
    if len(lines) > 1:
        canvas.legend(handles=lines, loc="outside lower center", ncols=min(4, len(lines)), fontsize=7, frameon=False)
