"""A few faults of each kind, in processes of their own; `make test-faults` injects hundreds.

The faster form, in one process: runs cut anywhere (tests/llm/training/test_resume_run.py).
"""

import json
from pathlib import Path

import pytest

FAULTS = Path(__file__).with_name("faults.py")
RESULTS = Path(__file__).parents[1] / "benchmarks/results/faults.json"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "seed", "killed"),
    [pytest.param(1, 2, 1, id="killed at a random moment"), pytest.param(14, 3, 4, id="one of each kind")],
)
def test_faults_are_survived(start, count, seed, killed):
    out, err = start(FAULTS, "--count", count, "--seed", seed, OMP_NUM_THREADS="1").communicate(timeout=900)
    found = json.loads(out)
    assert found["failed"] == [], err
    assert found["total_survived"] == found["total_tried"] == count
    assert len(found["tried"]) == count
    assert found["processes_killed"] >= killed


def test_the_recorded_faults_are_hundreds_and_none_failed():
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert found["failed"] == []
    assert found["total_tried"] >= 200
    assert found["survived"] == found["tried"]
