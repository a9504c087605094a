"""Benchmarks that need what is not here still run, on a small scale."""

import itertools
import json
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_a_cpu_with_a_small_model(start, tmp_path):
    small = ["--models", "opt-tiny", "--dtypes", "float16", "--batch", 2, "--length", 8, "--rounds", 2]
    process = start(BENCHMARKS / "speed" / "gpu.py", "--device", "cpu", *small, "--output", tmp_path)
    said, error = process.communicate()
    assert process.returncode == 0, error
    found = json.loads((tmp_path / "speed-gpu.json").read_text())
    ((name, row),) = found["rows"].items()
    assert name == "opt-tiny float16 2x8"
    assert name in said
    steps = {"zo_sgd_step", "low_rank_step", "graphed_step"}
    assert {"two_forwards", "update", "in_place_loop", *steps} == row["sides"].keys()
    step, plain = (row["sides"][side]["ms"] for side in ("zo_sgd_step", "two_forwards"))
    assert step > row["sides"]["update"]["ms"] > 0
    assert row["zo_sgd_step_to_two_forwards"] == step / plain
    assert all(row[f"{name}_to_in_place_loop"] > 0 for name in steps)


@pytest.mark.parametrize(
    ("found", "code", "verdicts"),
    [
        ((1.1,), 0, ["fine", "fine"]),
        # Too high twice in single precision, once in bfloat16.
        ((1.3, 1.2, 1.3, 1.1), 1, ["slower: 1.20 times", "fine"]),
    ],
)
def test_the_check_of_a_step_fails_where_a_ratio_is_too_high_twice(
    monkeypatch, capsys, tmp_path, found, code, verdicts
):
    monkeypatch.syspath_prepend(BENCHMARKS / "speed")
    check = runpy.run_path(str(BENCHMARKS / "speed" / "check.py"))
    measured = itertools.cycle(found)
    names = check["main"].__globals__
    monkeypatch.setitem(names, "ratios", lambda *_: {"zo_sgd_step_ratio": next(measured), "older_ratio": 99})
    monkeypatch.setitem(names, "tune_malloc", lambda *_: None)
    sizes = {f"{dtype} 2x8": {"zo_sgd_step_ratio": 1.0, "older_ratio": 1.0} for dtype in ("float32", "bfloat16")}
    (tmp_path / "recorded.json").write_text(json.dumps({"models": {"a": sizes}}))
    arguments = ["check.py", "--model", "a", "--size", "2x8", "--recorded", str(tmp_path / "recorded.json")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert check["main"]() == code
    assert [line.rpartition(", recorded 1.00: ")[2] for line in capsys.readouterr().out.splitlines()] == verdicts


@pytest.mark.slow
@pytest.mark.parametrize(("recorded", "code", "verdict"), [(1e6, 0, "fine"), (1e-6, 1, "slower")])
def test_the_check_of_a_step_fails_only_where_a_ratio_has_grown(start, tmp_path, recorded, code, verdict):
    sizes = {f"{dtype} 2x8": {"zo_sgd_step_ratio": recorded} for dtype in ("float32", "bfloat16")}
    (tmp_path / "recorded.json").write_text(json.dumps({"models": {"random:opt-tiny": sizes}}))
    small = ["--model", "random:opt-tiny", "--size", "2x8", "--rounds", 2]
    process = start(BENCHMARKS / "speed" / "check.py", *small, "--recorded", tmp_path / "recorded.json")
    said, error = process.communicate()
    assert process.returncode == code, error
    assert said.count(verdict) == 2
