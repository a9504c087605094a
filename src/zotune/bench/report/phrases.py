"""The sentences of reports: where the results come from, and the verdict on each claim with its reasons."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from zotune.bench.report.sections import Section
from zotune.bench.results.comparisons import Comparison
from zotune.bench.results.quantities import quantity, significant
from zotune.bench.results.verdicts import Finding, Verdict, count_findings, finding_of
from zotune.bench.spec.claims import Subject

SUBJECTS: dict[Subject, str] = {
    "accuracy": "Claims about accuracy, which chance decides: verdicts follow from 95 % intervals.",
    "memory and time": "Claims about memory and time, which the machine decides: bytes need one measurement, times "
    "need three processes of ten steps.",
    "formulas": "Claims about formulas, which are compared with measurements or with each other.",
}
"""What decides the claims of each subject, in the order of reports."""
ON_PAPER: dict[Finding | None, str] = {
    "holds": "holds",
    "does not hold": "not so",
    "cannot be told": "no numbers",
    None: "no numbers",
}
"""What the paper's own numbers say about a claim."""


class Reason(NamedTuple):
    """A line behind a verdict, and the files of the results that its numbers come from."""

    text: str
    sources: tuple[str, ...] = ()


def provenance(sections: Iterable[Section]) -> list[tuple[str, str]]:
    """The models, states, dates, code and machines of the results, as pairs of a label and a text."""
    cells = [cell for section in sections for cell in section.cells]
    results = [cell.result for cell in cells if cell.result is not None]
    states = Counter(cell.state for cell in cells)
    rows = [("cells", f"{len(cells)}: {counts(states)}" if cells else "none")]
    if results:
        rows.insert(0, ("models", _models([_model(r.config) for r in results])))
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


def _models(names: Sequence[str]) -> str:
    counted = Counter(names).most_common()
    return ", ".join(f"{name} ({count} cells)" for name, count in counted) if len(counted) > 1 else names[0]


def _model(config: dict[str, Any]) -> str:
    model = str(config.get("options", {}).get("model", "unknown"))
    return f"{model.removeprefix('random:')} with random weights" if model.startswith("random:") else model


def counts(counter: Counter[Any], most: int = 9) -> str:
    """The values of a counter with their numbers; a single value without its number.

    >>> counts(Counter(["a", "a"])), counts(Counter(["done", "done", "failed"]))
    ('a', '2 done, 1 failed')
    """
    if len(counter) == 1:
        return str(next(iter(counter))).replace("_", " ")
    parts = [f"{count} {value}".replace("_", " ") for value, count in counter.most_common(most)]
    return ", ".join(parts) + (f" and {len(counter) - most} more" if len(counter) > most else "")


# Verdicts -------------------------------------------------------------------------------------------------


def summary(verdicts: Sequence[Verdict]) -> str:
    """The number of claims with each finding, and what the verdicts are sure of."""
    text = f"Of {len(verdicts)} claims, on this model: {in_numbers(verdicts)}."
    decided = [v for v in verdicts if v.finding != "cannot be told" and v.is_tested]
    if decided:
        staying = sum(v.stays for v in decided)
        text += (
            f" Each verdict by itself is wrong with a chance of 5 % at most; {staying} of the {len(decided)} that "
            "chance could have decided stand when all claims of this report are counted (Holm). An interval covers the "
            "evaluation rows and the seeds that might have been drawn; it does not cover another set of training rows "
            "or another search, of which there is one each."
        )
    return text


def in_numbers(verdicts: Sequence[Verdict]) -> str:
    """How many claims have each finding.

    >>> in_numbers([])
    'none'
    """
    verbs = {"holds": ("holds", "hold"), "does not hold": ("does not hold", "do not hold")}
    parts = [(n, verbs.get(f, (f, f))[n > 1]) for f, n in count_findings(verdicts) if n]
    return ", ".join(f"{n} {verb}" for n, verb in parts) or "none"


def reasons(verdict: Verdict) -> list[Reason]:
    """The comparisons behind a verdict, the difference that the claim requires, and limits of the verdict."""
    by_ratio = quantity(verdict.claim.of).by_ratio
    lines = [Reason(in_words(c), c.sources) for c in verdict.comparisons]
    if verdict.claim.within is not None or verdict.claim.by:
        lines.append(Reason(f"the claim requires {_requirement(verdict, by_ratio=by_ratio)}"))
    if verdict.claim.settings != "mean" and len(verdict.by_setting) > 1:
        where = {"all": "in each setting", "half": "in half of the settings at least", "some": "in some setting"}
        lines.append(Reason(f"the claim must hold {where[verdict.claim.settings]}"))
    if verdict.reason:
        lines.append(Reason(verdict.reason))
    elif verdict.is_tested and not verdict.stays:
        lines.append(
            Reason("the verdict changes to “cannot be told” when all claims of this report are counted (Holm)")
        )
    if verdict.claim.contradicted_by:
        lines.append(Reason(f"not so in the paper's own numbers: {verdict.claim.contradicted_by}"))
    return lines


def main_reason(verdict: Verdict) -> str:
    """The reason of a verdict in one line: a comparison that decides it, or why it cannot be told."""
    if verdict.reason:
        return verdict.reason
    deciding = [c for c in verdict.comparisons if finding_of(verdict.claim, c) == verdict.finding]
    if not deciding:
        return ""
    more = f"; and {len(deciding) - 1} more" if len(deciding) > 1 else ""
    return f"{_numbers(deciding[0])}{more}"


def _requirement(verdict: Verdict, *, by_ratio: bool) -> str:
    claim = verdict.claim
    amount = claim.by if claim.within is None else claim.within
    text = f"{100 * amount:g} %" if by_ratio else f"{amount:g} points".replace("-", "−")
    return f"a difference above {text}" if claim.within is None else f"equal values within {text}"


def in_words(comparison: Comparison) -> str:
    """One comparison in words: its numbers and what they rest on."""
    assert comparison.estimate is not None
    n, rows = comparison.estimate.num_runs, comparison.estimate.num_rows
    runs = "1 run" if n == 1 else f"{n} runs"
    rests_on = f"{runs} in each of {comparison.num_cells} cells" if comparison.num_cells > 1 else f"{runs} of one cell"
    rests_on += f" × {rows} rows" if rows else ""
    if comparison.of_settings > 1:
        rests_on += f", {comparison.num_settings} of {comparison.of_settings} settings"
    if comparison.num_unlearnt:
        rests_on += f" ({comparison.num_unlearnt} do not count: no method is above the untuned model there)"
    return f"{_numbers(comparison)}; {rests_on}"


def _numbers(comparison: Comparison) -> str:
    """The value of a comparison with its interval."""
    low, high = comparison.interval
    sign, by_ratio = ("×", True) if comparison.by_ratio else ("", False)
    value, low_text, high_text = (
        f"{sign}{x:.2f}" if by_ratio else f"{x:+.1f}".replace("-", "−") for x in (comparison.value, low, high)
    )
    is_known = math.isfinite(high) and comparison.estimate is not None and comparison.estimate.parts is not None
    between = f" ({low_text} to {high_text})" if is_known else " (one measurement, no interval)"
    label = f"{comparison.label}: " if comparison.label else ""
    return f"{label}{value}{'' if by_ratio else ' points'}{between}"


def _span(days: Sequence[str]) -> str:
    first, last = min(days), max(days)
    return first if first == last else f"{first} to {last}"
