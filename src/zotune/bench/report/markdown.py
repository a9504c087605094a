"""The report as one Markdown page: tables, verdicts on the paper's claims, and the costs of runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from zotune.bench.report.formats import markdown
from zotune.bench.report.phrases import provenance, reasons, summary
from zotune.bench.report.sections import Section
from zotune.bench.results.quantities import significant
from zotune.bench.results.tables import cell_costs
from zotune.bench.results.verdicts import Verdict
from zotune.messages import markdown_text

# The shown columns of a cell's costs; the others are in its JSON file.
_COSTS = ("learning rate", "rates searched", "μ", "steps", "forward passes", "seconds", "peak GiB")


def markdown_page(sections: Sequence[Section], title: str, introduction: str = "") -> str:
    """Sections as one page of GitHub-flavoured Markdown.

    Args:
        sections: one for each experiment, in the order of the page.
        title: of the page.
        introduction: paragraphs that follow the title.
    """
    verdicts = [verdict for section in sections for verdict in section.verdicts]
    parts = [f"# {title}", introduction, summary(verdicts) if verdicts else ""]
    parts.append("\n".join(f"- {markdown_text(name)}: {markdown_text(value)}" for name, value in provenance(sections)))
    for section in sections:
        parts += _section(section)
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(section: Section) -> Iterator[str]:
    experiment = section.experiment
    yield f"## {experiment.title}"
    yield f"**{experiment.question}**" if experiment.question else ""
    yield markdown(section.table) if section.table.rows else ""
    yield "\n".join(map(_verdict, section.verdicts))
    yield f"*Comparison with the paper.* {' '.join(experiment.comparable.split())}" if experiment.comparable else ""
    yield _costs(section)


def _verdict(verdict: Verdict) -> str:
    lines = [f"- **{verdict.finding}**: “{verdict.claim.sentence}” ({verdict.claim.where})"]
    return "\n".join([*lines, *(f"  - {line}" for line in reasons(verdict))])


def _costs(section: Section) -> str:
    """The costs of a run of each cell in a collapsed block; empty for cells without training."""
    rows = [row for row in cell_costs(section.cells) if row["forward passes"]]
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
