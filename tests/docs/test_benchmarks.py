"""Benchmarks that need what is not here still run, on a small scale."""

import json
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
    ("recorded", "code", "verdict"), [pytest.param(1e6, 0, "fine", marks=pytest.mark.slow), (1e-6, 1, "slower")]
)
def test_the_check_of_a_step_fails_only_where_a_ratio_has_grown(start, tmp_path, recorded, code, verdict):
    sizes = {f"{dtype} 2x8": {"zo_sgd_step_ratio": recorded} for dtype in ("float32", "bfloat16")}
    (tmp_path / "recorded.json").write_text(json.dumps({"models": {"random:opt-tiny": sizes}}))
    small = ["--model", "random:opt-tiny", "--size", "2x8", "--rounds", 2]
    process = start(BENCHMARKS / "speed" / "check.py", *small, "--recorded", tmp_path / "recorded.json")
    said, error = process.communicate()
    assert process.returncode == code, error
    assert said.count(verdict) == 2
