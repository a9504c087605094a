"""Intervals of contrasts against scipy's and against simulation; verdicts against cells whose truth is known."""

import numpy as np
import pytest
import scipy.stats

from bench_results import answers, cell, table_of_methods
from zotune.bench.results.intervals import Outcomes, contrast
from zotune.bench.results.tables import Cell
from zotune.bench.results.verdicts import judge, matches, verdicts
from zotune.bench.spec.claims import Claim
from zotune.bench.spec.resolve import cells, find, names
from zotune.bench.spec.vocabulary import SCALES
from zotune.errors import UsageError
from zotune.llm.config.schema import validate


def claim(**fields):
    plain = {
        "sentence": "one is above the other",
        "where": "here",
        "more": [{"method": "a"}],
        "less": [{"method": "b"}],
    }
    return validate(Claim, {**plain, **fields}, "test")


def two(first, second, **options):
    """Cells of methods a and b."""
    return [cell({"method": "a"}, first, **options), cell({"method": "b"}, second, **options)]


def of_truth(rng, first, second, num_runs=3, num_rows=300, luck=0.15):
    rows = rng.normal(0, 1, num_rows)
    return two(*(answers(rng, a, num_runs, luck=luck, rows=rows) for a in (first, second)))


# Intervals ------------------------------------------------------------------------------------------------


def test_a_contrast_of_one_run_each_is_the_paired_t_interval_over_rows():
    rng = np.random.default_rng(0)
    a, b = (rng.random((1, 50)) for _ in range(2))
    found = contrast([(1.0, Outcomes(a)), (-1.0, Outcomes(b))]).interval()
    expected = scipy.stats.ttest_rel(a[0], b[0]).confidence_interval()
    assert found == pytest.approx((expected.low, expected.high))


def test_a_contrast_of_single_numbers_is_welchs_interval_over_runs():
    rng = np.random.default_rng(1)
    a, b = rng.random((3, 1)), 1 + 4 * rng.random((5, 1))
    found = contrast([(1.0, Outcomes(a)), (-1.0, Outcomes(b))]).interval()
    expected = scipy.stats.ttest_ind(a[:, 0], b[:, 0], equal_var=False).confidence_interval()
    assert found == pytest.approx((expected.low, expected.high))


def test_rows_of_different_tasks_are_not_paired():
    rng = np.random.default_rng(2)
    a, b = rng.random((1, 50)), rng.random((1, 50))
    apart = contrast([(1.0, Outcomes(a, "sst2")), (-1.0, Outcomes(b, "rte"))])
    assert apart.error == pytest.approx(np.sqrt(a.var(ddof=1) / 50 + b.var(ddof=1) / 50))
    assert contrast([(1.0, Outcomes(a, "sst2")), (-1.0, Outcomes(a, "sst2"))]).error == 0.0


@pytest.mark.sample(2)
@pytest.mark.parametrize(("num_runs", "luck", "shared"), [(3, 0.0, 1.0), (3, 0.3, 1.0), (3, 1.0, 0.5), (5, 0.3, 0.0)])
def test_intervals_hold_the_truth_nineteen_times_of_twenty(num_runs, luck, shared):
    rng, hits, trials = np.random.default_rng(3), 0, 400
    for _ in range(trials):
        rows = shared * rng.normal(0, 1.5, 250)
        pair = [Outcomes(answers(rng, 0.8, num_runs, luck=luck, rows=rows).astype(float)) for _ in range(2)]
        low, high = contrast([(1.0, pair[0]), (-1.0, pair[1])]).interval()
        hits += low <= 0 <= high
    # Of 400, three standard errors of 95 % are 3.3 points.
    assert hits / trials > 0.95 - 0.033


def test_pairing_rows_makes_intervals_narrower():
    rng = np.random.default_rng(4)
    rows = rng.normal(0, 3, 300)
    a, b = (answers(rng, 0.7, rows=rows).astype(float) for _ in range(2))
    paired = contrast([(1.0, Outcomes(a)), (-1.0, Outcomes(b))]).error
    assert paired < 0.8 * contrast([(1.0, Outcomes(a, "x")), (-1.0, Outcomes(b, "y"))]).error


# Verdicts -------------------------------------------------------------------------------------------------


def test_without_an_effect_few_claims_are_settled():
    rng = np.random.default_rng(5)
    found = [judge(claim(), of_truth(rng, 0.8, 0.8)).finding for _ in range(300)]
    settled = sum(f != "cannot be told" for f in found)
    assert settled / 300 < 0.05 + 0.038


@pytest.mark.parametrize(("first", "second", "expected"), [(0.9, 0.7, "holds"), (0.7, 0.9, "does not hold")])
def test_an_effect_is_found_and_its_sign_is_right(first, second, expected):
    rng = np.random.default_rng(6)
    found = [judge(claim(), of_truth(rng, first, second)).finding for _ in range(40)]
    assert found.count(expected) >= 36
    assert set(found) <= {expected, "cannot be told"}


def test_two_runs_or_one_cannot_tell():
    rng = np.random.default_rng(7)
    for n in (1, 2):
        verdict = judge(claim(), of_truth(rng, 0.95, 0.5, num_runs=n))
        assert verdict.finding == "cannot be told"
        assert f"{n} run" in verdict.reason


def test_the_same_within_a_margin_holds_only_if_the_interval_lies_in_it():
    rng = np.random.default_rng(8)
    same = of_truth(rng, 0.8, 0.8, num_rows=5000, luck=0.01)
    assert judge(claim(within=3.0), same).finding == "holds"
    assert judge(claim(within=0.2), same).finding == "cannot be told"
    apart = of_truth(rng, 0.8, 0.6, num_rows=5000, luck=0.01)
    assert judge(claim(within=3.0), apart).finding == "does not hold"


def test_not_worse_by_more_than_a_margin():
    rng = np.random.default_rng(9)
    found = of_truth(rng, 0.79, 0.8, num_rows=5000, luck=0.01)
    assert judge(claim(by=-5.0), found).finding == "holds"
    assert judge(claim(by=5.0), found).finding == "does not hold"


def test_the_best_must_beat_each_of_the_others():
    best = table_of_methods({"zo_adam": 0.95, "zo_sgd": 0.7, "zo_sgd_sign": 0.6}, num_rows=400)
    asked = claim(more=[{"method": "zo_adam"}], less=[{"method": "zo_sgd*"}], each="method")
    verdict = judge(asked, best)
    assert (verdict.finding, [c.label for c in verdict.comparisons]) == (
        "holds",
        ["against zo_sgd", "against zo_sgd_sign"],
    )
    assert [c.num_settings for c in verdict.comparisons] == [2, 2]
    beaten = table_of_methods({"zo_adam": 0.7, "zo_sgd": 0.95, "zo_sgd_sign": 0.5}, num_rows=400)
    assert judge(asked, beaten).finding == "does not hold"


def test_the_worst_is_below_each_of_the_others():
    found = table_of_methods({"zo_adam": 0.9, "zo_sgd": 0.8, "zo_sgd_sign": 0.5}, num_rows=400)
    asked = claim(more=[{"method": ["zo_adam", "zo_sgd"]}], less=[{"method": "zo_sgd_sign"}], each="method")
    verdict = judge(asked, found)
    assert (verdict.finding, [c.label for c in verdict.comparisons]) == ("holds", ["zo_adam", "zo_sgd"])


def test_one_of_several_settles_a_claim_only_with_all_of_them_counted():
    rng, trials = np.random.default_rng(10), 150
    asked = claim(more=[{"method": "m*"}], some="method")
    settled = 0
    for _ in range(trials):
        rows = rng.normal(0, 1, 200)
        methods = [*(f"m{i}" for i in range(6)), "b"]
        found = [cell({"method": m}, answers(rng, 0.8, luck=0.1, rows=rows)) for m in methods]
        settled += judge(asked, found).finding == "holds"
    # Six chances of a fortieth each would be a seventh.
    assert settled / trials < 0.025 + 0.04
    better = table_of_methods({"m1": 0.95, "m2": 0.6, "b": 0.7}, tunings=["lora"], num_rows=400)
    assert judge(asked, better).finding == "holds"


def test_a_difference_of_differences_asks_who_loses_more():
    rng = np.random.default_rng(11)
    rows = rng.normal(0, 1, 400)
    truth = {("zo_sgd", "aligned"): 0.9, ("zo_sgd", "none"): 0.6, ("fo_sgd", "aligned"): 0.92, ("fo_sgd", "none"): 0.9}
    found = [cell({"method": m, "prompt": p}, answers(rng, a, rows=rows)) for (m, p), a in truth.items()]
    more = [{"method": "zo_sgd", "prompt": "aligned"}, {"method": "fo_sgd", "prompt": "none"}]
    less = [{"method": "zo_sgd", "prompt": "none"}, {"method": "fo_sgd", "prompt": "aligned"}]
    (comparison,) = judge(claim(more=more, less=less), found).comparisons
    means = {place: 100 * np.mean([r.test.value for r in c.result.runs]) for place, c in zip(truth, found, strict=True)}
    lost = {m: means[m, "aligned"] - means[m, "none"] for m in ("zo_sgd", "fo_sgd")}
    assert comparison.value == pytest.approx(lost["zo_sgd"] - lost["fo_sgd"])
    assert comparison.finding == "holds"


def test_spread_is_the_standard_deviation_over_an_axis():
    rng = np.random.default_rng(12)
    rows = rng.normal(0, 1, 400)
    truth = {"lora": [0.85, 0.86, 0.84], "full": [0.95, 0.7, 0.5]}
    found = [
        cell({"method": f"zo_{i}", "tuning": t}, answers(rng, a, rows=rows))
        for t, all_ in truth.items()
        for i, a in enumerate(all_)
    ]
    asked = claim(more=[{"tuning": "full"}], less=[{"tuning": "lora"}], spread="method")
    (comparison,) = judge(asked, found).comparisons
    spread = [
        np.std([100 * np.mean([r.test.value for r in c.result.runs]) for c in part], ddof=1)
        for part in (found[:3], found[3:])
    ]
    assert comparison.value == pytest.approx(spread[1] - spread[0])
    assert comparison.finding == "holds"
    # Spreads over different methods are not of the same thing.
    assert judge(asked, found[:-1]).finding == "cannot be told"


def test_amounts_are_compared_by_ratio_and_one_measurement_is_taken_as_it_is():
    found = [
        cell({"method": m}, measured=[{"over_baseline_bytes": b}], values=[{"formula_bytes": 2e9}])
        for m, b in {"a": 3e9, "b": 2e9}.items()
    ]
    (comparison,) = judge(claim(of="over_baseline_bytes"), found).comparisons
    assert comparison.value == pytest.approx(1.5)
    assert judge(claim(of="over_baseline_bytes", by=0.6), found).finding == "does not hold"
    one = claim(of="over_baseline_bytes/formula_bytes", less=[], within=0.6)
    assert judge(one, found).comparisons[0].value == pytest.approx(1.5)
    assert judge(one, found).finding == "holds"


def test_settings_count_alike():
    found = table_of_methods({"a": 0.95, "b": 0.6}, tunings=["lora", "full", "head"])
    (comparison,) = judge(claim(), found).comparisons
    means = [100 * np.mean([run.test.value for run in c.result.runs]) for c in found]
    assert comparison.value == pytest.approx(np.mean(means[:3]) - np.mean(means[3:]))


def test_settings_that_lack_a_cell_do_not_count_and_are_named():
    found = table_of_methods({"a": 0.95, "b": 0.6}, tunings=["lora", "full"], num_rows=400)
    found[3] = Cell(found[3].coordinates, "missing")
    verdict = judge(claim(), found)
    assert [(c.num_settings, c.of_settings) for c in verdict.comparisons] == [(1, 2)]
    assert judge(claim(), [found[0], found[3]]).finding == "cannot be told"
    assert (
        judge(claim(more=[{"method": "z"}]), found).reason
        == "none of the cells that the claim compares was run at this scale"
    )


def test_a_finding_that_only_stands_alone_says_so():
    rng = np.random.default_rng(14)
    found = of_truth(rng, 0.86, 0.80, num_rows=900, luck=0.02)
    alone, of_many = judge(claim(), found), judge(claim(), found, num_comparisons=10**7)
    assert (alone.finding, alone.stays) == ("holds", True)
    assert (of_many.finding, of_many.stays) == ("holds", False)


def test_a_claim_that_makes_no_sense_is_refused():
    with pytest.raises(UsageError, match="above -1"):
        claim(of="peak_memory", by=-1.5)
    with pytest.raises(UsageError, match="mroe"):
        claim(mroe=[])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", names())
def test_every_claim_of_a_shipped_experiment_is_about_cells_that_it_has(name, scale):
    _, experiment = find(name)
    if scale not in experiment.scale:
        return
    there = [Cell(dict(spec.coordinates), "missing") for spec in cells(name, experiment, scale)]
    assert all(v.finding == "cannot be told" for v in verdicts(experiment.claims, there))
    axes = {axis for c in there for axis in c.coordinates}
    for one in experiment.claims:
        assert {axis for s in (*one.more, *one.less, one.among) for axis in s} <= axes
        assert {one.each, one.some, one.spread} - {None} <= axes
        if scale == "paper":
            assert all(any(matches(c, {**one.among, **s}) for c in there) for s in (*one.more, *one.less)), one.sentence
