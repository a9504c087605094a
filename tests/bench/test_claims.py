"""Verdicts on claims against cells whose truth is known: quantifiers, levels, and all claims together."""

import numpy as np
import pytest

from bench_results import answers, cell, table_of_methods
from zotune.bench.results.cells import Cell, matches
from zotune.bench.results.verdicts import adjusted, finding_of, judge, verdicts
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
        assert "fewer than 3 runs" in verdict.reason


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


def known(ts, reference="b", axis="method"):
    """Cells whose paired differences to a reference have these values of Student's t, with eight seeds."""
    noise = np.linspace(-1, 1, 8)
    noise /= noise.std(ddof=1) / np.sqrt(8)
    others = {} if axis == "method" else {"method": "a"}
    found = [cell({**others, axis: f"m{i}"}, values=[{"cosine": t + n} for n in noise]) for i, t in enumerate(ts)]
    if axis == "method":
        return [*found, cell({"method": reference}, values=[{"cosine": 0.0}] * 8)]
    return [*found, *(cell({"method": "b", axis: f"m{i}"}, values=[{"cosine": 0.0}] * 8) for i, _ in enumerate(ts))]


# With seven degrees of freedom, t = 3 has p = 0.020: enough for one of two comparisons, and not for one of three.
SURE, NOT_SURE, NEARLY = 40.0, 0.0, 3.0


@pytest.mark.parametrize(("num_others", "expected"), [(1, "holds"), (2, "cannot be told")])
def test_one_of_several_settles_a_claim_only_with_all_of_them_counted(num_others, expected):
    asked = claim(of="cosine", more=[{"method": "m*"}], some="method")
    assert judge(asked, known([NEARLY, *[NOT_SURE] * num_others])).finding == expected
    assert judge(asked, known([-NEARLY, *[-NEARLY] * num_others])).finding == "does not hold"


@pytest.mark.parametrize(("num_others", "expected"), [(1, "does not hold"), (2, "cannot be told")])
def test_one_of_several_refutes_a_claim_about_each_only_with_all_of_them_counted(num_others, expected):
    """That one of many equal methods is below the others is no surprise."""
    asked = claim(of="cosine", more=[{"method": "m*"}], each="method")
    assert judge(asked, known([-NEARLY, *[SURE] * num_others])).finding == expected
    assert judge(asked, known([NEARLY, *[NEARLY] * num_others])).finding == "holds"


@pytest.mark.parametrize(("num_others", "expected"), [(1, "holds"), (2, "cannot be told")])
def test_one_of_many_settings_settles_a_claim_only_with_all_of_them_counted(num_others, expected):
    asked = claim(of="cosine", settings="some")
    assert judge(asked, known([NEARLY, *[NOT_SURE] * num_others], axis="tuning")).finding == expected


def test_a_difference_of_differences_asks_who_loses_more():
    rng = np.random.default_rng(11)
    rows = rng.normal(0, 1, 400)
    truth = {("zo_sgd", "aligned"): 0.9, ("zo_sgd", "none"): 0.6, ("fo_sgd", "aligned"): 0.92, ("fo_sgd", "none"): 0.9}
    found = [cell({"method": m, "prompt": p}, answers(rng, a, rows=rows)) for (m, p), a in truth.items()]
    more = [{"method": "zo_sgd", "prompt": "aligned"}, {"method": "fo_sgd", "prompt": "none"}]
    less = [{"method": "zo_sgd", "prompt": "none"}, {"method": "fo_sgd", "prompt": "aligned"}]
    asked = claim(more=more, less=less)
    (comparison,) = judge(asked, found).comparisons
    means = {place: 100 * np.mean([r.test.value for r in c.result.runs]) for place, c in zip(truth, found, strict=True)}
    lost = {m: means[m, "aligned"] - means[m, "none"] for m in ("zo_sgd", "fo_sgd")}
    assert comparison.value == pytest.approx(lost["zo_sgd"] - lost["fo_sgd"])
    assert finding_of(asked, comparison) == "holds"


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
    assert finding_of(asked, comparison) == "holds"
    # Spreads over different methods are not of the same thing.
    assert judge(asked, found[:-1]).finding == "cannot be told"


def test_amounts_are_compared_by_ratio_and_one_measurement_is_taken_as_it_is():
    found = [
        cell({"method": m}, measured=[{"step_bytes": b}], values=[{"formula_bytes": 2e9}])
        for m, b in {"a": 3e9, "b": 2e9}.items()
    ]
    (comparison,) = judge(claim(of="step_bytes"), found).comparisons
    assert comparison.value == pytest.approx(1.5)
    assert judge(claim(of="step_bytes", by=0.6), found).finding == "does not hold"
    one = claim(of="step_bytes/formula_bytes", less=[], within=0.6)
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


# Settings -------------------------------------------------------------------------------------------------


def by_setting(*truths, **options):
    """Cells of methods a and b for each pair of accuracies, each pair with a tuning scheme of its own."""
    rng = np.random.default_rng(20)
    return [
        cell({"method": m, "tuning": f"t{i}"}, answers(rng, accuracy, num_rows=400, **options))
        for i, pair in enumerate(truths)
        for m, accuracy in zip("ab", pair, strict=True)
    ]


@pytest.mark.parametrize(
    ("settings", "expected"), [("mean", "holds"), ("all", "does not hold"), ("half", "holds"), ("some", "holds")]
)
def test_a_claim_holds_in_the_settings_that_it_names(settings, expected):
    found = by_setting((0.95, 0.7), (0.95, 0.7), (0.75, 0.9))
    assert judge(claim(settings=settings), found).finding == expected


def test_two_settings_of_four_are_half_and_one_is_not():
    better, worse = (0.95, 0.7), (0.7, 0.95)
    assert judge(claim(settings="half"), by_setting(better, better, worse, worse)).finding == "holds"
    assert judge(claim(settings="half"), by_setting(better, worse, worse, worse)).finding == "does not hold"


def test_settings_are_named_by_what_distinguishes_them():
    found = by_setting((0.95, 0.7), (0.7, 0.95))
    assert [c.label for c in judge(claim(settings="some"), found).comparisons] == ["t0", "t1"]


# Times ----------------------------------------------------------------------------------------------------


def timed(num_runs, num_steps):
    """Cells of methods a and b whose steps take two seconds and one."""
    cells = [
        cell({"method": m}, measured=[{"seconds_per_step": s * (1 + 0.01 * i)} for i in range(num_runs)])
        for m, s in (("a", 2.0), ("b", 1.0))
    ]
    return [
        Cell(
            c.coordinates,
            "done",
            c.result.model_copy(
                update={"runs": tuple(r.model_copy(update={"num_steps": num_steps}) for r in c.result.runs)}
            ),
        )
        for c in cells
    ]


@pytest.mark.parametrize(
    ("num_runs", "num_steps", "expected"), [(3, 10, "holds"), (1, 10, "cannot be told"), (3, 9, "cannot be told")]
)
def test_a_time_counts_from_three_processes_of_ten_steps(num_runs, num_steps, expected):
    verdict = judge(claim(of="seconds_per_step"), timed(num_runs, num_steps))
    assert verdict.finding == expected
    assert ("3 processes of 10 steps" in verdict.reason) == (expected != "holds")


# All claims together --------------------------------------------------------------------------------------


def verdict_at(t):
    """A verdict whose comparison has this value of Student's t."""
    return judge(claim(of="cosine", more=[{"method": "m0"}]), known([t]))


@pytest.mark.parametrize(("num_others", "stays"), [(0, True), (1, True), (2, False)])
def test_a_verdict_stays_if_it_stands_among_all_claims_of_a_report(num_others, stays):
    """Claims of other tables count too, whatever their findings; p = 0.020 stands at 0.05 / 2 and not at 0.05 / 3."""
    found = adjusted([verdict_at(NEARLY), *[verdict_at(NOT_SURE)] * num_others])
    assert (found[0].finding, found[0].stays) == ("holds", stays)


def test_surer_verdicts_make_room_for_the_next():
    """Holm's levels are α/n, α/(n − 1), …: after two sure claims, the third of four must stand at 0.05 / 2."""
    found = [verdict_at(t) for t in (NEARLY, SURE, NOT_SURE, -SURE)]
    assert [v.stays for v in adjusted(found)] == [True, True, False, True]
    assert [v.stays for v in adjusted([found[0], found[1], found[2], found[2]])] == [False, True, False, False]


def test_what_was_measured_once_is_no_matter_of_chance():
    found = [cell({"method": m}, measured=[{"step_bytes": b}]) for m, b in (("a", 3e9), ("b", 2e9))]
    verdict = judge(claim(of="step_bytes"), found)
    assert verdict.finding == "holds" and not verdict.is_tested
    assert adjusted([verdict, *[judge(claim(), of_truth(np.random.default_rng(0), 0.8, 0.8))] * 1000])[0].stays


# Shipped claims -------------------------------------------------------------------------------------------


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
