"""A report as one Markdown page, for repositories and notes: tables, verdicts on claims, and what runs spent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from zotune.bench.report.formats import markdown
from zotune.bench.report.phrases import provenance, reasons, summary
from zotune.bench.report.sections import Section
from zotune.bench.results.quantities import significant
from zotune.bench.results.spent import budgets
from zotune.bench.results.verdicts import Verdict

# Of what a cell spent, the columns that say most; the others are in its JSON.
_SPENT = ("learning rate", "rates searched", "μ", "steps", "forward passes", "seconds", "peak GiB")


def markdown_page(sections: Sequence[Section], title: str, introduction: str = "") -> str:
    """Sections as one page of GitHub-flavoured Markdown.

    Args:
        sections: one an experiment, in the order of the page.
        title: of the page.
        introduction: paragraphs that follow the title.
    """
    found = [verdict for section in sections for verdict in section.verdicts]
    parts = [f"# {title}", introduction, summary(found) if found else ""]
    parts.append("\n".join(f"- {name}: {value}" for name, value in provenance(sections)))
    for section in sections:
        parts += _section(section)
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(section: Section) -> Iterator[str]:
    experiment = section.experiment
    yield f"## {experiment.title}"
    yield f"**{experiment.question}**" if experiment.question else ""
    yield markdown(section.table) if section.table.rows else ""
    yield "\n".join(map(_verdict, section.verdicts))
    yield f"*What may be compared.* {' '.join(experiment.comparable.split())}" if experiment.comparable else ""
    yield _spent(section)


def _verdict(verdict: Verdict) -> str:
    lines = [f"- **{verdict.finding}**: “{verdict.claim.sentence}” ({verdict.claim.where})"]
    return "\n".join([*lines, *(f"  - {line}" for line in reasons(verdict))])


def _spent(section: Section) -> str:
    """What a run of each cell took, folded away; nothing for cells that only foretell."""
    rows = [row for row in budgets(section.cells) if row["forward passes"]]
    if not rows:
        return ""
    lines = ["| cell | " + " | ".join(_SPENT) + " |", "|---|" + "--:|" * len(_SPENT)]
    for row in rows:
        lines.append(f"| {row['cell']} | " + " | ".join(_number(row[name]) for name in _SPENT) + " |")
    return "\n".join(["<details><summary>What a run of each cell spent</summary>", "", *lines, "", "</details>"])


def _number(value: float | str | None) -> str:
    return "–" if value is None else value if isinstance(value, str) else significant(value)
