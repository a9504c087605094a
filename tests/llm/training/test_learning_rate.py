"""The learning rate of a step is that of transformers' schedule, and a run, its ledger and its log hold the same."""

import json
import math

import pytest
import torch

from zotune.cli.options import parse
from zotune.errors import UsageError
from zotune.ledger import read
from zotune.llm.config.run import TrainConfig
from zotune.llm.config.schedule import ScheduleOptions
from zotune.llm.config.schema import validate
from zotune.llm.data.batches import batches
from zotune.llm.training.learning_rate import schedule_of
from zotune.llm.training.train import train

STEPS, RATE = 12, 0.5
SCHEDULES = {
    "constant": {},
    "constant_with_warmup": {"warmup_steps": 5},
    "linear": {"warmup_steps": 3},
    "cosine": {"warmup_ratio": 0.3},
    "cosine_with_restarts": {"warmup_steps": 2, "lr_scheduler_kwargs": {"num_cycles": 3}},
    "polynomial": {"lr_scheduler_kwargs": '{"power": 2, "lr_end": 0.1}'},
    "inverse_sqrt": {"warmup_steps": 4},
    "cosine_with_min_lr": {"lr_scheduler_kwargs": {"min_lr": 0.1}},
    "cosine_warmup_with_min_lr": {"warmup_steps": 0.25, "lr_scheduler_kwargs": {"min_lr_rate": 0.2}},
    "warmup_stable_decay": {"warmup_steps": 2, "lr_scheduler_kwargs": {"num_decay_steps": 4}},
}


def options(**given):
    return validate(ScheduleOptions, {"max_steps": STEPS, "learning_rate": RATE, **given}, "test")


def rates_of_transformers(kind, warmup, arguments, steps=STEPS, rate=RATE):
    """The rates that a training loop with transformers' scheduler takes: the scheduler steps after the optimizer."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=rate)
    scheduler = get_scheduler(kind, optimizer, warmup, steps, arguments)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_rate_of_each_step_is_that_of_a_loop_with_transformers_scheduler(kind):
    ours = options(lr_scheduler_type=kind, **SCHEDULES[kind])
    warmup = {"cosine": 4, "cosine_warmup_with_min_lr": 3}.get(kind, SCHEDULES[kind].get("warmup_steps", 0))
    theirs = rates_of_transformers(kind, warmup, ours.scheduler_arguments)
    assert [RATE * schedule_of(ours)(step) for step in range(STEPS)] == pytest.approx(theirs, rel=1e-12)
    assert len(set(theirs)) > 3 or kind == "constant"


def test_schedules_without_a_warm_up_have_the_bits_of_earlier_versions():
    linear, cosine = (schedule_of(options(lr_scheduler_type=kind, max_steps=97)) for kind in ("linear", "cosine"))
    for step in range(97):
        assert linear(step) == 1 - step / 97
        assert cosine(step) == (1 + math.cos(math.pi * (step / 97))) / 2


def test_a_run_takes_records_and_logs_the_scheduled_rates(config, tmp_path):
    train(config(max_steps=5, learning_rate=0.1, lr_scheduler_type="linear", warmup_steps=2))
    rates = rates_of_transformers("linear", 2, {}, steps=5, rate=0.1)
    assert [r.learning_rates[0] for r in read(tmp_path / "out/ledger.zol")] == pytest.approx(rates, rel=1e-6)
    lines = map(json.loads, (tmp_path / "out/metrics.jsonl").read_text(encoding="utf-8").splitlines())
    assert [line["learning_rate"] for line in lines] == pytest.approx(rates, rel=1e-12)


def test_rounding_to_nearest_survives_the_first_step_of_a_warm_up(config):
    more = {"dtype": "bfloat16", "rounding": "nearest", "learning_rate": 0.5, "max_steps": 2}
    assert train(config(**more, lr_scheduler_type="linear", warmup_steps=1)).num_skipped == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "follows the noise of the losses"),
        ({"lr_scheduler_type": "greedy"}, "follows the noise of the losses"),
        ({"lr_scheduler_type": "cosin"}, "Did you mean 'cosine'"),
        ({"warmup_steps": 3}, "use constant_with_warmup"),
        ({"warmup_ratio": 1.5, "lr_scheduler_type": "linear"}, "below 1"),
        ({"warmup_ratio": 0.1, "warmup_steps": 1, "lr_scheduler_type": "linear"}, "give only one of them"),
        ({"warmup_steps": -1, "lr_scheduler_type": "linear"}, "at least 0"),
        ({"lr_scheduler_kwargs": {"power": 2}}, "has no effect on lr_scheduler_type: constant"),
        ({"lr_scheduler_kwargs": "power: 2: 3"}, "it must be a mapping"),
        ({"num_train_epochs": 0}, "above 0"),
        ({"num_train_epochs": 2}, "both end the run; give only one of them"),
    ],
)
def test_a_bad_schedule_is_refused_in_words(given, said):
    with pytest.raises(UsageError, match=said):
        options(**given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps.*it takes decay_type, min_lr_ratio"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"powr": 2}}, "'powr'.*it takes num_cycles"),
        ({"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"power": 2}}, "it takes none"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": "two"}}, "Change lr_scheduler_kwargs"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 1e400}}, "Change lr_scheduler_kwargs"),
        ({"lr_scheduler_type": "polynomial", "learning_rate": 0}, "must be smaller than initial lr"),
    ],
)
def test_arguments_that_a_schedule_does_not_take_are_refused_before_a_model_is_loaded(config, given, said):
    with pytest.raises(UsageError, match=said):
        train(config(model="no/such-model", **given))


def test_epochs_are_passes_over_the_rows(config):
    made = config(max_steps=1000, num_train_epochs=3, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    rows = list(range(10))
    made = made.with_steps(len(rows), made.rows_a_step)
    assert (made.max_steps, made.num_train_epochs) == (8, None)
    seen = [row for batch in batches(rows, made) for row in batch]
    for epoch in range(3):
        assert sorted(seen[10 * epoch : 10 * epoch + 10]) == rows


def test_a_run_of_epochs_is_the_run_of_as_many_steps(config, tmp_path):
    result = train(config(max_steps=1000, num_train_epochs=1.5))
    assert result.num_steps == 3  # eight rows in batches of four
    assert "max_steps: 3\n" in (tmp_path / "out/config.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("recipe", "args", "length"),
    [
        ({"max_steps": 7}, ["--num-train-epochs", "2"], (1000, 2)),
        ({"max_steps": 7}, ["--max-steps=-1", "--num_train_epochs=0.5"], (1000, 0.5)),
        ({"num_train_epochs": 2}, ["--max_steps", "3"], (3, None)),
    ],
)
def test_an_option_replaces_the_length_of_the_recipe(recipe, args, length):
    made = parse(TrainConfig, {"task": "sst2", **recipe}, "recipe", args, "zotune train")
    assert (made.max_steps, made.num_train_epochs) == length


def test_two_lengths_on_the_command_line_are_refused(short, zotune):
    said = zotune(*short("--num-train-epochs", 2))  # beside --max-steps
    assert (said.code, "give only one of them" in said.err) == (2, True)
