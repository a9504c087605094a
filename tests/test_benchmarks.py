"""Benchmarks that need what is not here still run, on a small scale."""

import json
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_the_gpu_benchmark_runs_on_a_cpu_with_a_small_model(start, tmp_path):
    small = ["--models", "opt-tiny", "--dtypes", "float16", "--batch", 2, "--length", 8, "--rounds", 2]
    process = start(BENCHMARKS / "speed" / "gpu.py", "--device", "cpu", *small, "--output", tmp_path)
    said, error = process.communicate()
    assert process.returncode == 0, error
    found = json.loads((tmp_path / "speed-gpu.json").read_text())
    ((name, row),) = found["rows"].items()
    assert name == "opt-tiny float16 2x8"
    assert name in said
    assert {"two_forwards", "zo_sgd_step", "update", "in_place_loop"} == row["sides"].keys()
    step, plain = (row["sides"][side]["ms"] for side in ("zo_sgd_step", "two_forwards"))
    assert step > row["sides"]["update"]["ms"] > 0
    assert row["step_to_two_forwards"] == step / plain
