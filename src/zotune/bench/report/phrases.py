"""The sentences of reports: where the results come from, and the verdict on each claim with its reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from zotune.bench.report.sections import Section
from zotune.bench.results.quantities import quantity, significant
from zotune.bench.results.verdicts import Comparison, Verdict, count_findings


def provenance(sections: Iterable[Section]) -> list[tuple[str, str]]:
    """The states, dates, code and machines of the results, as pairs of a label and a text."""
    cells = [cell for section in sections for cell in section.cells]
    results = [cell.result for cell in cells if cell.result is not None]
    states = Counter(cell.state for cell in cells)
    rows = [("cells", f"{len(cells)}: {counts(states)}" if cells else "none")]
    if results:
        rows.append(("computed", _span([r.time[:10] for r in results])))
        rows.append(("commit", counts(Counter(r.commit[:12] + "+" * r.commit.endswith("+") for r in results), 4)))
        names = dict.fromkeys(name for r in results for name in r.environment)
        for name in names:
            rows.append((name.replace("_", " "), counts(Counter(r.environment.get(name, "–") for r in results), 4)))
        seconds = sum(run.seconds for r in results for run in r.runs) + sum(
            t.seconds for r in results for t in r.search
        )
        rows.append(("training time with search", f"{significant(seconds / 3600)} h"))
    return rows


def counts(counter: Counter[Any], most: int = 9) -> str:
    """The values of a counter with their numbers; a single value without its number.

    >>> counts(Counter(["a", "a"])), counts(Counter(["done", "done", "failed"]))
    ('a', '2 done, 1 failed')
    """
    if len(counter) == 1:
        return str(next(iter(counter))).replace("_", " ")
    parts = [f"{count} {value}".replace("_", " ") for value, count in counter.most_common(most)]
    return ", ".join(parts) + (f" and {len(counter) - most} more" if len(counter) > most else "")


def summary(verdicts: Sequence[Verdict]) -> str:
    """The number of claims with each finding, and how many of them chance alone would give."""
    findings = count_findings(verdicts)
    texts = ", ".join(f"{n} {'claim' if n == 1 else 'claims'}: {finding}" for finding, n in findings if n)
    decided = [v for v in verdicts if v.finding != "cannot be told"]
    staying = sum(v.stays for v in decided)
    text = f"Of {len(verdicts)} claims, on this model: {texts}."
    if decided:
        text += (
            f" Each claim is tested by itself, so about one in forty claims without any effect would seem to hold; "
            f"{staying} of the {len(decided)} decided claims keep their verdict when all comparisons of their table "
            "are counted."
        )
    return text


def reasons(verdict: Verdict) -> list[str]:
    """The comparisons behind a verdict, the difference that the claim requires, and limits of the verdict."""
    by_ratio = quantity(verdict.claim.of).by_ratio
    lines = [_comparison(c, by_ratio=by_ratio) for c in verdict.comparisons]
    if verdict.claim.within is not None or verdict.claim.by:
        lines.append(f"the claim requires {_requirement(verdict, by_ratio=by_ratio)}")
    if verdict.reason:
        lines.append(verdict.reason)
    elif verdict.finding != "cannot be told" and not verdict.stays:
        lines.append(
            "the verdict changes to “cannot be told” when all comparisons of this table are counted (Bonferroni)"
        )
    return lines


def _requirement(verdict: Verdict, *, by_ratio: bool) -> str:
    claim = verdict.claim
    amount = claim.by if claim.within is None else claim.within
    text = f"{100 * amount:g} %" if by_ratio else f"{amount:g} points".replace("-", "−")
    return f"a difference above {text}" if claim.within is None else f"equal values within {text}"


def _comparison(comparison: Comparison, *, by_ratio: bool) -> str:
    """One comparison in words."""
    numbers = (comparison.value, comparison.low, comparison.high)
    sign = "×" if by_ratio else ""
    value, low, high = (f"{sign}{x:.2f}" if by_ratio else f"{x:+.1f}".replace("-", "−") for x in numbers)
    known = comparison.low > float("-inf") and comparison.high < float("inf")
    between = f" ({low} to {high})" if known else " (one measurement, no interval)"
    unit = "" if by_ratio else " points"
    rows = f" × {comparison.num_rows} rows" if comparison.num_rows > 1 else ""
    settings = ""
    if comparison.of_settings > 1:
        settings = f", {comparison.num_settings} of {comparison.of_settings} settings"
    label = f"{comparison.label}: " if comparison.label else ""
    runs = "1 run" if comparison.num_runs == 1 else f"{comparison.num_runs} runs"
    return f"{label}{value}{unit}{between}; {runs} per cell{rows}{settings}"


def _span(days: Sequence[str]) -> str:
    first, last = min(days), max(days)
    return first if first == last else f"{first} to {last}"
