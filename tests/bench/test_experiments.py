"""Every experiment is whole: its cells' options are valid at each scale, the paper's numbers have cells beside them,
the smallest scale runs from end to end; and a row in a file is all that a new cell takes.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench_cells import contents, here, made_up, run_cells, small_cells, small_table
from zotune.bench.measure.estimates import compare_with_gradient, true_gradient
from zotune.bench.measure.search import search
from zotune.bench.results.records import read_result, read_results, result_path
from zotune.bench.run.estimate import estimate
from zotune.bench.run.runner import Runner
from zotune.bench.spec import resolve
from zotune.bench.spec.resolve import EXPERIMENTS, cells, find, names
from zotune.bench.spec.schema import SearchPlan
from zotune.bench.spec.selection import chosen_cells
from zotune.bench.spec.vocabulary import SCALES
from zotune.errors import UsageError
from zotune.estimate.estimate import GradientEstimate
from zotune.llm.config.run import TrainConfig
from zotune.llm.config.schema import validate
from zotune.llm.training import optimizers
from zotune.methods.paper import METHODS
from zotune.model.parameters import ParameterSet
from zotune.plan import process_memory
from zotune.plan.workload import Workload

SOURCE = Path(resolve.__file__).parents[3]
PAPER = ("table1", "table2", "fig1", "table3", "table4", "table5", "fig2", "fig3", "table6", "table7", "table8")
SLOW = pytest.mark.slow

# The files -------------------------------------------------------------------------------------------------


def test_every_table_and_figure_of_the_paper_is_there_and_what_is_added_to_them():
    assert names() == (*PAPER, "tableA1", "tableA2", "leaderboard", "passes", "tasks")


@pytest.mark.parametrize("name", names())
def test_an_experiment_has_valid_cells_at_every_scale_with_names_of_their_own(name):
    _, experiment = find(name)
    # The experiment of passes is not the paper's, and has no cells at its scale.
    assert set(experiment.scale) == set(SCALES) - ({"paper"} if name == "passes" else set())
    for scale in experiment.scale:
        specs = list(cells(name, experiment, scale))
        assert specs
        assert len({spec.name for spec in specs}) == len(specs)
        assert not [spec.name for spec in specs if "/" in spec.name]
        searched = [spec for spec in specs if spec.kind == "accuracy"]
        assert not [spec.name for spec in searched if not spec.search.learning_rate]
        if scale != "smoke":
            assert not [spec.name for spec in searched if len(spec.seeds) < 3]
    assert set(experiment.layout.rows) | set(experiment.layout.columns) <= set(specs[0].coordinates)


@pytest.mark.parametrize("name", [name for name in names() if name not in ("tasks", "passes")])
def test_each_number_of_the_paper_has_a_cell_at_the_papers_scale(name):
    """The tables of tasks and of passes are of another model, and not the paper's."""
    _, experiment = find(name)
    places = [spec.coordinates for spec in cells(name, experiment, "paper")]
    for number in experiment.paper_cells():
        assert any(number.coordinates.items() <= place.items() for place in places), number
        assert math.isfinite(number.value)


def test_the_papers_numbers_are_those_of_the_paper():
    found = {name: {str(c.coordinates): c.value for c in find(name)[1].paper_cells()} for name in names()}
    assert {name: len(numbers) for name, numbers in found.items() if numbers} == {
        "table1": 12,
        "table2": 56,
        "fig1": 12,
        "table3": 48,
        "table4": 8,  # three numbers of each of eight methods
        "table5": 13,
        "table6": 6,
        "table7": 14,
        "table8": 20,
        "tableA1": 13,
        "tableA2": 13,
        "tasks": 32,  # those of tables 2 and 3 once more, beside another model
    }
    table2 = {
        (c.coordinates["model"], c.coordinates["tuning"], c.coordinates["method"]): c.value for c in paper("table2")
    }
    assert table2["opt-1.3b", "prompt", "zo_adam"] == 75.7
    assert table2["roberta-large", "full", "zo_sgd_sign"] == 52.5
    assert [c.value for c in paper("table4") if c.coordinates["method"] == "zo_sgd_cons"] == [64, 1, 27.6]


def paper(name):
    return list(find(name)[1].paper_cells())


def test_the_wheel_carries_the_experiments():
    # All of the package's folder goes into the wheel; these are below it.
    assert EXPERIMENTS.is_relative_to(SOURCE / "zotune")
    assert resolve.DEFAULTS.is_relative_to(SOURCE / "zotune")


def test_a_wrong_name_key_or_option_is_refused_with_the_right_one(zotune, tmp_path):
    said = zotune("bench", "run", "tabel2", "--scale", "smoke", "--results", tmp_path)
    assert (said.code, "Did you mean 'table2'?" in said.err) == (2, True)
    said = zotune("bench", "run", "table2", "--scale", "smoke", "--only", "table2/zo_sdg*", "--results", tmp_path)
    assert (said.code, "table2/zo_sdg*" in said.err) == (2, True)
    with pytest.raises(UsageError, match="unknown key 'axis'"):
        small_table(axis={})
    with pytest.raises(UsageError, match=r"small/zo_sgd at scale smoke: unknown key 'lorar'.*lora_r"):
        small_cells(options={"task": "copa", "lorar": 2})
    with pytest.raises(UsageError, match="unknown key 'learning_rates'"):
        small_cells(search={"learning_rates": [1e-3]})
    (tmp_path / "mine.toml").write_text("title = ")
    with pytest.raises(UsageError, match=r"mine\.toml cannot be read as TOML"):
        find(str(tmp_path / "mine.toml"))


def test_later_layers_and_rules_win_and_an_axis_yields_to_rules_alone():
    rules = [
        {"when": {"method": "zo_*"}, "options": {"mu": 1e-2, "num_queries": 2}},
        {"when": {"method": ["zo_adam", "zo_a*"]}, "options": {"num_queries": 3}},
    ]
    options = {"task": "copa", "method": "fo_sgd", "max_steps": 7}
    scale = {"smoke": {"options": {"max_steps": 9}, "rules": [{"options": {"seed": 4}}]}}
    one, two = small_cells(options=options, rules=rules, scale=scale)
    found = [{k: spec.options[k] for k in ("method", "num_queries", "max_steps", "seed")} for spec in (one, two)]
    assert found == [
        {"method": "zo_sgd", "num_queries": 2, "max_steps": 9, "seed": 4},
        {"method": "zo_adam", "num_queries": 3, "max_steps": 9, "seed": 4},
    ]
    unset = small_cells(options=options, rules=[{"options": {"max_steps": "default", "method": "fo_adam"}}])
    assert [spec.options["method"] for spec in unset] == ["fo_adam"] * 2
    assert small_cells(rules=[{"when": {"method": "zo_adam"}, "skip": True}])[0].name == "zo_sgd"
    assert len(small_cells(rules=[{"when": {"method": "zo_adam"}, "skip": True}])) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"when": {"methd": "zo_sgd"}}, r"names 'methd', which is no axis.*Did you mean 'method'.*The axes are method"),
        ({"when": {"method": "zo_sdg"}}, r"asks for method = 'zo_sdg', which no cell has.*Did you mean 'zo_sgd'"),
        ({"when": {"method": ["zo_adam", "fo_*"]}}, r"asks for method = 'fo_\*', which no cell has"),
    ],
)
def test_a_typo_in_a_rules_when_is_refused_with_what_is_there(change, said):
    for place in ({"rules": [change]}, {"scale": {"smoke": {"rules": [change]}}}):
        with pytest.raises(UsageError, match=said):
            small_cells(**place)


def test_a_rule_may_be_for_another_scale_or_set_seeds():
    scale = {
        "smoke": {"rules": [{"when": {"method": "zo_adam"}, "seeds": [7]}]},
        "cpu": {"axes": {"method": ["fo_sgd"]}},
    }
    found = small_cells(scale=scale, rules=[{"when": {"method": "fo_sgd"}, "options": {"max_steps": 3}}])
    assert [spec.seeds for spec in found] == [(0, 1), (7,)]


def test_a_models_name_with_a_slash_is_no_folder_of_results(tmp_path):
    axes = {"method": ["zo_sgd"], "model": ["facebook/opt-125m", "random:opt-tiny"]}
    specs = small_cells(axes=axes, options={"task": "copa"})
    assert [spec.name for spec in specs] == ["zo_sgd--facebook__opt-125m", "zo_sgd--random:opt-tiny"]
    assert [spec.options["model"] for spec in specs] == ["facebook/opt-125m", "random:opt-tiny"]
    assert set(run_cells(specs, tmp_path).values()) == {"done"}
    assert [cell.coordinates["model"] for cell in read_results(tmp_path, "smoke", "small")] == axes["model"]
    assert set(run_cells(specs, tmp_path, lambda job, folder: pytest.fail("it is done")).values()) == {"done"}
    with pytest.raises(UsageError, match="two cells would be called zo_sgd--a__b"):
        small_cells(axes={"method": ["zo_sgd"], "model": ["a/b", "a__b"]})


# Fidelity at the paper's scale -----------------------------------------------------------------------------

# The grids of the released sweeps, learning rate; mu, by column: SST-2; COPA on OPT and LLaMA; WinoGrande, and COPA on
# Mistral and Vicuna. "a…b" are all decades between.
_L4, _SIX = "5e-3, 1e-4, 5e-5, 1e-5", "1e-5, 5e-6, 1e-6, 5e-7, 1e-7, 5e-8"
SWEEPS = f"""
zo_sgd full        | 1e-4…1e-8; 1e-3…1e-5    | 1e-4…1e-8; 1e-2…1e-4      | 1e-5…1e-8; 1e-2…1e-4
zo_sgd lora        | 1e-3…1e-6; 1e-2…1e-4    | 1e-3, 5e-4, {_L4}; 1e-2, 1e-3 | 1e-3…1e-7; 1e-2…1e-4
zo_sgd prefix      | 1e-2…1e-4; 1e-1         | 1e-4…1e-8; 1e-2…1e-4      | 1e-3…1e-7; 1e-2…1e-4
zo_sgd prompt      | 1e-3…1e-6; 1e-2…1e-4    | 1e-4…1e-8; 1e-2…1e-4      | 1e-3…1e-7; 1e-2…1e-4
zo_sgd_mmt full    | 1e-5…1e-8; 1e-3…1e-5    | 1e-5…1e-8; 1e-2…1e-4      | 1e-4…1e-8; 1e-3…1e-5
zo_sgd_mmt lora    | 1e-3…1e-6; 1e-2…1e-4    | {_L4}; 1e-2, 1e-3         | 1e-3…1e-6; 1e-2…1e-4
zo_sgd_mmt prefix  | 1e-2…1e-4; 1e-1         | 1e-3…1e-6; 1e-2…1e-4      | 1e-3…1e-7; 1e-3…1e-5
zo_sgd_mmt prompt  | 1e-3…1e-6; 1e-2…1e-4    | 1e-3…1e-6; 1e-2…1e-4      | 1e-3…1e-6; 1e-2…1e-4
zo_sgd_sign full   | 1e-4, 1e-6, 1e-8; 1e-3, 1e-5 | 1e-5…1e-8; 1e-2…1e-4 | 1e-5…1e-8; 1e-2…1e-4
zo_sgd_sign lora   | 1e-3…1e-6; 1e-2…1e-4    | {_L4}; 1e-2, 1e-3         | 1e-3…1e-7; 1e-2…1e-4
zo_sgd_sign prefix | 1e-2…1e-4; 1e-1         | 1e-4…1e-8; 1e-3…1e-5      | 1e-3…1e-7; 1e-2…1e-4
zo_sgd_sign prompt | 1e-4, 1e-6, 1e-8; 1e-3, 1e-5 | 1e-4…1e-8; 1e-3…1e-5 | 1e-3…1e-7; 1e-2…1e-4
zo_sgd_cons full   | 1e-5…1e-8; 1e-2…1e-4    | 1e-5…1e-8; 1e-2…1e-4      | 1e-5…1e-8; 1e-2…1e-4
zo_sgd_cons lora   | 1e-4…1e-7; 1e-2…1e-4    | {_L4}; 1e-2, 1e-3         | 1e-3…1e-7; 1e-2…1e-4
zo_sgd_cons prefix | 1e-3…1e-6; 1e-2…1e-4    | 1e-3…1e-7; 1e-2…1e-4      | 1e-3…1e-7; 1e-2…1e-4
zo_sgd_cons prompt | 1e-4…1e-7; 1e-2…1e-4    | 1e-3…1e-7; 1e-2…1e-4      | 1e-3…1e-7; 1e-2…1e-4
zo_adam full       | 1e-4…1e-8; 1e-3…1e-5    | 1e-5…1e-8; 1e-2…1e-4      | 1e-5…1e-8; 1e-2…1e-4
zo_adam lora       | 1e-4…1e-6; 1e-2…1e-5    | {_L4}; 1e-2, 1e-3         | 1e-4…1e-8; 1e-2…1e-4
zo_adam prefix     | 1e-4…1e-8; 1e-3…1e-5    | 1e-4…1e-8; 1e-2…1e-4      | 1e-4…1e-8; 1e-2…1e-4
zo_adam prompt     | 1e-4…1e-8; 1e-3…1e-5    | 1e-4…1e-8; 1e-2…1e-4      | 1e-4…1e-8; 1e-2…1e-4
forward_grad full  | 1e-5…1e-8, 5e-7         | {_SIX}                    | 1e-4…1e-8
forward_grad lora  | 1e-5…1e-7, 5e-5, 5e-6, 5e-7 | 1e-4…1e-8             | 1e-3…1e-7
forward_grad prefix | 5e-3, 1e-3, 5e-4       | 1e-4…1e-8                 | 1e-3…1e-7
forward_grad prompt | 1e-2, 1e-3, 1e-4, 5e-5 | 1e-2…1e-6                 | 1e-3…1e-7
fo_sgd full        | 1e-3…1e-7               | 1e-4…1e-8                 | 1e-3…1e-7
fo_sgd lora        | 1e-2…1e-6               | {_L4}                     | 1e-2…1e-6
fo_sgd prefix      | 1e-2…1e-6               | 1e-2…1e-6                 | 1e-2…1e-6
fo_sgd prompt      | 1e-4…1e-8               | 1e-2…1e-6                 | 1e-2…1e-6
fo_adam full       | 1e-2, 1e-4, 1e-6        | 1e-6, 1e-7                | 1e-3…1e-7
fo_adam lora       | 1e-2…1e-6               | {_L4}                     | 1e-2…1e-6
fo_adam prefix     | 1e-2…1e-6               | 1e-2…1e-6                 | 1e-2…1e-6
fo_adam prompt     | 1e-2, 1e-4, 1e-6        | 1e-2…1e-6                 | 1e-2…1e-6
"""
# What the sweeps of some models had in their place: column, models, grid.
OF_MODELS = {
    ("zo_sgd", "full"): {("copa", "llama2"): "1e-5…1e-8; 1e-2…1e-4", ("winogrande", "opt"): "1e-4…1e-8; 1e-2…1e-4"},
    ("zo_sgd", "lora"): {("copa", "llama2"): f"{_L4}; 1e-2, 1e-3"},
    ("forward_grad", "full"): {("copa", "llama2"): "1e-4…1e-8", ("winogrande", "opt"): _SIX},
    ("fo_sgd", "full"): {("copa", "llama2"): "1e-4…1e-7"},
}


def grid(text):
    """The values of each part of a grid in short form, in any order."""
    parts = [[], []]
    for values, part in zip(text.split(";"), parts, strict=False):
        for value in map(str.strip, values.split(",")):
            ends = [int(end.strip().removeprefix("1e-")) for end in value.split("…")] if "…" in value else []
            part += [float(f"1e-{k}") for k in range(ends[0], ends[1] + 1)] if ends else [float(value)]
    return tuple(tuple(sorted(set(part))) for part in parts)


@pytest.mark.parametrize("name", ["table2", "fig1", "table3", "tasks"])
def test_the_grids_of_the_papers_scale_are_those_of_its_sweeps(name):
    known = {tuple(line.split("|")[0].split()): line.split("|")[1:] for line in SWEEPS.strip().splitlines()}
    specs = list(cells(name, find(name)[1], "paper"))
    assert len(specs) >= 48
    for spec in specs:
        at = spec.coordinates
        sst2, copa, others = known[at["method"], at["tuning"]]
        is_other = at["task"] == "winogrande" or at["model"] in ("mistral-7b", "vicuna-7b")
        column = ("winogrande", others) if is_other else ("copa", copa)
        task, wanted = column if at["task"] in ("copa", "winogrande") else ("", sst2)
        family = "opt" if at["model"].startswith("opt") else "llama2" if at["model"].startswith("llama2") else "other"
        wanted = OF_MODELS.get((at["method"], at["tuning"]), {}).get((task, family), wanted)
        rates, mus = grid(wanted)
        assert tuple(sorted(spec.search.learning_rate)) == rates, spec.path
        assert not mus or tuple(sorted(spec.search.mu)) == mus, spec.path
        assert (spec.search.steps, spec.search.by) == (1.0, "grid")


def test_each_reading_of_the_papers_text_is_run_and_the_text_is_the_default():
    table8 = {spec.name: spec.options for spec in cells("table8", find("table8")[1], "paper")}
    text, released = table8["0.2--sst2--random--full--zo_sgd"], table8["0.2--sst2--magnitude--full--zo_sgd"]
    plain = table8["0.0--sst2--random--full--zo_sgd"]
    assert (released["mask"], released["mask_interval"]) == ("magnitude", 1000)
    assert not {"mask", "mask_interval", "sparsity"} & plain.keys()
    config = TrainConfig.model_validate({k: v for k, v in text.items() if k in TrainConfig.model_fields})
    # Random masks whose shares in each tensor follow one magnitude threshold, drawn anew in each step.
    assert (config.mask, config.mask_group, config.mask_interval) == ("random", "global", 1)
    for name in ("table1", "table2", "fig1", "table3"):
        adams = {
            spec.options["adam"] for s in SCALES for spec in cells(name, find(name)[1], s) if "zo_adam" in spec.name
        }
        assert adams <= {"adamm"}, name
    for name in names():
        said = find(name)[1].comparable
        assert any(word in said for word in ("fp32", "bf16", "formulas")), f"{name} does not say its precision"


@pytest.mark.parametrize(("scale", "tuned"), [("paper", "full"), ("cpu", "lora")])
def test_blocks_are_as_many_as_the_queries_that_they_are_compared_with(scale, tuned):
    found = {s.coordinates["estimate"]: s.options for s in cells("table6", find("table6")[1], scale)}
    assert found["blocks"].keys() & {"num_queries"} == set()
    options = {k: v for k, v in found["blocks"].items() if k in Workload.model_fields}
    workload = validate(Workload, {**options, "device": "cpu"}, "test")
    assert workload.tuning == tuned
    from zotune.bench.run.estimate import _model

    optimizer = _model(workload.model_dump_json()).optimizer(workload)
    assert len(optimizer.blocks) == found["averaged"]["num_queries"]


def test_the_first_order_rate_of_a_hybrid_is_searched_like_that_of_a_pure_run(tmp_path):
    for scale in ("cpu", "paper"):
        of = {
            s.coordinates["hybrid_layers"]: s for s in cells("table7", find("table7")[1], scale) if s.kind == "accuracy"
        }
        pure = of.pop(0)
        hybrids = [spec for spec in of.values() if "hybrid_layers" in spec.options]
        assert hybrids
        assert {spec.search.hybrid_learning_rate for spec in hybrids} == {pure.search.learning_rate}
        assert "hybrid_learning_rate" not in {key for spec in hybrids for key in spec.options}
    plan = {"learning_rate": [1e-3, 1e-2], "hybrid_learning_rate": [0.1, 0.2, 0.3]}
    options = {"task": "copa", "model": "random:opt-tiny", "hybrid_layers": 1, "max_steps": 4}
    (spec,) = small_cells(
        axes={"method": ["zo_sgd"]}, options=options, search={**plan, "mu": [1e-2]}, scale={"smoke": {}}
    )
    run_cells([spec], tmp_path)
    result = read_result(result_path(tmp_path, "smoke", "small", spec.name))
    tried = [(t.learning_rate, t.mu, t.hybrid_learning_rate) for t in result.search]
    assert sorted(tried) == [(a, 1e-2, b) for a in (1e-3, 1e-2) for b in (0.1, 0.2, 0.3)]
    best = min(result.search, key=lambda t: t.dev_loss)
    assert result.chosen.hybrid_learning_rate == best.hybrid_learning_rate


def test_more_directions_are_compared_at_equal_steps_and_at_equal_passes():
    for scale in ("cpu", "paper"):
        of = [
            s
            for s in cells("fig2", find("fig2")[1], scale)
            if s.kind == "accuracy" and s.coordinates["method"] == "zo_sgd"
        ]
        steps = {
            s.coordinates["num_queries"]: s.options["max_steps"] for s in of if s.coordinates["compared"] == "steps"
        }
        passes = {s.coordinates["num_queries"]: s.budget for s in of if s.coordinates["compared"] == "passes"}
        assert len(set(steps.values())) == len({b.forward_equivalents for b in passes.values()}) == 1
        assert {1, 4, 16} <= steps.keys() == passes.keys()
    seeds = {s.name: (len(s.seeds), s.options) for s in cells("fig2", find("fig2")[1], "cpu") if s.kind == "quality"}
    assert {n for n, _ in seeds.values()} == {5}
    assert all(o["max_steps"] >= 375 / o["num_queries"] for _, o in seeds.values())


def test_a_new_task_has_grids_at_the_papers_scale():
    axes = {"method": ["zo_sgd", "fo_adam"], "tuning": ["full", "lora", "prefix", "head"], "task": ["boolq", "sst2"]}
    experiment = small_table(axes=axes, options={}, search={}, scale={"paper": {}})
    found = {spec.name: spec.search for spec in cells("small", experiment, "paper")}
    assert all(plan.learning_rate and plan.mu for name, plan in found.items() if name.startswith("zo_"))
    for name, plan in found.items():
        assert plan == found[name.replace("boolq", "sst2")]


def test_the_estimate_counts_each_job_once_and_says_hours():
    options = {"task": "copa", "model": "random:opt-tiny", "tuning": "lora", "max_steps": 1000, "device": "cpu"}
    specs = small_cells(options=options)
    both, one, twice = estimate(specs), estimate(specs[:1]), estimate([specs[0], specs[0]])
    # A zero-shot, and for each method two trials and two seeds.
    assert (one.num_jobs, both.num_jobs, twice.num_jobs) == (5, 9, 5)
    assert twice.total == one.total < both.total
    longer = small_cells(options={**options, "num_queries": 4})
    assert estimate(longer[:1]).total > one.total
    assert re.search(r"^5 jobs, about \d+\.\d hours with 1 at a time \(0 of 1 cells by a measured step", one.text(1))


def test_a_run_of_the_papers_scale_says_its_hours_before_it_starts(zotune, tmp_path, monkeypatch):
    monkeypatch.setattr(Runner, "run", lambda self, specs: {})
    only = ("--only", "table2/zo_sgd--lora--opt-1.3b*", "--scale", "paper", "--results", tmp_path)
    said = zotune("bench", "run", "table2", *only)
    assert re.search(r"16 jobs, about [\d,]+\.\d hours", said.err), said.err
    assert re.search(
        r"opt-1\.3b--sst2: [\d.]+ h\n1 cells, 16 jobs, about", zotune("bench", "run", "table2", *only, "--dry-run").out
    )


# From end to end -------------------------------------------------------------------------------------------


# A cell or two of each kind: accuracy, memory measured and by formula, quality of estimates.
SOME = (
    *("table3/zo_sgd--lora--llama-tiny--copa", "tableA1/zo_sgd--opt-tiny", "tableA1/fo_sgd_mixed*"),
    *("fig2/zo_sgd*quality*", "fig2/forward_grad--1--quality*"),
)


@pytest.fixture(scope="module", params=[pytest.param(SOME, id="some"), pytest.param(("*",), id="all", marks=SLOW)])
def smoke(request, tmp_path_factory):
    """Experiments at the smallest scale, in this process: the states and where the results are."""
    results = tmp_path_factory.mktemp("smoke")
    specs = [spec for some in chosen_cells([], "smoke", request.param).values() for spec in some]
    with pytest.MonkeyPatch.context() as patch:
        if request.param == SOME:  # which includes what would take a process of its own
            patch.setattr(process_memory, "tune_malloc", lambda *_: None)
            patch.setattr(process_memory, "measure", in_this_process)
        return run_cells(specs, results, here), results, specs


def in_this_process(options, *, num_steps):
    """A measurement, as the fresh process would write and the caller would read it."""
    found = process_memory.measure_here(validate(Workload, options, "measure"), num_steps)
    return process_memory.Measurement.from_json(json.loads(json.dumps(found.to_json())))


def test_the_smallest_scale_of_experiments_runs_to_its_end(smoke):
    states, results, specs = smoke
    assert {path: state for path, state in states.items() if state != "done"} == {}
    assert len(contents(results)) == len(specs)


def test_each_accuracy_has_zero_shot_and_majority_beside_it_and_counts_what_it_took(smoke):
    _, results, specs = smoke
    for spec in (spec for spec in specs if spec.kind == "accuracy"):
        found = read_result(result_path(results, spec.scale, spec.experiment, spec.name))
        assert "zero_shot" in found.baselines
        assert "majority" in found.baselines
        for run in found.runs:
            assert run.test.num_examples == len(run.right) == found.baselines["zero_shot"].num_examples
            assert run.test.value == run.right.count("1") / len(run.right)
            assert [e.step for e in run.evaluations][:2] == [0, 1]
            assert run.evaluations[-1].num_forwards <= run.num_forwards
            assert min(run.num_forwards, run.num_tokens, run.peak_memory, run.seconds) > 0
            kept = {e.step: e.dev_loss for e in run.evaluations}
            assert kept[run.best_step] == min(kept.values()) == run.dev.loss
        assert found.environment["torch"] == torch.__version__
        assert found.runs[0].num_steps == found.chosen.max_steps


def test_tokens_are_those_of_the_rows_times_the_passes(smoke):
    _, results, _ = smoke
    found = read_result(result_path(results, "smoke", "table3", "zo_sgd--lora--llama-tiny--copa"))
    (run,) = found.runs
    from zotune.llm.config.step import ModelOptions
    from zotune.llm.models.load import load
    from zotune.llm.tasks.load_data import load_rows

    options = {k: v for k, v in found.config["options"].items() if k in TrainConfig.model_fields}
    config = TrainConfig.model_validate(options)
    rows = load_rows(load(ModelOptions(model=config.model, device="cpu")), config)
    # Two batches of four of the eight rows: each row once, in two passes.
    assert run.num_tokens == 2 * sum(len(s) for e in rows.train for s in e.sequences)


def test_the_formulas_of_memory_stand_beside_what_was_measured(smoke):
    _, results, _ = smoke
    found = read_result(result_path(results, "smoke", "tableA1", "zo_sgd--opt-tiny"))
    (run,) = found.runs
    assert run.values["weight_bytes"] == run.values["tuned_bytes"]
    assert run.values["weight_bytes"] < run.values["formula_bytes"] < 2 * run.values["weight_bytes"]
    assert run.measured["seconds_per_step"] > 0
    assert set(run.phases) >= {"load", "forward", "update"}
    alone = read_result(result_path(results, "smoke", "tableA1", "fo_sgd_mixed--opt-tiny"))
    assert (alone.runs[0].measured, alone.runs[0].values["formula_bytes"] > 0) == ({}, True)


# The quality of estimates ----------------------------------------------------------------------------------


def test_the_quality_of_an_estimate_is_that_of_its_vector_against_autograds():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2).double()
    x, y = torch.randn(5, 3).double(), torch.randn(5, 2).double()

    def loss():
        return (model(x) - y).square().mean()

    tuned = ParameterSet.of(model)
    gradient = true_gradient(loss, tuned)
    loss().backward()
    assert all(torch.equal(g, p.grad) for g, p in zip(gradient, model.parameters(), strict=True))
    import zotune as zo

    estimate = GradientEstimate(0.0, ((2.0, zo.Direction(1)), (-1.0, zo.Direction(2))), 4)
    flat = torch.cat([estimate.of(model, name).flatten() for name, _ in model.named_parameters()])
    true = torch.cat([g.flatten() for g in gradient])
    found = compare_with_gradient(estimate, gradient, tuned)
    assert found["cosine"] == pytest.approx(float(torch.nn.functional.cosine_similarity(flat, true, dim=0)))
    assert found["relative_variance"] == pytest.approx(float((flat - true).square().sum() / true.square().sum()))


def test_more_directions_bring_the_estimate_nearer_as_the_formula_says(smoke):
    _, results, specs = smoke
    quality = {
        spec.name: read_result(result_path(results, "smoke", "fig2", spec.name)).runs[0].values
        for spec in specs
        if spec.experiment == "fig2" and "quality" in spec.name
    }
    assert len(quality) >= 3
    for found in quality.values():
        # 16 estimates: the mean of the squared error strays from its expectation by a third at most.
        assert found["relative_variance"] == pytest.approx(found["expected_relative_variance"], rel=0.6)
    pairs = [(found, quality.get(name.replace("--1--", "--4--"))) for name, found in quality.items() if "--1--" in name]
    assert any(four for _, four in pairs)
    for one, four in ((one, four) for one, four in pairs if four):
        assert one["expected_relative_variance"] == pytest.approx(4 * four["expected_relative_variance"])
        assert four["cosine"] > one["cosine"]


# The search ------------------------------------------------------------------------------------------------


def test_a_grid_asks_for_each_of_its_points_once():
    plan = SearchPlan(learning_rate=(1.0, 2.0), mu=(3.0, 4.0))
    both, alone = ([point[:2] for point in search(plan, has_mu=has_mu)] for has_mu in (True, False))
    assert both == [(1.0, 3.0), (1.0, 4.0), (2.0, 3.0), (2.0, 4.0)]
    assert alone == [(1.0, None), (2.0, None)]


def test_optuna_stays_within_the_grid_and_finds_its_way(tmp_path):
    pytest.importorskip("optuna")

    def asked(loss):
        points = search(SearchPlan(by="optuna", learning_rate=(1e-6, 1.0), mu=(1e-3, 1e-1), num_trials=30), has_mu=True)
        found, point = [], next(points)
        while True:
            found.append(point)
            try:
                point = points.send(loss(point))
            except StopIteration:
                return found

    found = asked(lambda p: abs(math.log10(p.learning_rate) + 3) if p.learning_rate < 0.1 else math.inf)
    assert len(found) == 30
    assert all(1e-6 <= p.learning_rate <= 1.0 and 1e-3 <= p.mu <= 1e-1 for p in found)
    assert min(abs(math.log10(p.learning_rate) + 3) for p in found) < 0.5
    assert found == asked(lambda p: abs(math.log10(p.learning_rate) + 3) if p.learning_rate < 0.1 else math.inf)


def test_without_optuna_the_search_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UsageError, match=r"pip install 'zotune\[bench\]'"):
        next(search(SearchPlan(by="optuna", learning_rate=(1e-3, 1e-2)), has_mu=False))


# A new method, a new task ----------------------------------------------------------------------------------

_METHOD = '''
"""ZO-Half: steps of half the length, along differences that it takes itself."""

from functools import partial
from typing import Unpack

from torch import nn

from zotune.estimate.finite_difference import central_difference
from zotune.methods.options import Options
from zotune.optim.zeroth_order import ZerothOrder


def zo_half(model: nn.Module, lr: float, *, mu: float = 1e-3, **options: Unpack[Options]) -> ZerothOrder:
    r"""ZO-Half: steps of half the length."""
    return ZerothOrder(model, lr / 2, estimator=partial(central_difference, mu=mu), **options)
'''

_TASK = '''
"""A task of one row again and again."""
from zotune.llm.tasks.copa import COPA
from dataclasses import replace

NEW = replace(COPA, name="new_task")
'''

_MINE = """
title = "Mine"
question = "Does my method work on my task and my model?"
comparable = "Nothing."
layout = { rows = ["method"], columns = ["task"] }
axes = { method = ["zo_half", "zo_sgd"], task = ["new_task"], model = ["mine/tiny"], tuning = ["lora"] }
options = { data_source = "rows" }
scale = { smoke = {}, paper = {} }
[[rules]]
when = { method = "zo_half" }
options = { num_queries = 2 }
"""

_WALK = """
import json, sys
from pathlib import Path
sys.path.append(sys.argv[1])
from bench_cells import here, run_cells
from zotune.cli.main import run
from zotune.bench.spec.selection import chosen_cells
from transformers import OPTForCausalLM
from zotune.llm.models.random_models import ARCHITECTURES, byte_tokenizer
config = ARCHITECTURES["opt-tiny"]()
OPTForCausalLM(config).save_pretrained("mine/tiny")
byte_tokenizer(config).save_pretrained("mine/tiny")
for verb in ("methods", "tasks"): run([verb])
for name in ("table2", "leaderboard"):
    for cell in chosen_cells([name], "paper")[name]: print(cell.path)
for name in ("table2", "mine.toml"):
    specs = [s for some in chosen_cells([name], "smoke", ["table2/zo_half*", "mine/*"]).values() for s in some]
    print(json.dumps(run_cells(specs, "results", here)))
(cell,) = [c for c in chosen_cells(["mine.toml"], "paper", ["mine/zo_half*"])["mine"]]
print("grid", cell.search.learning_rate, cell.search.mu)
print("plan", run(["plan", "--model", "random:opt-tiny", "--length", "16"]))
print("report", run(["bench", "report", "mine.toml", "--scale", "smoke", "--results", "results"]))
"""


def copy_with_a_method_and_a_task(folder):
    """A copy of the package with a file and a row for each, which is what anyone would add."""
    shutil.copytree(SOURCE / "zotune", folder / "zotune", ignore=shutil.ignore_patterns("__pycache__"))

    def change(path, *pairs):
        text = (folder / "zotune" / path).read_text(encoding="utf-8")
        for old, new in pairs:
            assert old in text
            text = text.replace(old, new, 1)
        (folder / "zotune" / path).write_text(text, encoding="utf-8")

    (folder / "zotune" / "methods" / "zo_half.py").write_text(_METHOD, encoding="utf-8")
    line = "from zotune.methods.zo_muon import zo_muon\n"
    change(
        "methods/table.py",
        (line, f"from zotune.methods.zo_half import zo_half\n{line}"),
        ('    "mopi": mopi,\n', '    "mopi": mopi,\n    "zo_half": zo_half,\n'),
    )
    change("llm/config/method.py", ('"zo_adam",', '"zo_adam",\n    "zo_half",'))
    (folder / "zotune" / "llm" / "tasks" / "new_task.py").write_text(_TASK, encoding="utf-8")
    line = "from zotune.llm.tasks.copa"
    change(
        "llm/tasks/__init__.py",
        ("_OTHERS = (", "_OTHERS = (NEW, "),
        (line, f"from zotune.llm.tasks.new_task import NEW\n{line}"),
    )


@SLOW
def test_a_new_method_and_a_new_task_work_everywhere_by_a_file_and_a_row(tmp_path):
    copy_with_a_method_and_a_task(tmp_path / "src")
    (tmp_path / "data").symlink_to(SOURCE.parent / "data")  # the rows of a checkout
    (tmp_path / "rows").mkdir()
    for name in ("train", "validation"):
        shutil.copy(SOURCE / "zotune" / "llm" / "tasks" / "data" / "copa" / f"{name}.jsonl.gz", tmp_path / "rows")
    (tmp_path / "mine.toml").write_text(_MINE)
    done = subprocess.run(
        [sys.executable, "-c", _WALK, str(Path(__file__).parents[1])],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "src")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert any(line.split() == ["zo_half", "ZO-Half:", "steps", "of", "half", "the", "length."] for line in lines)
    assert any(line.startswith("new_task") for line in lines)
    assert any(line.startswith("leaderboard/zo_half--") for line in lines)
    states = [json.loads(line) for line in lines if line.startswith("{")]
    assert states == [
        {"table2/zo_half--lora--opt-tiny--sst2": "done"},
        {f"mine/{m}--new_task--mine__tiny--lora": "done" for m in ("zo_half", "zo_sgd")},
    ]
    assert "plan 0" in lines and "report 0" in lines
    assert any(line.startswith("zo_half ") for line in lines)
    assert "grid (0.001, 0.0001, 1e-05, 1e-06, 1e-07) (0.01, 0.001, 0.0001)" in lines
    page = (tmp_path / "results" / "report-smoke" / "index.html").read_text(encoding="utf-8")
    assert "zo_half" in page and "new_task" in page
    found = read_result(tmp_path / "results" / "smoke" / "mine" / "zo_half--new_task--mine__tiny--lora.json")
    assert {run.values["equivalents_per_step"] for run in found.runs} == {4}


def test_a_method_gets_the_arguments_that_it_takes_and_no_others(monkeypatch):
    seen = {}

    def zo_half(model, lr, *, mu=1e-3, share=0.5, **options):
        seen.update(options, mu=mu, share=share)
        return METHODS["zo_sgd"](model, lr * share, mu=mu, **options)

    monkeypatch.setitem(optimizers.METHODS, "zo_sgd_sign", zo_half)
    config = TrainConfig(task="sst2", method="zo_sgd_sign", mu=1e-2, learning_rate=0.5)
    made = optimizers.make_optimizer(torch.nn.Linear(2, 1), config, 3)
    assert (seen["mu"], seen["share"], made.param_groups[0]["lr"]) == (1e-2, 0.5, 0.25)
    assert not {"difference", "sign"} & seen.keys()


def test_a_table_of_ones_own_is_a_file(zotune, tmp_path, monkeypatch):
    mine = tmp_path / "mine.toml"
    mine.write_text(
        'title = "Mine"\nquestion = "?"\ncomparable = ""\nlayout = { rows = ["method"] }\n'
        'axes = { method = ["zo_*"] }\noptions = { task = "copa", model = "random:opt-tiny" }\nscale = { smoke = {} }\n'
    )
    said = zotune("bench", "run", mine, "--scale", "smoke", "--dry-run", "--json", "--results", tmp_path)
    assert said.code == 0, said.err
    found = [cell["name"] for cell in json.loads(said.out)["cells"]]
    assert found == [name for name in METHODS if name.startswith("zo_")]


# Commands --------------------------------------------------------------------------------------------------


def test_list_and_status_say_what_there_is(zotune, tmp_path):
    said = zotune("bench", "list")
    assert said.code == 0
    assert all(name in said.out for name in names())
    rows = json.loads(zotune("bench", "list", "--json").out)
    assert set(rows) == set(names())
    assert all(row["scales"]["cpu"]["cells"] for row in rows.values())
    specs = chosen_cells(["table8"], "smoke")["table8"]
    run_cells(specs[:1], tmp_path, made_up)
    said = json.loads(zotune("bench", "status", "table8", "--scale", "smoke", "--results", tmp_path, "--json").out)
    assert said["counts"] == {"done": 1, "missing": 1}
    assert said["cells"][specs[0].path]["state"] == "done"


def test_ray_does_the_same_jobs(tmp_path):
    pytest.importorskip("ray")
    script = tmp_path / "on_ray.py"
    tests = Path(__file__).parents[1]
    script.write_text(
        f"import sys, threading; sys.path.insert(0, {str(tests)!r})\n"
        "from bench_cells import Silent\n"
        "from pathlib import Path\n"
        "from zotune.bench.spec.selection import chosen_cells\n"
        "from zotune.bench.run.ray_executor import ray_executors\n"
        "from zotune.bench.run.runner import Runner\n"
        "(specs,) = chosen_cells(['table8'], 'smoke').values()\n"
        "stop = threading.Event()\n"
        "slots = ray_executors(2, {'OMP_NUM_THREADS': '1'}, cpus=1, gpus=0, stopped=stop.is_set)\n"
        "print(set(Runner(Path(sys.argv[1]), slots, stop, Silent()).run(specs).values()))\n"
    )
    done = subprocess.run([sys.executable, script, tmp_path / "ray"], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["{'done'}"], done.stderr[-2000:]
    (specs,) = chosen_cells(["table8"], "smoke").values()
    run_cells(specs, tmp_path / "here", here)
    from zotune.bench.results.records import repeatable

    both = [contents(tmp_path / name) for name in ("ray", "here")]
    for found in both:
        for cell in found.values():
            cell.pop("environment")
    assert repeatable(both[0]) == repeatable(both[1])
