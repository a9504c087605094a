"""The gate: claims about accuracy count only where some method is above the untuned model and the majority class."""

import numpy as np
import pytest

from bench_results import answers, cell
from zotune.bench.results.cells import Cell
from zotune.bench.results.gate import have_learnt
from zotune.bench.results.records import Score
from zotune.bench.results.verdicts import judge
from zotune.bench.spec.claims import Claim
from zotune.llm.config.schema import validate


def claim(**fields):
    plain = {"sentence": "both are alike", "where": "here", "more": [{"method": "a"}], "less": [{"method": "b"}]}
    return validate(Claim, {**plain, **fields}, "test")


def pair(first, second, untuned=0.6, majority=0.5, num_rows=2000, task="sst2"):
    """Cells of methods a and b with baselines of these accuracies."""
    rng = np.random.default_rng(0)
    scores = {n: Score(value=v, num_examples=num_rows) for n, v in (("zero_shot", untuned), ("majority", majority))}
    rows = rng.normal(0, 0.3, num_rows)
    return [
        cell({"method": m, "task": task}, answers(rng, a, luck=0.01, rows=rows), baselines=scores)
        for m, a in (("a", first), ("b", second))
    ]


@pytest.mark.parametrize(
    ("first", "second", "untuned", "majority", "expected"),
    [
        (0.6, 0.6, 0.6, 0.5, "cannot be told"),  # nobody has learnt
        (0.8, 0.8, 0.6, 0.5, "holds"),
        (0.8, 0.8, 0.6, 0.8, "cannot be told"),  # above the untuned model, but not above the majority class
        (0.55, 0.55, 0.6, 0.5, "cannot be told"),
        (0.8, 0.6, 0.6, 0.5, "does not hold"),  # the best one has learnt
    ],
)
def test_alike_counts_only_where_somebody_has_learnt(first, second, untuned, majority, expected):
    verdict = judge(claim(within=4.0), pair(first, second, untuned, majority))
    assert verdict.finding == expected
    assert ("untuned model" in verdict.reason) == (expected == "cannot be told")


def test_a_little_above_the_untuned_model_may_be_noise():
    few = pair(0.62, 0.6, num_rows=200)
    assert not have_learnt(few)
    assert have_learnt(pair(0.75, 0.6, num_rows=2000))


def test_the_best_of_many_that_have_not_learnt_hardly_ever_passes():
    rng, passes = np.random.default_rng(1), 0
    baselines = {"zero_shot": Score(value=0.6, num_examples=10**9)}
    for _ in range(60):
        cells = [
            cell({"method": str(i)}, answers(rng, 0.6, luck=0.05, num_rows=150), baselines=baselines) for i in range(8)
        ]
        passes += have_learnt(cells)
    # Eight chances of a fortieth each would be a fifth.
    assert passes <= 5


def test_known_answers_of_the_untuned_model_are_paired_row_by_row():
    rng = np.random.default_rng(2)
    rows = rng.normal(0, 4, 300)
    untuned = answers(rng, 0.6, num_runs=1, rows=rows)[0]
    right = np.repeat(untuned[None], 3, axis=0)
    right[:, np.flatnonzero(~untuned)[:12]] = True
    score = Score(value=float(untuned.mean()), num_examples=300)
    marks = "".join("1" if hit else "0" for hit in untuned)
    unpaired = [cell({"method": "a"}, right, baselines={"zero_shot": score})]
    paired = [
        Cell(c.coordinates, "done", c.result.model_copy(update={"baseline_right": {"zero_shot": marks}}))
        for c in unpaired
    ]
    assert (have_learnt(unpaired), have_learnt(paired)) == (False, True)


def test_settings_where_nobody_has_learnt_do_not_count_and_are_named():
    found = pair(0.8, 0.7, task="sst2") + pair(0.6, 0.6, task="copa")
    (comparison,) = judge(claim(), found).comparisons
    assert (comparison.num_settings, comparison.of_settings, comparison.num_unlearnt) == (1, 2, 1)
    assert comparison.value == pytest.approx(10, abs=2)


def test_a_gap_that_grows_needs_learning_on_both_tasks():
    more = [{"method": "a", "task": "copa"}, {"method": "b", "task": "sst2"}]
    less = [{"method": "b", "task": "copa"}, {"method": "a", "task": "sst2"}]
    asked = claim(more=more, less=less)
    assert judge(asked, pair(0.8, 0.78) + pair(0.9, 0.7, task="copa")).finding == "holds"
    assert judge(asked, pair(0.8, 0.78) + pair(0.6, 0.4, task="copa")).finding == "cannot be told"


def test_memory_needs_no_learning():
    found = [cell({"method": m}, measured=[{"step_bytes": b}]) for m, b in (("a", 3e9), ("b", 2e9))]
    assert judge(claim(of="step_bytes"), found).finding == "holds"
