"""`learning_rate: auto` finds the rate of the unsharded run in shards, in every process, and leaves no other trace."""

import json

import pytest
import search_cases

import many_cases
import many_processes
from conftest import ROWS

# As the processes that the runs are compared with.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def options(rows_file, tmp_path):
    def of(name, **more):
        return {
            **{"model": "random:llama-tiny", "train_file": str(rows_file), "num_dev": 3, "device": "cpu", "seed": 3},
            **{"per_device_train_batch_size": 4, "max_steps": 2, "logging_steps": 2, "dtype": "float32"},
            **{"learning_rate": "auto", "output_dir": str(tmp_path / name), **more},
        }

    return of


@pytest.mark.parametrize(("shard", "tuning"), [("tp", "lora"), pytest.param("fsdp", "full", marks=pytest.mark.slow)])
def test_a_search_in_shards_finds_the_rate_of_the_unsharded_run(options, tmp_path, shard, tuning):
    """The second process judges every trial otherwise than the first, and goes on with what that one finds."""
    search_cases.searched_runs([options("one", tuning=tuning)])
    many_processes.run(2, search_cases.searched_runs, [options("shards", tuning=tuning, shard=shard)])
    if shard == "fsdp":
        whole, gathered = (many_cases.written_by(tmp_path / name) for name in ("one", "shards"))
        assert gathered == whole and "search.json" in whole
    found, expected = (json.loads((tmp_path / name / "search.json").read_text()) for name in ("shards", "one"))
    trials, alone = found.pop("trials"), expected.pop("trials")
    assert found == pytest.approx(expected, rel=1e-5) and len(alone) == 2
    assert trials == [pytest.approx(trial, rel=1e-5) for trial in alone]


@pytest.mark.parametrize("way", ["fsdp", pytest.param("tp", marks=pytest.mark.slow)])
def test_a_search_in_a_model_that_its_owner_has_cut_changes_nothing_but_the_rate(way):
    alone, _ = search_cases.searched_in_python(ROWS, way)
    for searched, given in many_processes.run(2, search_cases.searched_in_python, ROWS, way):
        assert searched == given
        assert searched[1:3] == alone[1:3]
        assert searched[3] == pytest.approx(alone[3], rel=1e-5)
        assert way == "tp" or searched == alone


def test_a_model_that_its_owner_has_cut_comes_back_as_its_slices_after_an_interrupt():
    """The first process is interrupted, and the other one hears of it."""
    first, other = many_processes.run(2, search_cases.interrupted, ROWS)
    assert first == (True, True, True) and other[1:] == (True, True)
