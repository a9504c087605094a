"""The trackers of `report_to` get every step once, without a network; one that is not installed is named at once."""

import sqlite3

import pytest

from zotune.errors import UsageError
from zotune.llm.callbacks import trackers
from zotune.llm.training.train import train


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """A folder for all that trackers write, and their offline modes."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    return tmp_path


def run_with(config, tracker, **options):
    plain = {"max_steps": 3, "eval_steps": 3, "learning_rate": 0.03, "run_name": "mine"}
    return train(config(report_to=tracker, **plain, **options))


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_gets_every_step(config, offline):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_with(config, "tensorboard")
    (folder,) = {path.parent for path in (offline / "out/runs").rglob("events.out.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert [event.step for event in events.Scalars("eval/loss")] == [3]
    assert [event.value for event in events.Scalars("train/learning_rate")] == pytest.approx([0.03] * 3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mlflow_gets_every_step_and_the_options(config, offline):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")  # mlflow-skinny has no store of its own

    run_with(config, "mlflow")
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert run.info.run_name == "mine"
    assert (run.data.params["mu"], run.data.params["method"]) == ("0.001", "zo_sgd")
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    assert sorted(metric.step for metric in history) == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wandb_writes_an_offline_run(config, offline):
    pytest.importorskip("wandb")
    run_with(config, "wandb")
    assert list((offline / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.filterwarnings("ignore")
def test_trackio_gets_every_step(config, offline):
    trackio = pytest.importorskip("trackio")
    run_with(config, "trackio")
    (database,) = trackio.utils.TRACKIO_DIR.glob("huggingface.db")
    rows = sqlite3.connect(database).execute("select step, metrics from metrics").fetchall()
    assert [step for step, metrics in rows if b"train/loss" in bytes(metrics)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ({"wandb"}, r"wandb is not installed; run pip install 'zotune\[wandb\]'"),
        ({"tensorboard", "tensorboardX", "mlflow"}, r"pip install 'zotune\[mlflow,tensorboard\]'"),
    ],
)
def test_a_tracker_that_is_not_installed_is_named_before_anything_is_loaded(config, monkeypatch, missing, said):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name in missing else name)
    names = ["mlflow", *sorted(missing - {"tensorboardX", "mlflow"})]
    with pytest.raises(UsageError, match=said):
        train(config(model="no/such-model", report_to=names))


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("none", ()),
        ([], ()),
        ("all", trackers.TRACKERS),
        ("wandb,tensorboard", ("wandb", "tensorboard")),
        (("wandb,tensorboard",), ("wandb", "tensorboard")),
        (["mlflow"], ("mlflow",)),
    ],
)
def test_names_of_trackers_are_read_as_transformers_does(config, value, meant):
    assert config(report_to=value).report_to == meant


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--report-to", "wandbb"], "Did you mean 'wandb'"),
        (["--report-to", "comet_ml"], "callbacks="),
        (["--report-to", "none", "wandb"], "give it alone"),
    ],
)
def test_a_wrong_tracker_is_refused_with_exit_code_2(short, zotune, args, said):
    found = zotune(*short(*args))
    assert found.code == 2
    assert said in found.err
