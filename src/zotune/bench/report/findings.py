"""The findings of a report in some sentences: the best methods, the ranking, memory, claims, and where nobody learnt.

Each sentence is made from the results that the sections show, and leads to the section that it is from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from zotune.bench.report.formats import behind, between
from zotune.bench.report.phrases import in_numbers
from zotune.bench.report.sections import Section
from zotune.bench.results.cells import Cell
from zotune.bench.results.costs import mean_of
from zotune.bench.results.gate import have_learnt
from zotune.bench.results.quantities import task_of
from zotune.bench.results.ranking import Ranking, ranking
from zotune.bench.results.records import CellResult


class Sentence(NamedTuple):
    """A finding and the name of the section that it is from."""

    text: str
    section: str


def findings(sections: Sequence[Section]) -> list[Sentence]:
    """The findings, five at most; those without results are left out."""
    found: list[Sentence] = []
    for lines in (_best(sections), _ranked(sections), _memory(sections), _claims(sections), _unlearnt(sections)):
        found += lines
    return found


def _best(sections: Sequence[Section]) -> Iterator[Sentence]:
    """The best method with and without back-propagation, where most methods were run with the same adapter and task."""
    groups = [(section, here) for section in sections for here in _alike(section)]
    if groups:
        section, here = max(groups, key=lambda pair: len(pair[1]))
        result = here[0].result
        assert result is not None
        place = f"On {task_of(result)} with {result.config['options'].get('tuning', 'all weights')}"
        yield Sentence(f"{place}, {answer(ranking('', here, 'method'))}{_untuned(result)}.", section.name)


def _alike(section: Section) -> Iterator[list[Cell]]:
    """Cells of a section that differ in the method alone."""

    def others(cell: Cell) -> tuple[tuple[str, str], ...]:
        return tuple((axis, str(v)) for axis, v in cell.coordinates.items() if axis != "method")

    usable = [c for c in section.cells if c.is_usable and "method" in c.coordinates and _has_accuracy(c)]
    for _, here in groupby(sorted(usable, key=others), key=others):
        yield list(here)


def _has_accuracy(cell: Cell) -> bool:
    return cell.result is not None and mean_of(cell.result, "accuracy") is not None


def _untuned(result: CellResult) -> str:
    score = result.baselines.get("zero_shot")
    return "" if score is None else f"; the untuned model has {100 * score.value:.1f} %"


def _ranked(sections: Sequence[Section]) -> Iterator[Sentence]:
    """The best methods of the leaderboard with and without back-propagation, budget by budget."""
    for section in sections:
        texts = [f"{r.budget}, {_best_of_both(r)}" for r in section.rankings if r.best is not None]
        if texts:
            yield Sentence(f"Best with and without back-propagation, for the same {'; '.join(texts)}.", section.name)


def _best_of_both(ranked: Ranking) -> str:
    """The best method of either kind with its accuracy."""
    firsts = {line.is_forward_only: line for line in reversed(ranked.lines) if line.place is not None}
    return " and ".join(f"{firsts[kind].name} {firsts[kind].mean:.1f} %" for kind in (False, True) if kind in firsts)


def answer(ranked: Ranking) -> str:
    """Which method is best, and how far the best of the other kind (with or without back-propagation) is behind."""
    best = ranked.best
    if best is None:
        return "no method has a result"
    text = f"{best.name} is best ({best.mean:.1f} %{between(best.low, best.high)})"
    tied = [line.name for line in ranked.lines[1:] if line.place == 1]
    text += f", and cannot be told from {', '.join(tied)}" if tied else ""
    other = next((line for line in ranked.lines if line.place and line.is_forward_only != best.is_forward_only), None)
    if other is None:
        return text
    kind = "without back-propagation" if other.is_forward_only else "with back-propagation"
    return f"{text}; the best {kind}, {other.name}, is {behind(other)}"


def _memory(sections: Sequence[Section]) -> Iterator[Sentence]:
    """The memory of a step by method, as multiples of that of ZO-SGD."""
    for section in sections:
        sizes = dict(_sizes(section))
        if "zo_sgd" in sizes and len(sizes) > 2:
            model = next(c.result for c in section.cells if c.result).config["options"].get("model", "the model")
            ratios = sorted((size / sizes["zo_sgd"], method) for method, size in sizes.items() if method != "zo_sgd")
            shown = ", ".join(f"{method} ×{ratio:.2f}" for ratio, method in ratios)
            text = f"A step of zo_sgd takes {sizes['zo_sgd']:.2f} GiB on {str(model).removeprefix('random:')}; {shown}."
            yield Sentence(text, section.name)
            return


def _sizes(section: Section) -> Iterable[tuple[str, float]]:
    measured = [c for c in section.cells if c.is_usable and c.result and c.result.kind in ("memory", "theory")]
    for cell in measured if len({tuple(c.coordinates) for c in measured}) == 1 else ():
        size = mean_of(cell.result, "step_bytes") if cell.result else None
        if set(cell.coordinates) == {"method", "model"} and size is not None:
            yield str(cell.coordinates["method"]), size


def _claims(sections: Sequence[Section]) -> Iterator[Sentence]:
    """The verdicts by subject."""
    every = [verdict for section in sections for verdict in section.verdicts]
    if not every:
        return
    by_subject = groupby(sorted(every, key=lambda v: v.claim.subject), key=lambda v: v.claim.subject)
    texts = [f"{subject}: {in_numbers(list(verdicts))}" for subject, verdicts in by_subject]
    yield Sentence(f"Of the paper's {len(every)} claims, about {'; about '.join(texts)}.", "claims")


def _unlearnt(sections: Sequence[Section]) -> Iterator[Sentence]:
    """The tasks on which no method is above the untuned model."""
    by_task: dict[str, list[Cell]] = {}
    for section in sections:
        for cell in section.cells:
            if cell.is_usable and cell.result and task_of(cell.result) and _has_accuracy(cell):
                by_task.setdefault(task_of(cell.result), []).append(cell)
    tasks = [task for task, cells in by_task.items() if not have_learnt(cells)]
    if tasks:
        where = next(s.name for s in sections for c in s.cells if c.result and task_of(c.result) == tasks[0])
        text = f"On {' and '.join(tasks)} no method is above the untuned model and the majority class beyond noise, so "
        yield Sentence(f"{text}nothing can be said about methods there.", where)
