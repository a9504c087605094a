"""The report as one Markdown page: tables, verdicts on the paper's claims, and the costs of runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from zotune.bench.report.findings import answer, findings
from zotune.bench.report.formats import RANKED, markdown, ranked
from zotune.bench.report.phrases import ON_PAPER, provenance, reasons, summary
from zotune.bench.report.races import RACED, RESTATED, RESTATED_TITLE, race_reading, race_title, raced, restated_texts
from zotune.bench.report.sections import Section, counted_together
from zotune.bench.results.costs import cell_costs
from zotune.bench.results.passes import Race
from zotune.bench.results.published import Restated
from zotune.bench.results.quantities import significant
from zotune.bench.results.ranking import Ranking
from zotune.bench.results.verdicts import Finding, Verdict
from zotune.messages import markdown_text

# The shown columns of a cell's costs; the others are in its JSON file.
_COSTS = ("learning rate", "rates searched", "μ", "steps", "forward-equivalents", "seconds", "step GiB")


def markdown_page(sections: Sequence[Section], title: str, introduction: str = "", *, results: str = "..") -> str:
    """Sections as one page of GitHub-flavoured Markdown.

    Args:
        sections: one for each experiment, in the order of the page.
        title: of the page.
        introduction: paragraphs that follow the title.
        results: the folder of results, from the page's folder; links lead to the results' files below it.
    """
    sections = counted_together(sections)
    verdicts = [verdict for section in sections for verdict in section.verdicts]
    parts = [f"# {title}", introduction]
    parts.append("\n".join(f"- {markdown_text(sentence.text)}" for sentence in findings(sections)))
    parts.append(summary(verdicts) if verdicts else "")
    parts.append("\n".join(f"- {markdown_text(name)}: {markdown_text(value)}" for name, value in provenance(sections)))
    for section in sections:
        parts += _section(section, results)
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(section: Section, results: str) -> Iterator[str]:
    experiment = section.experiment
    yield f"## {experiment.title}"
    yield f"**{experiment.question}**" if experiment.question else ""
    yield from map(_ranking, section.rankings)
    yield from map(_race, section.races)
    yield _restated(section.restated) if section.restated else ""
    yield markdown(section.table) if section.table.rows else ""
    both = zip(section.verdicts, section.on_paper, strict=True)
    yield "\n".join(_verdict(verdict, on_paper, results) for verdict, on_paper in both)
    yield f"*Comparison with the paper.* {' '.join(experiment.comparable.split())}" if experiment.comparable else ""
    yield f"`zotune bench run {section.name} --scale {section.scale}`" if any(c.result for c in section.cells) else ""
    yield _costs(section)


def _verdict(verdict: Verdict, on_paper: Finding | None, results: str) -> str:
    claim = verdict.claim
    lines = [
        f"- **{verdict.finding}** (on the paper's own numbers: {ON_PAPER[on_paper]}): {claim.sentence} ({claim.where})"
    ]
    lines += [f"  - {reason.text}" for reason in reasons(verdict)]
    links = [f"[{Path(source).stem}]({results}/{quote(source)})" for source in verdict.sources]
    return "\n".join([*lines, *([f"  - from {', '.join(links)}"] if links else [])])


def _race(race: Race) -> str:
    """The methods on their way to a target as a table below what it is."""
    table = [f"| {' | '.join(RACED)} |", "|---|" + "--:|" * (len(RACED) - 1)]
    table += [f"| {' | '.join(map(markdown_text, raced(way)))} |" for way in race.ways]
    return "\n".join([f"{race_title(race)}. {race_reading(race)}", "", *table])


def _restated(claims: Sequence[Restated]) -> str:
    """The published claims as a table."""
    table = [f"| {' | '.join(RESTATED)} |", "|---|---|---|--:|---|"]
    table += [f"| {' | '.join(map(markdown_text, restated_texts(claim)))} |" for claim in claims]
    return "\n".join([f"{RESTATED_TITLE}.", "", *table])


def _ranking(ranking: Ranking) -> str:
    """A ranking as a table below the sentence that sums it up."""
    lines = [f"For the same {ranking.budget}, {answer(ranking)}." if ranking.budget else f"{answer(ranking)}."]
    if ranking.target is not None:
        lines[0] += f" The target is {ranking.target:.1f} % on the held-out rows."
    table = [f"| {' | '.join(RANKED)} |", "|--:|---|" + "--:|" * (len(RANKED) - 2)]
    table += [f"| {' | '.join(map(markdown_text, ranked(r, ranking)))} |" for r in ranking.lines]
    return "\n".join([*lines, "", *table])


def _costs(section: Section) -> str:
    """The costs of a run of each cell in a collapsed block; empty for cells without training."""
    rows = [row for row in cell_costs(section.cells) if row["learning rate"] is not None]
    if not rows:
        return ""
    lines = ["| cell | " + " | ".join(_COSTS) + " |", "|---|" + "--:|" * len(_COSTS)]
    for row in rows:
        lines.append(
            f"| {markdown_text(str(row['cell']))} | " + " | ".join(_number(row[name]) for name in _COSTS) + " |"
        )
    return "\n".join(["<details><summary>Costs of a run of each cell</summary>", "", *lines, "", "</details>"])


def _number(value: float | str | None) -> str:
    return "–" if value is None else markdown_text(value) if isinstance(value, str) else significant(value)
