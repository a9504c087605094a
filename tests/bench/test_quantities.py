"""What numbers mean: a step's own memory, one currency of passes, and the runs that they come from."""

import numpy as np
import pytest

from bench_results import answers, cell, experiment
from zotune.bench.report.choose_figures import figures
from zotune.bench.report.formats import ranked
from zotune.bench.results.cells import Cell
from zotune.bench.results.costs import cell_costs
from zotune.bench.results.quantities import outcomes, quantity
from zotune.bench.results.ranking import ranking
from zotune.bench.results.records import RunRecord
from zotune.bench.results.tables import table
from zotune.bench.results.verdicts import judge
from zotune.bench.spec.claims import Claim
from zotune.llm.config.schema import validate

GIB = 2**30


def measured(load, forward, update, **recorded):
    """A measured step whose phases have these peaks in GiB, one GiB of which the libraries take."""
    phases = {
        name: {"peak": (1 + gib) * GIB} for name, gib in (("load", load), ("forward", forward), ("update", update))
    }
    return RunRecord(seed=0, measured={"baseline_bytes": float(GIB), **recorded}, phases=phases)


def test_the_memory_of_a_step_is_that_of_its_own_phases():
    run = measured(load=9, forward=2, update=3)
    assert quantity("step_bytes").read(run) == pytest.approx(3)
    assert quantity("loading_bytes").read(run) == pytest.approx(9)


def test_what_is_not_measured_has_no_number():
    assert quantity("step_bytes").read(RunRecord(seed=0)) is None
    assert quantity("step_bytes").read(RunRecord(seed=0, peak_memory=5 * GIB)) is None


def test_a_recorded_number_counts_before_that_of_phases():
    assert quantity("step_bytes").read(measured(9, 2, 3, step_bytes=4.0 * GIB)) == pytest.approx(4)


def sized(method, length, **phases):
    found = cell({"method": method, "length": length}, measured=[{}])
    return Cell(found.coordinates, "done", found.result.model_copy(update={"runs": (measured(**phases),)}))


def test_a_step_that_grows_is_not_flat_because_loading_takes_more():
    """The peak of loading, 4 GiB at any length, hides that the step grows from 1 to 3."""
    cells = [sized("zo_sgd", 64, load=4, forward=1, update=1), sized("zo_sgd", 1024, load=4, forward=3, update=1)]
    asked = {"sentence": "flat", "where": "", "of": "step_bytes", "within": 0.1}
    claim = validate(Claim, {**asked, "more": [{"length": 1024}], "less": [{"length": 64}]}, "test")
    verdict = judge(claim, cells)
    assert (verdict.finding, verdict.comparisons[0].value) == ("does not hold", pytest.approx(3))


# Passes ---------------------------------------------------------------------------------------------------


def spent(method, calls, equivalents):
    """A cell whose runs call the model so many times, with these forward-equivalents."""
    found = cell({"method": method}, answers(np.random.default_rng(0), 0.8))
    runs = []
    for run in found.result.runs:
        share = equivalents / run.evaluations[-1].num_forwards
        way = tuple(e.model_copy(update={"forward_equivalents": e.num_forwards * share}) for e in run.evaluations)
        runs.append(
            run.model_copy(update={"num_forwards": calls, "forward_equivalents": equivalents, "evaluations": way})
        )
    trials = tuple(t.model_copy(update={"forward_equivalents": 3.0 * t.num_forwards}) for t in found.result.search)
    return Cell(found.coordinates, "done", found.result.model_copy(update={"runs": tuple(runs), "search": trials}))


def test_costs_are_in_forward_equivalents_and_not_in_calls():
    """100 calls of back-propagation are 300 forward passes, not 100."""
    cells = [spent("fo_sgd", 100, 300.0), spent("zo_sgd", 200, 200.0)]
    assert [row["forward-equivalents"] for row in cell_costs(cells)] == [300, 200]
    assert [row["search's forward-equivalents"] for row in cell_costs(cells)] == [60, 60]
    lines = ranking("", cells, "method").lines
    assert {line.name: line.forward_equivalents for line in lines} == {"fo_sgd": 300, "zo_sgd": 200}
    asked = experiment(layout={"rows": ["method"]}, paper=[])
    by_name = {figure.name: figure for figure in figures("t", asked, cells, table("t", asked, cells))}
    spent_panel = next(p for p in by_name["t-spent"].panels if p.x_label == "forward-equivalents")
    assert sorted(p.x for p in spent_panel.points()) == [200, 300]
    (way,) = by_name["t-way"].panels
    assert way.x_label == "forward-equivalents"
    assert {s.name: s.points[-1].x for s in way.series} == {"fo_sgd": 300, "zo_sgd": 200}


def test_without_forward_equivalents_nothing_is_drawn_over_calls():
    cells = [cell({"method": m}, answers(np.random.default_rng(0), 0.8)) for m in ("fo_sgd", "zo_sgd")]
    asked = experiment(layout={"rows": ["method"]}, paper=[])
    found = figures("t", asked, cells, table("t", asked, cells))
    labels = {panel.x_label for figure in found for panel in figure.panels}
    assert labels == {"accuracy, %", "training time, s", "seconds of training"}
    assert cell_costs(cells)[0]["forward-equivalents"] is None


# Runs -----------------------------------------------------------------------------------------------------


def test_outcomes_know_their_seeds():
    found = cell({"method": "a"}, answers(np.random.default_rng(0), 0.8)).result
    assert outcomes(found, quantity("accuracy")).seeds == (0, 1, 2)
    twice = found.model_copy(update={"runs": (found.runs[0], found.runs[0])})
    assert outcomes(twice, quantity("accuracy")).seeds == ()


# Rankings -------------------------------------------------------------------------------------------------


def test_a_ranking_has_places_differences_and_reasons():
    rng = np.random.default_rng(3)
    rows = rng.normal(0, 1, 400)
    truth = {"best": 0.9, "close": 0.895, "far": 0.7}
    cells = [cell({"method": m}, answers(rng, a, num_runs=5, luck=0.02, rows=rows)) for m, a in truth.items()]
    cells.append(cell({"method": "big"}, state="out_of_memory", message="it takes 3 GiB", runs=()))
    found = ranking("memory", cells, "method")
    assert [(line.name, line.place) for line in found.lines] == [("best", 1), ("close", 1), ("far", 3), ("big", None)]
    low, high = found.lines[2].behind_interval
    assert low < found.lines[2].behind < high and low > 0
    assert ranked(found.lines[3], found)[2] == "it takes 3 GiB"
    assert found.target == pytest.approx(60 + (found.lines[0].mean - 60) / 2)


def test_a_target_that_few_runs_reach_is_never_reached_in_the_median():
    cells = [cell({"method": "a"}, np.ones((4, 200), bool))]
    runs = list(cells[0].result.runs)
    low = tuple(e.model_copy(update={"dev_value": 0.6}) for e in runs[0].evaluations)
    runs[:3] = [run.model_copy(update={"evaluations": low}) for run in runs[:3]]
    found = ranking(
        "", [Cell(cells[0].coordinates, "done", cells[0].result.model_copy(update={"runs": tuple(runs)}))], "method"
    )
    (line,) = found.lines
    assert (line.num_reached, line.num_runs) == (1, 4)
    assert line.seconds_to_target == float("inf")
    assert ranked(line, found)[8] == "never (1 of 4)"
