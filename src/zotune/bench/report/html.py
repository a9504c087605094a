"""The report as one self-contained HTML page, rendered from sections by templates.

Figures are inline SVG and the page has no script, so it opens anywhere, prints, follows light and dark schemes, and can
be read with a keyboard and a screen reader; a plotting library would add some megabytes. The templates escape all text;
figures escape their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import zotune
from zotune.bench.report.figures import Figure
from zotune.bench.report.findings import answer, findings
from zotune.bench.report.formats import RANKED, STATES, ranked, theirs
from zotune.bench.report.phrases import ON_PAPER, SUBJECTS, main_reason, provenance, reasons, summary
from zotune.bench.report.races import RACED, RESTATED, RESTATED_TITLE, race_reading, race_title, raced, restated_texts
from zotune.bench.report.sections import Section, counted_together
from zotune.bench.report.svg import draw, marker
from zotune.bench.results.costs import cell_costs
from zotune.bench.results.passes import Race
from zotune.bench.results.published import Restated
from zotune.bench.results.quantities import Quantity, label_of, significant
from zotune.bench.results.ranking import Ranking
from zotune.bench.results.tables import Entry, Table
from zotune.bench.results.verdicts import Finding

_TEMPLATES = Path(__file__).parent / "templates"
_BADGES: dict[Finding, tuple[str, str]] = {
    "holds": ("holds", "✓"),
    "does not hold": ("fails", "✗"),
    "cannot be told": ("open", "?"),
}


class DrawnFigure(NamedTuple):
    """A figure for the templates: its panels and the symbols of its legend as SVG, and its values as a table."""

    figure: Figure
    panels: list[Markup]
    legend: list[tuple[str, Markup]]
    values: list[list[str]]


def render(template: str, **values: Any) -> str:
    """Render a template of `templates/` as a page."""
    css = (_TEMPLATES / "page.css").read_text(encoding="utf-8")
    page = _templates().get_template(template).render(css=Markup(css), version=zotune.__version__, **values)
    return page + "\n" if not page.endswith("\n") else page


@cache
def _templates() -> Environment:
    # Names of models and error messages are untrusted, so every text is escaped, whatever the template's name.
    loader = FileSystemLoader(_TEMPLATES)
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)


def draw_figure(figure: Figure) -> DrawnFigure:
    """Draw a figure for the templates."""
    panels = [Markup(draw(panel, f"{figure.name}-{i}")) for i, panel in enumerate(figure.panels)]
    legend = [(series.name, Markup(marker(series, 0, 0))) for series in figure.legend()]
    values = [
        [panel.title, series.name, p.note or f"{significant(p.x)}, {significant(p.y)}"]
        for panel in figure.panels
        for series in panel.series
        for p in series.points
    ]
    return DrawnFigure(figure, panels, legend, values)


def page(sections: Sequence[Section], scale: str, results: str = "..") -> str:
    """Render the report on a scale.

    Args:
        sections: one for each experiment, in the order of the page.
        scale: the scale of their cells.
        results: the folder of results, from the page's folder; links lead to the results' files below it.
    """
    sections = counted_together(sections)
    views = [_view(section, results) for section in sections]
    verdicts = [verdict for section in sections for verdict in section.verdicts]
    stale = sum(cell.state == "stale" for section in sections for cell in section.cells)
    return render(
        "report.html",
        scale=scale,
        header=provenance(sections),
        findings=findings(sections),
        stale=stale,
        num_cells=sum(len(section.cells) for section in sections),
        sections=views,
        summary=summary(verdicts) if verdicts else "",
        ranked=RANKED,
        claims=_by_subject([verdict for view in views for verdict in view["verdicts"]]),
    )


def _by_subject(every: Sequence[dict[str, Any]]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """The verdicts of each subject, with what decides them."""
    groups = [(subject, text, [v for v in every if v["subject"] == subject]) for subject, text in SUBJECTS.items()]
    return [group for group in groups if group[2]]


# A section ------------------------------------------------------------------------------------------------


def _view(section: Section, results: str) -> dict[str, Any]:
    """The texts of a section for the template."""
    states = Counter(cell.state for cell in section.cells)
    stale = states["stale"]
    is_mixed = 0 < stale < len(section.cells)
    warning = f"{stale} cells (†) were computed with other code or config than today’s" if is_mixed else ""
    experiment = section.experiment
    return {
        "name": section.name,
        "title": experiment.title,
        "question": experiment.question,
        "states": _state_counts(states),
        "warning": warning,
        "command": f"zotune bench run {section.name} --scale {section.scale}",
        "folder": link(results, f"{section.scale}/{section.name}/"),
        "comparable": [line for line in experiment.comparable.strip().split("\n") if line.strip()],
        "table": _table(section.table, results),
        "figures": [draw_figure(figure) for figure in section.figures],
        "verdicts": [_verdict(section, i, results) for i, _ in enumerate(section.verdicts)],
        "races": [_race(race, results) for race in section.races] + _restated(section.restated, results),
        "rankings": [_ranking(ranking, results) for ranking in section.rankings],
        "costs": _costs(section),
        "failures": [
            (c.result.cell, f"{c.state.replace('_', ' ')}: {c.result.message}")
            for c in section.cells
            if c.result is not None and not c.is_usable
        ],
    }


def _state_counts(states: Counter[Any]) -> str:
    """The numbers of cells by state.

    >>> _state_counts(Counter(["done", "done", "missing"]))
    '2 of 3 cells done, 1 missing'
    >>> _state_counts(Counter(["stale", "stale"]))
    '2 cells, stale'
    """
    if len(states) == 1:
        return f"{states.total()} cells, {next(iter(states))}".replace("_", " ")
    rest = [f"{n} {state}".replace("_", " ") for state, n in sorted(states.items()) if state != "done"]
    return ", ".join([f"{states['done']} of {states.total()} cells done", *rest])


def link(results: str, source: str) -> str:
    """The address of a result's file from the page.

    >>> link("..", "cpu/table6/one query.json")
    '../cpu/table6/one%20query.json'
    """
    return f"{results}/{quote(source)}"


def _table(table: Table, results: str) -> dict[str, Any]:
    # Values that all rows share are in the caption only.
    vary = [i for i, _ in enumerate(table.row_axes) if len({row[i] for row in table.rows}) > 1]
    shown_axes = vary or list(range(len(table.row_axes)))[-1:]
    return {
        "axes": [table.row_axes[i].replace("_", " ") for i in shown_axes],
        "heads": [table.heading(column) for column in table.columns],
        "caption": _caption(table, shown_axes),
        "rows": [
            {
                "place": [row[i] for i in shown_axes],
                "cells": [_cell(e, c.quantity, results) for e, c in zip(entries, table.columns, strict=True)],
            }
            for row, entries in zip(table.rows, table.entries, strict=True)
        ],
        "baselines": [
            (name, ["" if n is None else c.quantity.text(n) for n, c in zip(numbers, table.columns, strict=True)])
            for name, numbers in table.baselines
        ],
    }


def _caption(table: Table, shown_axes: Sequence[int]) -> str:
    """The caption of a table: the values that all rows share, and how to read the numbers."""
    shared = [
        f"{axis.replace('_', ' ')}: {table.rows[0][i]}"
        for i, axis in enumerate(table.row_axes)
        if i not in shown_axes and table.rows
    ]
    quantities = {column.quantity.name: column.quantity for column in table.columns}
    if len(quantities) == 1:
        shared += [label_of(q, table.metric) for q in quantities.values()]
    together = "; ".join(shared)
    texts = [f"{together[0].upper()}{together[1:]}."] if shared else []
    if any(not q.by_ratio for q in quantities.values()):
        texts.append(
            "Each entry shows the mean ± standard error over seeds, then the 95 % interval over evaluation rows and "
            "seeds, the paper’s number, and our number’s difference from it."
        )
    if any(q.by_ratio for q in quantities.values()):
        texts.append("× is the ratio to the first number of the column, for our numbers and the paper’s separately.")
    return " ".join(texts)


def _cell(entry: Entry, q: Quantity, results: str) -> dict[str, Any]:
    value, interval = "", ""
    if entry.mean is not None:
        value = q.text(entry.mean)
        value += f" ± {q.text(entry.error)}" if entry.error is not None and not q.by_ratio else ""
        value += f" ×{entry.ratio:.2f}" if entry.ratio is not None else ""
    if entry.low is not None and entry.high is not None:
        interval = f"{q.text(entry.low)} to {q.text(entry.high)}"
    return {
        "value": value,
        "link": link(results, entry.sources[0]) if len(entry.sources) == 1 else "",
        "interval": interval,
        "mark": "stale: computed with other code or config than today’s" if entry.state == "stale" else "",
        "state": STATES[entry.state],
        "message": entry.message,
        "paper": [f"paper {theirs(number, q)}" for number in entry.paper],
    }


def _verdict(section: Section, number: int, results: str) -> dict[str, Any]:
    verdict, on_paper = section.verdicts[number], section.on_paper[number]
    kind, sign = _BADGES[verdict.finding]
    return {
        "id": f"{section.name}-claim-{number + 1}",
        "kind": kind,
        "sign": sign,
        "finding": verdict.finding,
        "subject": verdict.claim.subject,
        "sentence": verdict.claim.sentence,
        "where": verdict.claim.where,
        "on_paper": ON_PAPER[on_paper],
        "contradicted_by": verdict.claim.contradicted_by,
        "reason": main_reason(verdict),
        "lines": [
            (reason.text, [(Path(source).stem, link(results, source)) for source in reason.sources])
            for reason in reasons(verdict)
        ],
    }


def _ranking(ranking: Ranking, results: str) -> dict[str, Any]:
    """A ranking's texts: a line for each method, the best first."""
    target = "" if ranking.target is None else f" The target is {ranking.target:.1f} % on the held-out rows."
    lines = [(link(results, r.source) if r.source else "", ranked(r, ranking)) for r in ranking.lines]
    return {"budget": ranking.budget, "answer": answer(ranking), "target": target, "lines": lines}


def _race(race: Race, results: str) -> dict[str, Any]:
    """The texts of the methods on their way to a target."""
    lines = [(link(results, way.source), raced(way)) for way in race.ways]
    return {"title": race_title(race), "reading": race_reading(race), "heads": RACED, "lines": lines}


def _costs(section: Section) -> dict[str, Any] | None:
    costs = cell_costs(section.cells)
    if not costs:
        return None
    lines = [[v if isinstance(v, str) else "–" if v is None else significant(v) for v in row.values()] for row in costs]
    return {"heads": list(costs[0]), "lines": lines}


def _restated(claims: Sequence[Restated], results: str) -> list[dict[str, Any]]:
    """The texts of published claims, as those of one more race; none without claims."""
    lines = [(link(results, claim.sources[0]), restated_texts(claim)) for claim in claims]
    return [{"title": RESTATED_TITLE, "reading": "", "heads": RESTATED, "lines": lines}] if lines else []
