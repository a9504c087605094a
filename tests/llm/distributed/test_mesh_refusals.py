"""No process waits for ever: what cannot work is refused in all of them, and what happens to one ends all."""

import json
import socket

import pytest

import many_cases
import many_processes
from zotune.errors import RunError, UsageError
from zotune.system.processes import PeerError


@pytest.fixture
def options(rows_file, tmp_path):
    return {
        **{"model": "random:llama-tiny", "train_file": str(rows_file), "num_dev": 3, "device": "cpu", "max_steps": 4},
        **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "dtype": "float32"},
        **{"learning_rate": 1e-3, "output_dir": str(tmp_path / "out"), "timeout": 60},
    }


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"parallel": "query=2,data=2"}, "is a mesh of 4 processes, but there are 2"),
        ({"parallel": "query=2"}, "1 direction that can be shared"),
        ({"gradient_accumulation_steps": 1}, "--gradient-accumulation-steps 2 cuts the same 2 rows"),
        ({"num_queries": 2, "blocks": "layer", "parallel": "query=2"}, "some of the 2 processes would have nothing"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_mesh_that_does_not_fit_is_refused(options, change, says):
    errors = many_processes.run(2, many_cases.train_runs, [options | change], raises=True)
    assert all(isinstance(error, UsageError) and says in str(error) for error in errors), errors


def test_processes_that_begin_differently_are_named(options, rows_file, tmp_path):
    rows = rows_file.read_text(encoding="utf-8")
    for name, more in (("here", ""), ("there", '{"text": "one more", "label": "no"}\n')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text(rows + more, encoding="utf-8")
    (tmp_path / "empty").mkdir()
    options = options | {"train_file": "rows.jsonl", "gradient_accumulation_steps": 3}
    cases = [
        ({"cwd": str(tmp_path / "there")}, "do not begin with the same training rows: process 2 differs"),
        ({"cwd": str(tmp_path / "empty")}, "rows.jsonl"),
        (
            {"options": {"learning_rate": 2e-3}},
            "option learning_rate: process 2 differs from the others: 0.001 and 0.002",
        ),
        ({"threads": 2}, "number of threads (OMP_NUM_THREADS): process 2 differs from the others: 1 and 2"),
    ]
    for change, says in cases:
        own = {"folder": str(tmp_path / "here"), **change}
        errors = many_processes.run(3, many_cases.run_with_own, options, 2, own, raises=True)
        assert all(isinstance(error, UsageError) and says in str(error) for error in errors), (change, errors)


def test_an_error_in_one_process_is_raised_in_all(options):
    errors = many_processes.run(2, many_cases.disturbed_run, options, 1, "raise", raises=True)
    assert all(type(error) is RunError and "the disk of this machine" in str(error) for error in errors), errors


def test_a_process_that_is_killed_ends_the_others(options):
    first, second = many_processes.run(2, many_cases.disturbed_run, options, 1, "end", raises=True)
    assert second == 9
    assert isinstance(first, PeerError)
    assert "--resume" in str(first)


@pytest.mark.slow
def test_a_process_that_hangs_is_waited_for_no_longer_than_asked(options):
    first, _ = many_processes.run(2, many_cases.disturbed_run, options | {"timeout": 3}, 1, "sleep", raises=True)
    assert isinstance(first, PeerError)
    assert "sent nothing for 3 s" in str(first)


def test_weights_that_differ_stop_the_run(options):
    errors = many_processes.run(2, many_cases.disturbed_run, options | {"check_ranks": 1}, 1, "lose a bit", raises=True)
    assert all("after step 3 the tuned weights of process 1" in str(error) for error in errors), errors


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_a_signal_to_one_process_saves_and_ends_all_after_the_same_step(options, tmp_path, name):
    found = many_processes.run(2, many_cases.disturbed_run, options, 1, name)
    assert found == [(3, {"SIGTERM": 15, "SIGINT": 2}[name])] * 2
    assert json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["num_steps"] == 3
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        errors = many_processes.run(2, many_cases.meet_at, port, 3.0, raises=True)
    assert isinstance(errors[0], UsageError)
    assert f"127.0.0.1:{port}" in str(errors[0])
    assert "--master-port" in str(errors[0])
