"""Passes to a target: when a run has reached it, censored runs, intervals over seeds, and which reference counts."""

import math
import statistics

import numpy as np
import pytest

from bench_results import cell as cell_of_answers
from zotune.bench.report.races import raced, restated_texts
from zotune.bench.results.cells import Cell
from zotune.bench.results.passes import median, passes_to, races, ratio
from zotune.bench.results.published import restated
from zotune.bench.results.records import CellResult, Evaluation, RunRecord, Score, Trial
from zotune.bench.spec.targets import Passes, Published, Target

LOSS = Target(loss=0.5)


def run_of(seed, losses):
    """A run with an evaluation every 10 forward-equivalents; its accuracy is 1 - loss. Calls are half of them."""
    way = [
        Evaluation(step=i, num_forwards=5 * i, forward_equivalents=10 * i, dev_loss=loss, dev_value=1 - loss)
        for i, loss in enumerate(losses)
    ]
    return RunRecord(seed=seed, evaluations=tuple(way))


def result_of(variant, runs, place="a"):
    coordinates = {"task": place, "variant": variant}
    fixed = {"experiment": "e", "scale": "cpu", "kind": "accuracy", "key": "k", "status": "done", "config": {}}
    return CellResult(cell=f"{place}--{variant}", coordinates=coordinates, runs=tuple(runs), **fixed)


def cell_of(variant, passes, place="a"):
    """A cell whose run of seed i reaches the target after passes[i] forward-equivalents, or never (None)."""
    runs = [
        run_of(seed, [0.9] * 10 if n is None else [0.9] * (n // 10) + [0.4] * (10 - n // 10))
        for seed, n in enumerate(passes)
    ]
    result = result_of(variant, runs, place)
    return Cell(result.coordinates, "done", result)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([0.9, 0.4, 0.6, 0.5, 0.4], 30),  # reached at the second, lost, reached for good at the fourth
        ([0.4, 0.4], 0),
        ([0.9, 0.4, 0.6], math.inf),
        ([0.9, None, 0.4], 20),
        ([], math.inf),
    ],
)
def test_a_target_is_reached_where_all_later_evaluations_meet_it_in_equivalents_and_not_in_calls(losses, expected):
    run = run_of(3, [0.9 if loss is None else loss for loss in losses])
    if None in losses:
        ways = [e.model_copy(update={"dev_loss": x}) for e, x in zip(run.evaluations, losses, strict=True)]
        run = run.model_copy(update={"evaluations": tuple(ways)})
    assert passes_to(result_of("v", [run]), LOSS) == {3: expected}
    if None not in losses:
        assert passes_to(result_of("v", [run]), Target(accuracy=50.0)) == {3: expected}


def test_a_censored_run_counts_as_infinitely_many_passes():
    assert median({0: 10.0, 1: 20.0, 2: math.inf}).value == 20.0
    assert median({0: 10.0, 1: math.inf, 2: math.inf}).value == math.inf
    assert ratio({0: math.inf, 1: math.inf}, {0: 10.0, 1: 10.0}).value == math.inf
    assert ratio({0: 10.0, 1: 10.0}, {0: math.inf, 1: math.inf}).value == 0
    both = ratio({0: math.inf}, {0: math.inf})
    assert math.isnan(both.value)
    assert (both.low, both.high) == (0, math.inf)


def test_a_ratio_with_a_censored_median_is_bounded_by_the_budget():
    """The reference needs more than 1,200 passes, the method 300: it needs more than four times fewer."""
    censored, own = dict.fromkeys(range(9), math.inf), dict.fromkeys(range(9), 300.0)
    more, less = ratio(censored, own, 1200.0), ratio(own, censored, 1200.0)
    assert (more.value, more.bound, more.low, more.high) == (math.inf, 4, 4, math.inf)
    assert (less.value, less.bound, less.low, less.high) == (0, 1 / 4, 0, 1 / 4)
    assert ratio(own, own, 1200.0).bound is None
    unknown = ratio(censored, censored, 1200.0)
    assert (unknown.low, unknown.high, unknown.bound) == (0, math.inf, None)
    cells = [cell_of("mezo", [None, None, 90]), cell_of("new", [20, 20, 30])]
    (race,) = races(Passes(method="variant", reference=("mezo",), targets=(LOSS,)), cells)
    way = next(way for way in race.ways if way.method == "new")
    # The last of ten evaluations.
    assert way.ratio.bound == 90 / 20
    assert raced(way)[2].startswith("> 4.5 (")


def test_the_interval_of_a_ratio_covers_the_true_one_as_often_as_it_says():
    """Log-normal passes that share half of their spread by seed; the true ratio of medians is 3."""
    generator = np.random.default_rng(1)
    covered, trials = 0, 120
    for _ in range(trials):
        shared, a, b = generator.normal(size=(3, 15)) * 0.3
        reference = dict(enumerate(3 * np.exp(shared + a)))
        found = ratio(reference, dict(enumerate(np.exp(shared + b))))
        covered += found.low <= 3 <= found.high
    # Of a nominal 95 %, with medians of 15 seeds; three standard errors below it.
    assert covered / trials > 0.95 - 3 * (0.95 * 0.05 / trials) ** 0.5


def test_seeds_are_drawn_in_pairs():
    """Where both sides vary by the seed alone, their ratio does not vary at all."""
    reference = {seed: 100.0 * (seed + 1) for seed in range(10)}
    found = ratio(reference, {seed: n / 4 for seed, n in reference.items()})
    assert (found.low, found.value, found.high) == (4, 4, 4)


def test_the_best_of_the_references_is_the_one_that_counts_and_methods_beside_are_not_compared():
    plan = Passes(method="variant", reference=("mezo*",), beside=("fo_*",), targets=(LOSS,))
    cells = [
        cell_of("mezo", [80, 90, 80]),
        cell_of("mezo_falling", [60, 50, 60]),
        cell_of("new", [20, 20, 30]),
        cell_of("worse", [None, None, 90]),
        cell_of("fo_sgd", [10, 10, 10]),
        cell_of("mezo", [70, 70, 70], place="b"),
    ]
    first, second = races(plan, cells)
    assert (first.place, first.reference) == ({"task": "a"}, "mezo_falling")
    assert (second.place, second.reference) == ({"task": "b"}, "mezo")
    assert [way.method for way in first.ways] == ["fo_sgd", "new", "mezo_falling", "mezo", "worse"]
    ways = {way.method: way for way in first.ways}
    assert ways["mezo_falling"].ratio is ways["fo_sgd"].ratio is None
    assert ways["new"].ratio.value == statistics.median([60, 50, 60]) / statistics.median([20, 20, 30])
    assert ways["worse"].ratio.value == 0
    assert (ways["worse"].num_reached, ways["worse"].num_runs) == (1, 3)
    assert raced(ways["worse"])[1].startswith("∞")
    assert ways["new"].source == "cpu/e/a--new.json"


def test_a_target_is_a_loss_or_an_accuracy_or_a_way():
    for wrong in ({}, {"loss": 0.5, "accuracy": 70.0}, {"loss": 0.5, "way": 1.0}):
        with pytest.raises(ValueError, match="give one of the three"):
            Target(**wrong)


def searched(cell, *trials):
    """The cell with trials of the search, and runs that begin at a loss of 0.9 and 10 %."""
    start = Score(value=0.1, num_examples=10, loss=0.9)
    search = [Trial(learning_rate=1.0, seed=100, dev_loss=loss, dev_value=value) for loss, value in trials]
    runs = [run.model_copy(update={"dev_before": start}) for run in cell.result.runs]
    result = cell.result.model_copy(update={"search": tuple(search), "runs": tuple(runs)})
    return Cell(result.coordinates, "done", result)


def test_a_way_ends_where_the_references_best_trial_does_in_each_place():
    cells = [
        searched(cell_of("mezo", [80, 90, 80]), (0.6, 0.3), (None, None)),
        searched(cell_of("mezo_falling", [60, 50, 60]), (0.5, 0.4), (0.7, 0.9)),
        # Better than each of the references', and a method beside them.
        searched(cell_of("new", [20, 20, 30]), (0.3, 0.8)),
        searched(cell_of("mezo", [70, 70, 70], place="b"), (0.8, 0.2)),
        cell_of("mezo", [70, 70, 70], place="without trials"),
    ]
    targets = (Target(way=0.5), Target(way=1.0), Target(way=0.5, measure="accuracy"))
    found = races(Passes(method="variant", reference=("mezo*",), targets=targets), cells)
    numbers = [(race.place["task"], race.target.loss, race.target.accuracy) for race in found]
    assert numbers == [
        *(("a", 0.7, None), ("b", 0.85, None)),
        *(("a", 0.5, None), ("b", 0.8, None)),
        *(("a", None, 25.0), ("b", None, 15.0)),
    ]
    assert {way.method: way.passes.value for way in found[0].ways} == {"mezo": 80, "mezo_falling": 60, "new": 20}


# Published claims -----------------------------------------------------------------------------------------

PLAN = {"method": "variant", "reference": ("mezo*",), "targets": (LOSS,), "published_target": LOSS}
SPREAD = [50, 60, 60, 60, 60, 60, 60, 60, 60, 70]


def claims_of(cells, *published):
    return restated(Passes(**PLAN, published=[Published(**one) for one in published]), cells)


@pytest.mark.parametrize(("times", "finding"), [(1.5, "holds"), (3.0, "cannot be told"), (9.0, "does not hold")])
def test_times_fewer_passes_are_judged_by_the_interval_of_the_ratio(times, finding):
    cells = [cell_of("mezo", [90] * 10), cell_of("mezo_falling", SPREAD), cell_of("new", [20] * 5 + [30] * 5)]
    (found,) = claims_of(cells, {"method": "new", "sentence": "fast", "source": "x", "times": times})
    expected = ratio(passes_to(cells[1].result, LOSS), passes_to(cells[2].result, LOSS))
    assert (found.measured, found.against) == (expected, "mezo_falling")
    assert expected.low == 2 and expected.high == 3
    assert found.finding == ("holds" if times <= 2 else "cannot be told" if times <= 3 else "does not hold") == finding
    assert found.sources == ("cpu/e/a--new.json", "cpu/e/a--mezo_falling.json")


def test_a_claim_is_judged_in_each_place_that_has_both_methods_against_the_named_one():
    cells = [
        *(cell_of(name, [60] * 10, place=place) for name in ("mezo", "other") for place in "abc"),
        *(cell_of("new", [20] * 10, place=place) for place in "ab"),
        cell_of("other", [None] * 10, place="without a reference"),
    ]
    cells.remove(next(c for c in cells if c.coordinates == {"task": "b", "variant": "other"}))
    found = claims_of(cells, {"method": "new", "sentence": "s", "source": "x", "times": 2, "against": "other"})
    assert [(one.place, one.against, one.measured.value) for one in found] == [({"task": "a"}, "other", 3.0)]


def test_where_nobody_reaches_the_target_nothing_can_be_told():
    cells = [cell_of("mezo", [None] * 10), cell_of("new", [None] * 10)]
    (found,) = claims_of(cells, {"method": "new", "sentence": "s", "source": "x", "times": 2})
    assert found.finding == "cannot be told"
    assert restated_texts(found)[3] == "–"


def scored(variant, right):
    """A cell whose runs have these rows right, and are at the target from the start."""
    cell = cell_of_answers({"task": "a", "variant": variant}, right)
    runs = [run.model_copy(update={"evaluations": run_of(0, [0.4]).evaluations}) for run in cell.result.runs]
    return Cell(cell.coordinates, "done", cell.result.model_copy(update={"runs": tuple(runs)}))


@pytest.mark.parametrize(
    ("points", "finding"), [(-1, "holds"), (3, "holds"), (7, "cannot be told"), (15, "does not hold")]
)
def test_points_of_accuracy_are_judged_over_rows_and_seeds(points, finding):
    """Seven of ten rows are right with the reference, and 7 points more of the same rows with the method."""
    right = np.arange(1000) % 10 < 7
    more = right | (np.arange(1000) % 100 >= 79)
    cells = [scored("mezo", np.stack([right] * 5)), scored("new", np.stack([more] * 5))]
    (found,) = claims_of(cells, {"method": "new", "sentence": "better", "source": "x", "points": points})
    assert found.measured.value == pytest.approx(7.0)
    assert 3 < found.measured.low < 7 < found.measured.high < 15
    assert found.finding == finding
    assert restated_texts(found)[3].startswith("7.0 (") and restated_texts(found)[3].endswith("points")


def test_a_published_claim_is_about_passes_or_accuracy():
    for wrong in ({}, {"times": 2.0, "points": 1.0}):
        with pytest.raises(ValueError, match="give one of the two"):
            Published(method="new", sentence="s", source="x", **wrong)
