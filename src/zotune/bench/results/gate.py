"""The gate of claims about accuracy: they count only where some method has learnt.

Where nobody is above the untuned model and the majority class beyond noise, all methods are equal because none works,
and an equality that a claim finds there means nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from zotune.bench.results.cells import Cell
from zotune.bench.results.intervals import Estimate, Outcomes, contrast
from zotune.bench.results.quantities import in_points, outcomes, quantity, task_of
from zotune.bench.results.records import CellResult, Score


def have_learnt(cells: Sequence[Cell]) -> bool:
    """Whether on each task among these cells one of them at least is above both baselines beyond noise.

    The level counts all cells of the task, since the best of them is looked at. A cell without baselines passes.
    """
    results = sorted((c.result for c in cells if c.result is not None and c.is_usable), key=task_of)
    by_task = [list(results_of_task) for _, results_of_task in groupby(results, task_of)]
    return all(any(_has_learnt(r, 1 - 0.05 / len(here)) for r in here) for here in by_task)


def _has_learnt(result: CellResult, level: float) -> bool:
    ours = outcomes(result, quantity("accuracy"))
    if ours is None:
        return False
    above = [_above(ours, score, result.baseline_right.get(name, "")) for name, score in result.baselines.items()]
    return all(difference.interval(level)[0] > 0 for difference in above)


def _above(ours: Outcomes, baseline: Score, right: str) -> Estimate:
    """Our mean minus a baseline's: paired row by row where the baseline's answers are known."""
    if len(right) == ours.values.shape[1] > 1:
        return contrast([(1.0, Outcomes(ours.values - np.array(in_points(right)), ours.rows, ours.seeds))])
    alone, p = contrast([(1.0, ours)]), baseline.value
    of_baseline = 1e4 * p * (1 - p) / baseline.num_examples, baseline.num_examples - 1.0
    parts = None if alone.parts is None else (*alone.parts, *([of_baseline] if of_baseline[0] else []))
    return Estimate(alone.value - 100 * p, parts, alone.num_runs, alone.num_rows)
