"""A few faults of each kind, in processes of their own; `make test-faults` injects hundreds."""

import json
from pathlib import Path

FAULTS = Path(__file__).with_name("faults.py")
RESULTS = Path(__file__).parents[1] / "benchmarks/results/faults.json"


def test_one_fault_of_each_kind_is_survived(start):
    out, err = start(FAULTS, "--count", 14, "--seed", 3, OMP_NUM_THREADS="1").communicate(timeout=600)
    found = json.loads(out)
    assert found["failed"] == [], err
    assert found["total_survived"] == found["total_tried"] == 14
    assert len(found["tried"]) == 14
    assert found["processes_killed"] >= 4


def test_the_recorded_faults_are_hundreds_and_none_failed():
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert found["failed"] == []
    assert found["total_tried"] >= 200
    assert found["survived"] == found["tried"]
