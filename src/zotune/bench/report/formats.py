"""Tables as Markdown, CSV and LaTeX: pure functions from a table to text.

Markdown and LaTeX have the shape of the table, with our number above the paper's; CSV has one line for each number.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable

from zotune.bench.results.quantities import Quantity, signed, significant
from zotune.bench.results.ranking import Ranked, Ranking
from zotune.bench.results.tables import Column, Entry, PaperNumber, Table
from zotune.messages import markdown_text

# The text for a state where a table has no number.
STATES = {
    None: "",
    "missing": "not run",
    "failed": "failed",
    "timed_out": "out of time",
    "out_of_memory": "out of memory",
    "stale": "stale",
    "done": "–",
}


def ours(entry: Entry, q: Quantity) -> str:
    """Our number with its standard error, or the reason why there is none.

    >>> from zotune.bench.results.quantities import quantity
    >>> entry = Entry("done", 91.25, 0.31)
    >>> ours(entry, quantity("accuracy")), ours(Entry("missing"), quantity("accuracy"))
    ('91.2 ± 0.3', 'not run')
    """
    if entry.mean is None:
        return STATES[entry.state]
    text = q.text(entry.mean)
    if entry.error is not None and not q.by_ratio:
        text += f" ± {q.text(entry.error)}"
    if entry.ratio is not None:
        text += f" (×{entry.ratio:.2f})"
    return text + (" †" if entry.state == "stale" else "")


def theirs(number: PaperNumber, q: Quantity) -> str:
    """The paper's number with its label, and our number's difference from it.

    >>> from zotune.bench.results.quantities import quantity
    >>> theirs(PaperNumber("Tab. 2", "opt-1.3b", 90.1, -2.34), quantity("accuracy"))
    '(opt-1.3b) 90.1, ours −2.3'
    """
    text = f"({number.label}) {q.text(number.value)}" if number.label else q.text(number.value)
    if number.ratio is not None:
        return f"{text} (×{number.ratio:.2f})"
    return text if number.difference is None else f"{text}, ours {signed(q.text(number.difference))}"


def markdown(table: Table) -> str:
    """Write a table as a Markdown pipe table; the paper's numbers stand behind a line break in the same cell.

    >>> from zotune.bench.results.quantities import quantity
    >>> entry = Entry("done", 90.0, 0.5, paper=(PaperNumber("Tab. 2", "", 91.0, -1.0),))
    >>> print(markdown(Table("t", ("method",), ("task",), (("zo_sgd",),), (Column(("sst2",), quantity("accuracy")),),
    ...                      ((entry,),))))
    | method | sst2 |
    |---|---|
    | zo_sgd | 90.0 ± 0.5<br>paper 91.0, ours −1.0 |
    """
    heads = [markdown_text(h) for h in (*table.row_axes, *(table.heading(column) for column in table.columns))]
    lines = [heads, ["---"] * len(heads)]
    for row, entries in zip(table.rows, table.entries, strict=True):
        texts = [_markdown_cell(e, c) for e, c in zip(entries, table.columns, strict=True)]
        lines.append([*(markdown_text(str(value)) for value in row), *texts])
    for name, numbers in _baselines(table):
        lines.append([markdown_text(name), *[""] * (len(table.row_axes) - 1), *numbers])
    return "\n".join(
        "|" + "|".join(t if t == "---" else f" {t} ".replace("  ", " ") for t in line) + "|" for line in lines
    )


def _markdown_cell(entry: Entry, column: Column) -> str:
    q = column.quantity
    return "<br>".join(map(markdown_text, [ours(entry, q), *(f"paper {theirs(number, q)}" for number in entry.paper)]))


def _baselines(table: Table) -> Iterable[tuple[str, list[str]]]:
    for name, numbers in table.baselines:
        both = zip(numbers, table.columns, strict=True)
        yield name, ["" if n is None else c.quantity.text(n) for n, c in both]


# Rankings -------------------------------------------------------------------------------------------------

RANKED: tuple[str, ...] = (
    "place",
    "method",
    "accuracy (95 % interval)",
    "points behind the best",
    "forward-equivalents",
    "seconds",
    "step, GiB",
    "passes to the target",
    "seconds to it (runs)",
    "search: passes; seconds",
)
"""The heads of a ranking."""


def ranked(line: Ranked, ranking: Ranking) -> list[str]:
    """The texts of a method in a ranking, below `RANKED`."""
    if line.place is None:
        return ["–", line.name, line.reason, *["–"] * (len(RANKED) - 3)]
    return [
        str(line.place),
        line.name,
        f"{line.mean:.1f} %{between(line.low, line.high)}",
        "best" if line is ranking.best else f"{line.behind:.1f}{between(*(line.behind_interval or (None, None)))}",
        in_time(line.forward_equivalents),
        in_time(line.seconds),
        "–" if line.step_gib is None else significant(line.step_gib),
        in_time(line.passes_to_target),
        f"{in_time(line.seconds_to_target)} ({line.num_reached} of {line.num_runs})",
        f"{in_time(line.search_forward_equivalents)}; {in_time(line.search_seconds)}",
    ]


def behind(line: Ranked) -> str:
    """How far a method is behind the best, with the 95 % interval."""
    ends = line.behind_interval or (None, None)
    return f"{line.behind:.1f} points behind{between(*ends)}"


def between(low: float | None, high: float | None) -> str:
    """An interval behind a number; empty if it is not known.

    >>> between(1.04, 2.0), between(None, None)
    (', 1.0 to 2.0', '')
    """
    return "" if low is None or high is None else f", {low:.1f} to {high:.1f}".replace("-", "−")


def in_time(value: float | None) -> str:
    """A number of passes or seconds for a table; "–" if it is not known, "never" if it is infinite.

    >>> in_time(None), in_time(math.inf), in_time(1234.4)
    ('–', 'never', '1,234')
    """
    return "–" if value is None else "never" if math.isinf(value) else f"{value:,.0f}"


# Files ----------------------------------------------------------------------------------------------------


def comma_separated(table: Table) -> str:
    """Write a table as CSV: a line for each of our numbers with the paper's number, a line each if it has several."""
    out = io.StringIO()
    heads = ["mean", "standard_error", "low", "high", "num_seeds", "state"]
    paper = ["paper", "paper_source", "paper_of", "difference"]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*table.row_axes, *table.column_axes, "quantity", "unit", *heads, *paper])
    for row, entries in zip(table.rows, table.entries, strict=True):
        for column, e in zip(table.columns, entries, strict=True):
            place = [*row, *column.place, column.quantity.name, column.quantity.unit]
            numbers = [*map(_plain, (e.mean, e.error, e.low, e.high)), e.num_seeds, e.state or ""]
            for b in e.paper or (None,):
                of_paper = ["", "", "", ""] if b is None else [_plain(b.value), b.source, b.label, _plain(b.difference)]
                if e.state is not None:
                    writer.writerow([*place, *numbers, *of_paper])
    return out.getvalue()


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.10g}"


_ESCAPES = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "−": "$-$",
    "×": r"$\times$",
    "–": "--",
    "†": r"$^\dagger$",
    "μ": r"$\mu$",
}


def escaped(text: str) -> str:
    r"""Escape text for LaTeX.

    >>> print(escaped("zo_sgd, 91.2 ± 0.3 %"))
    zo\_sgd, 91.2 $\pm$ 0.3 \%
    """
    return "".join(_ESCAPES.get(c, c) for c in text)


def latex(table: Table, caption: str) -> str:
    """Write a LaTeX `table` with the paper's numbers in grey below ours; it needs booktabs, makecell and xcolor."""
    heads = [*table.row_axes, *(table.heading(column) for column in table.columns)]
    lines = [
        r"% \usepackage{booktabs,makecell,xcolor}",
        r"\begin{table}",
        rf"\caption{{{escaped(caption)}}}",
        rf"\begin{{tabular}}{{{'l' * len(table.row_axes)}{'r' * len(table.columns)}}}",
        r"\toprule",
        _row(map(escaped, heads)),
        r"\midrule",
    ]
    for row, entries in zip(table.rows, table.entries, strict=True):
        texts = [_latex_cell(e, c.quantity) for e, c in zip(entries, table.columns, strict=True)]
        lines.append(_row([*(escaped(str(v)) for v in row), *texts]))
    below = [_row([escaped(n), *[""] * (len(table.row_axes) - 1), *numbers]) for n, numbers in _baselines(table)]
    lines += [r"\midrule", *below] if below else []
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def _row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _latex_cell(entry: Entry, q: Quantity) -> str:
    papers = [rf"\textcolor{{gray}}{{{escaped(theirs(b, q))}}}" for b in entry.paper]
    lines = r"\\".join([escaped(ours(entry, q)), *papers])
    return rf"\makecell[r]{{{lines}}}" if papers else lines
