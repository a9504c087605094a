"""What was run, and what the data say of each claim, in words: for every form that a report has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from zotune.bench.report.sections import Section
from zotune.bench.results.quantities import quantity, significant
from zotune.bench.results.verdicts import Comparison, Verdict, counted


def provenance(sections: Iterable[Section]) -> list[tuple[str, str]]:
    """What was run, by what, on what, when."""
    cells = [cell for section in sections for cell in section.cells]
    results = [cell.result for cell in cells if cell.result is not None]
    states = Counter(cell.state for cell in cells)
    rows = [("cells", f"{len(cells)}: {counts(states)}" if cells else "none")]
    if results:
        rows.append(("found", _span([r.time[:10] for r in results])))
        rows.append(("commit", counts(Counter(r.commit[:12] + "+" * r.commit.endswith("+") for r in results), 4)))
        names = dict.fromkeys(name for r in results for name in r.environment)
        for name in names:
            rows.append((name.replace("_", " "), counts(Counter(r.environment.get(name, "–") for r in results), 4)))
        seconds = sum(run.seconds for r in results for run in r.runs) + sum(
            t.seconds for r in results for t in r.search
        )
        rows.append(("training, search included", f"{significant(seconds / 3600)} h"))
    return rows


def counts(found: Counter[Any], most: int = 9) -> str:
    """Values and how often each came; the value alone where there is but one.

    >>> counts(Counter(["a", "a"])), counts(Counter(["done", "done", "failed"]))
    ('a', '2 done, 1 failed')
    """
    if len(found) == 1:
        return str(next(iter(found))).replace("_", " ")
    parts = [f"{count} {value}".replace("_", " ") for value, count in found.most_common(most)]
    return ", ".join(parts) + (f" and {len(found) - most} more" if len(found) > most else "")


def summary(found: Sequence[Verdict]) -> str:
    """How many claims hold, and what of that chance alone would give."""
    counts = ", ".join(f"{n} {'claim' if n == 1 else 'claims'}: {finding}" for finding, n in counted(found) if n)
    settled = [v for v in found if v.finding != "cannot be told"]
    kept = sum(v.stays for v in settled)
    text = f"Of {len(found)} claims, on this model: {counts}."
    if settled:
        text += (
            f" Each is tested by itself, so of claims without any effect about one in forty would seem to hold; "
            f"{kept} of the {len(settled)} settled ones also stand when all comparisons of their table are counted."
        )
    return text


def reasons(verdict: Verdict) -> list[str]:
    """The comparisons that a verdict rests on, what was asked of them, and what it does not stand."""
    by_ratio = quantity(verdict.claim.of).by_ratio
    lines = [_comparison(c, by_ratio=by_ratio) for c in verdict.comparisons]
    if verdict.claim.within is not None or verdict.claim.by:
        lines.append(f"asked for: {_asked(verdict, by_ratio=by_ratio)}")
    if verdict.reason:
        lines.append(verdict.reason)
    elif verdict.finding != "cannot be told" and not verdict.stays:
        lines.append("not so when all comparisons on this table are counted (Bonferroni)")
    return lines


def _asked(verdict: Verdict, *, by_ratio: bool) -> str:
    claim = verdict.claim
    amount = claim.by if claim.within is None else claim.within
    text = f"{100 * amount:g} %" if by_ratio else f"{amount:g} points".replace("-", "−")
    return f"a difference above {text}" if claim.within is None else f"the same within {text}"


def _comparison(found: Comparison, *, by_ratio: bool) -> str:
    """One comparison in words."""
    numbers = (found.value, found.low, found.high)
    sign = "×" if by_ratio else ""
    value, low, high = (f"{sign}{x:.2f}" if by_ratio else f"{x:+.1f}".replace("-", "−") for x in numbers)
    known = found.low > float("-inf") and found.high < float("inf")
    between = f" ({low} to {high})" if known else " (one measurement, no interval)"
    unit = "" if by_ratio else " points"
    rows = f" × {found.num_rows} rows" if found.num_rows > 1 else ""
    settings = f", {found.num_settings} of {found.of_settings} settings" if found.of_settings > 1 else ""
    label = f"{found.label}: " if found.label else ""
    runs = "1 run" if found.num_runs == 1 else f"{found.num_runs} runs"
    return f"{label}{value}{unit}{between}; {runs} a cell{rows}{settings}"


def _span(days: Sequence[str]) -> str:
    first, last = min(days), max(days)
    return first if first == last else f"{first} to {last}"
