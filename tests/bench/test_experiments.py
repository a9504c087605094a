"""Every experiment is whole: its cells' options are valid at each scale, the paper's numbers have cells beside them,
the smallest scale runs from end to end; and a row in a file is all that a new cell takes.
"""

import json
import math
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from bench_cells import contents, here, made_up, run_cells, small_cells, small_table
from zotune.bench.measure.estimates import compare_with_gradient, true_gradient
from zotune.bench.measure.search import search
from zotune.bench.results.records import read_result, result_path
from zotune.bench.run.accuracy_cells import passes_a_step
from zotune.bench.spec import resolve
from zotune.bench.spec.resolve import EXPERIMENTS, cells, find, names
from zotune.bench.spec.schema import SearchPlan
from zotune.bench.spec.selection import chosen_cells
from zotune.bench.spec.vocabulary import SCALES
from zotune.errors import UsageError
from zotune.estimate.estimate import GradientEstimate
from zotune.llm.config.run import TrainConfig
from zotune.llm.config.schema import validate
from zotune.methods.paper import METHODS
from zotune.model.parameters import ParameterSet
from zotune.plan import process_memory
from zotune.plan.workload import Workload

SOURCE = Path(resolve.__file__).parents[3]
PAPER = ("table1", "table2", "fig1", "table3", "table4", "table5", "fig2", "fig3", "table6", "table7", "table8")
SLOW = pytest.mark.slow

# The files -------------------------------------------------------------------------------------------------


def test_every_table_and_figure_of_the_paper_is_there_and_what_is_added_to_them():
    assert names() == (*PAPER, "tableA1", "tableA2", "leaderboard", "tasks")


@pytest.mark.parametrize("name", names())
def test_an_experiment_has_valid_cells_at_every_scale_with_names_of_their_own(name):
    _, experiment = find(name)
    assert set(experiment.scale) == set(SCALES)
    for scale in SCALES:
        specs = list(cells(name, experiment, scale))
        assert specs
        assert len({spec.name for spec in specs}) == len(specs)
        assert not [spec.name for spec in specs if "/" in spec.name]
        searched = [spec for spec in specs if spec.kind == "accuracy"]
        assert not [spec.name for spec in searched if not spec.search.learning_rate]
        if scale != "smoke":
            assert not [spec.name for spec in searched if len(spec.seeds) < 3]
    assert set(experiment.layout.rows) | set(experiment.layout.columns) <= set(specs[0].coordinates)


@pytest.mark.parametrize("name", names())
def test_each_number_of_the_paper_has_a_cell_at_the_papers_scale(name):
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
        {"when": {"method": ["zo_adam", "none"]}, "options": {"num_queries": 3}},
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


def test_equal_budgets_count_what_a_step_of_each_method_takes():
    def passes(method, **options):
        return passes_a_step(TrainConfig(task="sst2", method=method, **options))

    q = 3
    assert [passes(m, num_queries=q) for m in METHODS] == [6, 6, 6, 9, 6, 6]
    assert passes("zo_sgd", difference="forward", num_queries=q) == 4
    assert [passes("fo_adam"), passes("fo_adam", gradient_checkpointing=True)] == [3, 4]
    assert passes("fo_adam", gradient_accumulation_steps=4) == 12


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
    assert list(search(plan, has_mu=True)) == [(1.0, 3.0), (1.0, 4.0), (2.0, 3.0), (2.0, 4.0)]
    assert list(search(plan, has_mu=False)) == [(1.0, None), (2.0, None)]


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

def zo_half(model: nn.Module, lr: float, *, mu: float = 1e-3, **options: Unpack[Options]) -> ZerothOrder:
    r"""ZO-Half: steps of half the length."""
    return ZerothOrder(model, lr / 2, estimator=differences(central_difference, mu), **options)


METHODS["zo_half"] = zo_half
'''

_TASK = '''
"""A task of one row again and again."""
from zotune.llm.tasks.copa import COPA
from dataclasses import replace

NEW = replace(COPA, name="new_task")
'''


def test_a_new_method_and_a_new_task_appear_by_a_file_and_a_row(tmp_path):
    """In a copy of the package, so that what is added is what anyone would add."""
    shutil.copytree(SOURCE / "zotune", tmp_path / "zotune", ignore=shutil.ignore_patterns("__pycache__"))
    package = tmp_path / "zotune"
    with (package / "methods" / "paper.py").open("a", encoding="utf-8") as methods:
        methods.write(_METHOD)
    options = package / "llm" / "config" / "method.py"
    options.write_text(options.read_text(encoding="utf-8").replace('"zo_adam",', '"zo_adam", "zo_half",', 1))
    (package / "llm" / "tasks" / "new_task.py").write_text(_TASK, encoding="utf-8")
    tasks = package / "llm" / "tasks" / "__init__.py"
    text = tasks.read_text(encoding="utf-8").replace("_OTHERS = (", "_OTHERS = (NEW, ", 1)
    tasks.write_text(
        text.replace(
            "from zotune.llm.tasks.copa", "from zotune.llm.tasks.new_task import NEW\nfrom zotune.llm.tasks.copa", 1
        )
    )
    table = tomllib.loads((package / "bench" / "spec" / "experiments" / "table3.toml").read_text(encoding="utf-8"))
    row = 'task = ["copa", "winogrande"]'
    file = package / "bench" / "spec" / "experiments" / "table3.toml"
    assert table["axes"]["task"] == ["copa", "winogrande"]
    file.write_text(file.read_text(encoding="utf-8").replace(row, 'task = ["copa", "winogrande", "new_*"]', 1))
    code = "from zotune.cli.main import run\nfor verb in ('methods', 'tasks'): run([verb])\n"
    code += (
        "for name in ('table2', 'leaderboard', 'table3'): run(['bench', 'run', name, '--scale', 'paper', '--dry-run'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(tmp_path), "PATH": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.split() == ["zo_half", "ZO-Half:", "steps", "of", "half", "the", "length."] for line in lines)
    assert any(line.startswith("new_task") for line in lines)
    assert "table2/zo_half--lora--opt-1.3b--sst2" in lines
    assert "leaderboard/zo_half--forwards--sst2--lora" in lines
    assert "table3/zo_sgd--lora--opt-13b--new_task" in lines


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
    assert sum(row["scales"]["cpu"]["minutes"] for row in rows.values()) <= 180  # on one of two cores
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
