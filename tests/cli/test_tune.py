"""`zotune tune` runs each point once, reads no evaluation row, goes on where it was stopped, and writes a recipe."""

import json
import re
import signal

import pytest
import yaml

from zotune.cli.tune import split_axes
from zotune.llm.training.train import train
from zotune.llm.tune import sweep as module


@pytest.fixture
def search(zotune, short, tmp_path):
    """A function: more arguments to what a search over the rows file says."""
    return lambda *more: zotune("tune", *short()[1:], *more)


def test_the_best_of_the_values_becomes_a_recipe_that_trains(search, zotune, tmp_path):
    said = search("--learning-rate", "1e-3", "5e-2", "--tuning", "lora", "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert [trial["point"] for trial in found["trials"]] == [{"learning_rate": 1e-3}, {"learning_rate": 5e-2}]
    assert found["best"]["loss"] == min(trial["loss"] for trial in found["trials"])
    assert json.loads((tmp_path / "out/tune.json").read_text()) == found
    recipe = yaml.safe_load((tmp_path / "out/best.yaml").read_text())
    assert recipe["learning_rate"] == found["best"]["point"]["learning_rate"]
    assert recipe["num_eval"] is None
    # The recipe repeats the best run: the loss on the same held-out rows is the same.
    again = json.loads(zotune("train", tmp_path / "out/best.yaml", "--json").out)
    assert again["dev"]["loss"] == pytest.approx(found["best"]["loss"], abs=1e-6)


def test_a_table_shows_each_point_and_marks_the_best(search):
    said = search("--lr", "1e-3", "2e-3", "--mu", "1e-2", "1e-3")
    assert said.code == 0, said.err
    lines = said.out.splitlines()
    assert re.split(r"\s{2,}", lines[0].strip()) == [
        "learning_rate",
        "mu",
        "held-out loss",
        "accuracy",
        "forward passes",
    ]
    points = [tuple(line.split()[:2]) for line in lines[1:5]]
    assert points == [("0.001", "0.01"), ("0.001", "0.001"), ("0.002", "0.01"), ("0.002", "0.001")]
    assert sum(line.endswith("best") for line in lines) == 1


def test_a_log_loss_has_one_column_and_no_row_is_said_to_be_drawn(zotune, tmp_path):
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i} is", "completion": " odd"}) + "\n" for i in range(8)))
    said = zotune(
        "tune", "--model", "random:llama-tiny", "--device", "cpu", "--train-file", rows, "--output-dir", tmp_path / "o",
        "--max-steps", 1, "--learning-rate", "1e-3", "1e-2",
    )  # fmt: skip
    assert said.code == 0, said.err
    assert re.split(r"\s{2,}", said.out.splitlines()[0].strip()) == ["learning_rate", "held-out loss", "forward passes"]
    assert "evaluation rows, drawn at random" not in said.err


def test_a_stopped_search_goes_on_and_trains_no_point_twice(search, monkeypatch):
    trained = []

    def counted(config, stop=False):
        trained.append(config.learning_rate)
        result = train(config)
        return module.replace(result, stopped_by=signal.SIGTERM) if len(trained) == 2 else result

    monkeypatch.setattr(module, "train", counted)
    rates = ("--learning-rate", "1e-3", "2e-3", "3e-3")
    stopped = search(*rates)
    assert (stopped.code, stopped.out) == (128 + signal.SIGTERM, "")
    assert "the same command goes on" in stopped.err
    said = search(*rates)
    assert said.code == 0, said.err
    # The run that was stopped had written its results already here; only the third is left.
    assert trained == [1e-3, 2e-3, 3e-3]


def test_evaluation_rows_are_not_read(search, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(module, "train", lambda config: seen.append(config) or train(config))
    missing = tmp_path / "rows.jsonl"
    said = search("--learning-rate", "1e-3", "2e-3", "--eval-file", missing)
    assert said.code == 0, said.err
    assert [config.num_eval for config in seen] == [0, 0]


def test_a_point_that_cannot_run_is_shown_and_left(search):
    said = search("--mu", "1e-2", "1e-12", "--dtype", "bfloat16", "--tuning", "full")
    assert said.code == 0, said.err
    assert "mu is 1e-12, too small" in said.out.splitlines()[2]


def test_optuna_chooses_points_between_the_values(search):
    pytest.importorskip("optuna")
    said = search("--learning-rate", "1e-4", "1e-1", "--num-trials", 2, "--json")
    assert said.code == 0, said.err
    rates = [trial["point"]["learning_rate"] for trial in json.loads(said.out)["trials"]]
    assert len(set(rates)) == 2 and all(1e-4 <= rate <= 1e-1 for rate in rates)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to compare: give an option several values"),
        (["--learning-rate", "1e-3"], "nothing to compare"),
        (["--learning-rate", "1e-3", "fast"], "learning_rate is 'fast'"),
        (["--seed", "1", "2"], "--seed has one value in all runs of a search"),
        (
            ["--learning-rate", "1", "2", "--num-trials", "0"],
            "--num-trials is a number of trials of at least 1, got '0'",
        ),
        (["--learning-rate", "1", "2", "--num-trials"], "--num-trials is a number of trials"),
        (["--learning-rate", "1", "2", "--num-dev", "0"], "give --num-dev above 0"),
        (["--learning-rat", "1", "2"], "--learning-rate"),
        (["--learning-rate", "1e-3", "2e-3", "--train-file", "no.jsonl"], "there is no file"),
    ],
)
def test_what_cannot_be_searched_is_refused(zotune, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    task = [] if "--train-file" in arguments else ["--task", "sst2"]
    said = zotune("tune", "--model", "random:opt-tiny", *task, *arguments)
    assert (said.code, said.out) == (2, "")
    assert message in re.sub(r"[\s│]+", " ", said.err)


def test_axes_are_options_with_several_values_that_take_one():
    args = ["--task", "sst2", "rte", "--verbalizer", "a", "b", "--lora-r", "2", "4", "2", "--resume"]
    rest, axes = split_axes(args)
    assert axes == {"task": ["sst2", "rte"], "lora_r": ["2", "4"]}
    assert rest == ["--verbalizer", "a", "b", "--resume"]
