"""Callbacks see a run as they would see transformers' Trainer, and may end it; a resumed run repeats nothing."""

import json

import pytest
import torch
import yaml
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from zotune.errors import UsageError
from zotune.ledger import read
from zotune.llm.training import loop
from zotune.llm.training.train import train

EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_")]


class Recorder(TrainerCallback):
    """Notes each event with its step and the names of what was logged or measured."""

    def __init__(self):
        self.seen, self.logs, self.arguments = [], [], None

    def _note(self, event, arguments, state, values):
        self.arguments = arguments
        self.seen.append((event, state.global_step))
        if event == "on_log":
            self.logs.append((state.global_step, dict(values["logs"])))
        assert event == "on_init_end" or (values["model"] is not None and values["optimizer"] is not None)


for event in EVENTS:
    setattr(
        Recorder,
        event,
        lambda self, arguments, state, control, event=event, **values: self._note(event, arguments, state, values),
    )


class Asking(TrainerCallback):
    """Sets fields of the control after given steps."""

    def __init__(self, **steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        for name, (step, value) in self.steps.items():
            if state.global_step == step:
                setattr(control, name, value)
        return control


def lines_of(folder, key):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["step"] for line in lines if key in line]


def trainer_events(tmp_path):
    """The events of transformers' own Trainer: eight rows in batches of four, as our run has."""
    from transformers import Trainer

    class Regression(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def forward(self, x, labels):
            return {"loss": (self.layer(x) - labels).square().mean()}

    rows = [{"x": torch.ones(1), "labels": torch.ones(1)}] * 8
    recorder = Recorder()
    options = {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 4}
    arguments = TrainingArguments(
        tmp_path / "theirs", **options, max_steps=6, per_device_train_batch_size=4, use_cpu=True, report_to="none",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(Regression(), arguments, train_dataset=rows, eval_dataset=rows, callbacks=[recorder])
    trainer.remove_callback(next(c for c in trainer.callback_handler.callbacks if "Printer" in type(c).__name__))
    trainer.train()
    return recorder.seen


def test_events_come_in_the_order_of_the_trainer(config, tmp_path):
    recorder = Recorder()
    train(config(max_steps=6, logging_steps=2, eval_steps=3, save_steps=4), callbacks=[recorder])
    passes = {"on_pre_optimizer_step", "on_optimizer_step", "on_substep_end", "on_prediction_step"}
    theirs = [seen for seen in trainer_events(tmp_path) if seen[0] not in passes]
    before_end = theirs.index(("on_step_end", 6))
    assert recorder.seen[:before_end] == theirs[:before_end]
    assert recorder.seen[-1] == theirs[-1] == ("on_train_end", 6)


def test_callbacks_read_the_options_and_get_numbers(config, tmp_path):
    recorder = Recorder()
    made = config(max_steps=2, eval_steps=2, learning_rate=0.03, report_to="none", run_name="mine")
    train(made, callbacks=[recorder])
    arguments = recorder.arguments
    assert isinstance(arguments, TrainingArguments)
    assert (arguments.learning_rate, arguments.max_steps, arguments.run_name) == (0.03, 2, "mine")
    assert (str(arguments.device), arguments.n_gpu, arguments.world_size) == ("cpu", 0, 1)
    assert arguments.to_dict() == json.loads(arguments.to_json_string())
    assert arguments.to_dict()["mu"] == made.mu
    assert {type(value) for _, logs in recorder.logs for value in logs.values()} <= {int, float}
    assert [(step, "eval_loss" in logs) for step, logs in recorder.logs] == [(1, False), (2, False), (2, True)]
    assert recorder.logs[-1][1].keys() >= {"eval_accuracy", "eval_metric", "epoch"}


@pytest.mark.parametrize(
    ("asked", "logged", "evaluated", "saved"),
    [
        (
            {"should_log": (1, True), "should_evaluate": (2, True), "should_save": (3, True)},
            *([1, 2, 4], [2, 3], [3]),
        ),
        ({"should_evaluate": (3, False), "should_log": (4, False)}, [2], [], []),
        ({"should_training_stop": (2, True)}, [2], [], []),
    ],
)
def test_a_callback_may_ask_and_call_off(config, tmp_path, asked, logged, evaluated, saved):
    out = tmp_path / "out"
    result = train(config(max_steps=4, logging_steps=2, eval_steps=3), callbacks=[Asking(**asked)])
    assert (lines_of(out, "loss"), lines_of(out, "dev")) == (logged, evaluated)
    assert sorted(p.name for p in out.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in saved]
    assert (result.num_steps, result.stopped_early) == ((2, True) if "should_training_stop" in asked else (4, False))


def first_stop(losses, patience):
    """The evaluation after which `patience` of them in a row were no better than the best before; None if none is."""
    best, waited = None, 0
    for i, loss in enumerate(losses):
        waited = 0 if best is None or loss < best else waited + 1
        best = loss if best is None else min(best, loss)
        if waited >= patience:
            return i
    return None


@pytest.mark.parametrize("save_steps", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_early_stopping_of_transformers_works_and_a_resumed_run_stops_at_the_same_step(config, tmp_path, save_steps):
    options = {"max_steps": 12, "eval_steps": 1, "learning_rate": 0.01, "seed": 1, "save_steps": save_steps}
    whole = train(config(**options, output_dir=tmp_path / "whole"), callbacks=[EarlyStoppingCallback(2)])
    lines = map(json.loads, (tmp_path / "whole/metrics.jsonl").read_text(encoding="utf-8").splitlines())
    losses = [line["dev"]["loss"] for line in lines if "dev" in line]
    stop = first_stop(losses, 2) + 1
    assert 3 < stop < 12
    assert (whole.num_steps, whole.stopped_early) == (stop, True)

    class Killed(BaseException):
        pass

    real = loop.Run._run_step

    def killed(self, *args):
        if self.counters.step == stop - 1:
            raise Killed
        real(self, *args)

    part = {**options, "output_dir": tmp_path / "part"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Run, "_run_step", killed)
        with pytest.raises(Killed):
            train(config(**part), callbacks=[EarlyStoppingCallback(2)])
    recorder = Recorder()
    resumed = train(config(**part, resume=True), callbacks=[EarlyStoppingCallback(2), recorder])
    assert resumed.num_steps == stop
    assert {
        step
        for event, step in recorder.seen
        if event not in ("on_init_end", "on_train_begin", "on_epoch_begin", "on_step_begin")
    } == {stop}
    assert [repr(r) for r in read(tmp_path / "whole/ledger.zol")] == [
        repr(r) for r in read(tmp_path / "part/ledger.zol")
    ]
    # And once it has stopped, it stays so.
    again = train(config(**part, resume=True), callbacks=[EarlyStoppingCallback(2)])
    assert (again.num_steps, again.stopped_early) == (stop, True)


def test_what_is_no_callback_is_refused_before_anything_is_loaded(config):
    with pytest.raises(UsageError, match="derive its class from transformers"):
        train(config(model="no/such-model"), callbacks=[print])


def test_callbacks_change_no_bit_of_a_run(config, tmp_path):
    with_one, without = tmp_path / "with", tmp_path / "without"
    train(config(max_steps=3, output_dir=with_one), callbacks=[Recorder])
    train(config(max_steps=3, output_dir=without))
    assert (with_one / "model.safetensors").read_bytes() == (without / "model.safetensors").read_bytes()
    assert [repr(r) for r in read(with_one / "ledger.zol")] == [repr(r) for r in read(without / "ledger.zol")]


@pytest.mark.parametrize(("strategy", "logged"), [("epoch", [2, 4, 5]), ("no", [])])
def test_a_line_of_training_is_written_when_the_strategy_says(config, tmp_path, strategy, logged):
    recorder = Recorder()
    # Eight rows in batches of four.
    options = {"logging_strategy": strategy, "logging_steps": 10, "eval_steps": 2, "max_steps": 5}
    train(config(**options), callbacks=[recorder])
    assert lines_of(tmp_path / "out", "loss") == logged
    assert [step for step, logs in recorder.logs if "loss" in logs] == logged
    assert recorder.arguments.logging_strategy == strategy
    # A resumed run writes the same lines.
    before = (tmp_path / "out/metrics.jsonl").read_text(encoding="utf-8")
    train(config(**options, resume=True))
    again = (tmp_path / "out/metrics.jsonl").read_text(encoding="utf-8")
    assert [line["step"] for line in map(json.loads, again.splitlines())] == [
        line["step"] for line in map(json.loads, before.splitlines())
    ]


def test_fractions_of_all_steps_are_those_of_transformers(config, tmp_path):
    train(config(max_steps=7, logging_steps=0.4, eval_steps=0.5, save_steps=0.3))
    # ceil(2.8), ceil(3.5), ceil(2.1), and the end.
    out = tmp_path / "out"
    assert (lines_of(out, "loss"), lines_of(out, "dev")) == ([3, 6, 7], [4])
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6", "checkpoint-7"]
    saved = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
    assert [saved[name] for name in ("logging_steps", "eval_steps", "save_steps")] == [3, 4, 3]


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "options",
    [{}, {"method": "fo_sgd"}, {"eval_steps": 1, "load_best_model_at_end": True}],
    ids=["zo_sgd", "fo_sgd", "the best step"],
)
def test_a_run_that_a_callback_ended_stays_ended_unless_it_is_prolonged(config, options):
    stops = Asking(should_training_stop=(2, True))
    first = train(config(max_steps=4, **options), callbacks=[stops])
    assert (first.num_steps, first.stopped_early) == (2, True)
    again = train(config(max_steps=4, resume=True, **options))
    assert (again.num_steps, again.stopped_early) == (2, True)
    longer = train(config(max_steps=5, resume=True, **options))
    assert (longer.num_steps, longer.stopped_early) == (5, False)
    # The checkpoint of the stop is older than the end.
    assert train(config(max_steps=5, resume=True, **options)).num_steps == 5
