"""Intervals of contrasts against scipy's and against simulation."""

import numpy as np
import pytest
import scipy  # its submodule stats, of a second, is imported by the test that needs it

from bench_results import answers
from zotune.bench.results.intervals import Outcomes, contrast

THREE, OTHERS = (0, 1, 2), (10, 11, 12, 13, 14)


def test_a_contrast_of_one_run_each_is_the_paired_t_interval_over_rows():
    rng = np.random.default_rng(0)
    a, b = (rng.random((1, 50)) for _ in range(2))
    found = contrast([(1.0, Outcomes(a)), (-1.0, Outcomes(b))]).interval()
    expected = scipy.stats.ttest_rel(a[0], b[0]).confidence_interval()
    assert found == pytest.approx((expected.low, expected.high))


def test_a_contrast_of_runs_with_different_seeds_is_welchs_interval():
    rng = np.random.default_rng(1)
    a, b = rng.random((3, 1)), 1 + 4 * rng.random((5, 1))
    found = contrast([(1.0, Outcomes(a, "", THREE)), (-1.0, Outcomes(b, "", OTHERS))]).interval()
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


# Seeds ----------------------------------------------------------------------------------------------------


def test_a_contrast_of_runs_with_equal_seeds_is_the_paired_t_interval():
    rng = np.random.default_rng(5)
    shared = rng.random((6, 1))
    a, b = shared + 0.1 * rng.random((6, 1)), shared + 0.1 * rng.random((6, 1))
    seeds = tuple(range(6))
    found = contrast([(1.0, Outcomes(a, "a", seeds)), (-1.0, Outcomes(b, "b", seeds))]).interval()
    expected = scipy.stats.ttest_rel(a[:, 0], b[:, 0]).confidence_interval()
    assert found == pytest.approx((expected.low, expected.high))


def test_the_same_runs_twice_are_no_more_sure_than_once():
    """Two methods whose estimates have the same directions have the same errors; their mean is no better known."""
    a = np.random.default_rng(6).random((4, 1))
    seeds = (0, 1, 2, 3)
    once = contrast([(1.0, Outcomes(a, "a", seeds))])
    twice = contrast([(0.5, Outcomes(a, "a", seeds)), (0.5, Outcomes(a, "b", seeds))])
    assert twice.interval() == pytest.approx(once.interval())
    apart = contrast([(0.5, Outcomes(a, "a", seeds)), (0.5, Outcomes(a, "b", (4, 5, 6, 7)))])
    assert apart.error == pytest.approx(once.error / np.sqrt(2))


def test_the_order_of_seeds_does_not_matter():
    rng = np.random.default_rng(7)
    a, b = rng.random((3, 20)), rng.random((3, 20))
    straight = contrast([(1.0, Outcomes(a, "r", (0, 1, 2))), (-1.0, Outcomes(b, "r", (0, 1, 2)))])
    turned = contrast([(1.0, Outcomes(a, "r", (0, 1, 2))), (-1.0, Outcomes(b[[2, 0, 1]], "r", (2, 0, 1)))])
    assert turned.interval() == pytest.approx(straight.interval())


@pytest.mark.parametrize(("num_first", "num_second"), [(6, 6), (9, 6), (3, 4)])
def test_intervals_hold_the_truth_where_seeds_are_shared_in_part(num_first, num_second):
    """A seed's luck is common to both cells, so that neither independence nor full pairing would be right."""
    rng, hits, trials = np.random.default_rng(8), 0, 400
    for _ in range(trials):
        luck, rows = rng.normal(0, 0.5, max(num_first, num_second)), rng.normal(0, 1, 120)
        pair = []
        for n in (num_first, num_second):
            own = luck[:n, None] + rng.normal(0, 0.2, (n, 1)) + rows + rng.normal(0, 1.0, (n, 120))
            pair.append(Outcomes(own, "r", tuple(range(n))))
        low, high = contrast([(0.5, pair[0]), (0.5, pair[1])]).interval()
        hits += low <= 0 <= high
    assert hits / trials > 0.95 - 0.033


def test_few_shared_seeds_give_a_bound_and_not_a_wrong_interval():
    a, b = np.array([[1.0], [2.0], [4.0]]), np.array([[1.0], [2.0], [4.0]])
    found = contrast([(0.5, Outcomes(a, "a", (0, 1, 2))), (0.5, Outcomes(b, "b", (2, 3, 4)))])
    alone = contrast([(1.0, Outcomes(a, "a", (0, 1, 2)))])
    assert found.error == pytest.approx(alone.error)
