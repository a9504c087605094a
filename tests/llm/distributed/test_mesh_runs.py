"""`zotune train` and `zotune eval` of N processes write the files of one, also when N changes on resume."""

import json

import pytest

import many_cases
import many_processes
from zotune.llm.config.run import TrainConfig
from zotune.llm.training.train import train

# As the processes that the runs are compared with.
pytestmark = pytest.mark.usefixtures("one_thread")

RUNS = {
    "full": {"method": "zo_adam", "tuning": "full", "learning_rate": 1e-4, "num_queries": 2},
    "lora": {"method": "forward_grad", "learning_rate": 1e-3},
    "conservative": {"method": "zo_sgd_cons", "learning_rate": 1e-3, "difference": "forward"},
    "directions": {"method": "zo_sgd_cons", "learning_rate": 1e-3, "num_queries": 2},
    "reward": {"objective": "accuracy", "learning_rate": 1e-2},
    "blocks": {"blocks": "layer", "tuning": "full", "learning_rate": 1e-5},
    "hybrid": {"hybrid_layers": 1, "hybrid_method": "fo_adam", "tuning": "full", "hybrid_learning_rate": 1e-3},
    "first order": {"method": "fo_adam", "learning_rate": 1e-3},
    "auto": {"learning_rate": "auto", "tuned_layers": 1},
    "best": {"eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 1e-2, "save_steps": 2},
}


@pytest.fixture
def options(rows_file):
    def of(name, folder, **more):
        return {
            **{"model": "random:llama-tiny", "train_file": str(rows_file), "num_dev": 3, "device": "cpu", "seed": 3},
            **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 4, "logging_steps": 2},
            **{"tuning": "lora", "dtype": "float32", "output_dir": str(folder), "per_device_eval_batch_size": 1},
            **RUNS[name],
            **more,
        }

    return of


FEW = ("full", "lora", "directions", "hybrid")
MANY = pytest.param(3, tuple(RUNS), marks=pytest.mark.slow)


@pytest.mark.parametrize(("size", "names"), [(2, FEW), MANY], ids=["2", "3"])
def test_a_run_of_several_processes_writes_the_files_of_one(options, tmp_path, size, names):
    for name in names:
        train(TrainConfig(**options(name, tmp_path / f"{name}-1")))
    more = {"parallel": "query=2"} if size == 2 else {}
    runs = [options(name, tmp_path / f"{name}-N", **(more if name == "directions" else {})) for name in names]
    many_processes.run(size, many_cases.train_runs, runs)
    for name in names:
        one, other = (many_cases.written_by(tmp_path / f"{name}-{n}") for n in ("1", "N"))
        assert other == one, name


def test_a_run_resumes_with_another_number_of_processes(options, tmp_path):
    train(TrainConfig(**options("best", tmp_path / "whole")))
    parts = tmp_path / "parts"
    many_processes.run(2, many_cases.train_runs, [options("best", parts, max_steps=2)])
    many_processes.run(3, many_cases.train_runs, [options("best", parts, max_steps=4, resume=True)])
    names = ("ledger.zol", "adapter_model.safetensors")
    whole, resumed = many_cases.written_by(tmp_path / "whole"), many_cases.written_by(parts)
    assert {name: resumed[name] for name in names} == {name: whole[name] for name in names}
    assert json.loads((parts / "results.json").read_text())["num_steps"] == 4


def test_an_evaluation_of_several_processes_is_that_of_one(rows_file):
    common = {"device": "cpu", "dtype": "float32", "per_device_eval_batch_size": 2}
    cases = [
        {"model": "random:roberta-tiny", "task": "trec", "num_eval": 7, **common},
        {"model": "random:llama-tiny", "task": "squad", "num_eval": 3, "max_length": 256, **common},
        {"model": "random:qwen3-tiny", "eval_file": str(rows_file), "objective": "teacher_forcing", **common},
    ]
    alone = many_cases.evaluated(cases)
    assert many_processes.run(3, many_cases.evaluated, cases) == [alone] * 3


def test_a_loaded_model_is_tuned_in_python_by_several_processes():
    rows = [
        {"text": text, "label": "yes" if i % 2 else "no"} for i, text in enumerate(["dull", "fine", "warm film"] * 3)
    ]
    *alone, was_called = many_cases.tuned_in_python(rows)
    assert alone[1] == 2
    first, second = many_processes.run(2, many_cases.tuned_in_python, rows)
    assert [*first] == [*alone, was_called]
    assert [*second] == [*alone, False]
