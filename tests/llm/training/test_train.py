"""A run is what its config says: the update of its formula, the same bits each time, an output that others can load."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
import yaml
from torch._C._functorch import maybe_current_level

import zotune as zo
from zotune.errors import RunError
from zotune.estimate.copies import with_copies
from zotune.llm.config.method import FIRST_ORDER
from zotune.llm.config.run import TrainConfig, read_recipe
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.tasks.user_data import load_user_data
from zotune.llm.training.loop import Run
from zotune.llm.training.train import train

PASSING = {"seconds", "peak_memory"}
METHODS = ["zo_sgd", "fo_sgd", "fo_adam"]
FILES = {"config.yaml", "metrics.jsonl", "results.json", "README.md", "tokenizer.json", "tokenizer_config.json"}


def metrics_of(folder, *without):
    """The lines of metrics.jsonl without what differs from run to run."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in PASSING | set(without)} for line in lines]


def losses_of(folder):
    return [line["loss"] for line in metrics_of(folder) if "loss" in line]


def weights_of(folder):
    from safetensors.torch import load_file

    return load_file(next(folder.glob("*model.safetensors")))


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def masked(options):
    """Options for a masked model, whose words are single tokens."""
    return {**options, "verbalizer": {"yes": "Yes", "no": "No"}}


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_tunes_every_family_and_writes_every_file(config, family, method, tuning, tmp_path):
    options = {"model": f"random:{family}-tiny", "method": method, "tuning": tuning, "learning_rate": 1e-2}
    result = train(config(**(masked(options) if family == "roberta" else options)))
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    written = {p.name for p in (tmp_path / "out").iterdir()}
    assert written >= FILES | (adapter if tuning == "lora" else {"config.json", "model.safetensors"})
    assert not any(name.startswith(".") for name in written)
    assert (result.num_steps, result.num_skipped, result.stopped_by) == (2, 0, None)
    assert result.num_forwards == (4 if method == "zo_sgd" else 2)
    saved = json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))
    assert saved["dev"]["accuracy"] == result.dev.accuracy
    assert saved["dev_before"]["loss"] != saved["dev"]["loss"]
    assert saved["peak_memory"] == result.peak_memory > 50 * 2**20
    assert saved["config"]["method"] == method
    lines = metrics_of(tmp_path / "out")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(line["loss"]) for line in lines)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "options",
    [{}, {"tuning": "lora", "sampler": "gaussian", "num_queries": 2}, {"method": "fo_adam"}, {"dtype": "bfloat16"}],
)
def test_the_same_config_gives_the_same_bits_and_another_seed_others(config, tmp_path, options):
    plain = {"max_steps": 4, "learning_rate": 1e-2, **options}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(len(name) + seed)
        before = torch.get_rng_state()
        train(config(**plain, seed=seed, output_dir=tmp_path / name))
        assert torch.equal(torch.get_rng_state(), before)
    assert same_bits(weights_of(tmp_path / "a"), weights_of(tmp_path / "b"))
    assert metrics_of(tmp_path / "a") == metrics_of(tmp_path / "b")
    assert not same_bits(weights_of(tmp_path / "a"), weights_of(tmp_path / "c"))
    assert losses_of(tmp_path / "a") != losses_of(tmp_path / "c")


@pytest.mark.parametrize("difference", ["central", "forward"])
def test_a_step_is_its_formula(config, tiny, tmp_path, difference, plain_score):
    """One step on all rows: c from plain losses at moved copies of the weights, then x - ηcu, in float64."""
    lr, mu = 0.01, 1e-2
    made = config(
        max_steps=1, num_dev=0, per_device_train_batch_size=11, learning_rate=lr, mu=mu, difference=difference, seed=5
    )
    examples = load_user_data(made, None).splits.train
    lm = tiny("llama")
    (u,) = zo.zo_sgd(lm.module, lr, mu=mu, seed=5).directions()
    x = {name: p.detach().clone() for name, p in lm.module.named_parameters()}
    part = {name: u.of(lm.module, name) for name in x}

    def loss_at(a):
        with torch.no_grad():
            for name, p in lm.module.named_parameters():
                p.copy_(x[name] + a * part[name])
        total = 0.0
        for e in examples:
            values = [plain_score(lm, e.prompt, candidate) for candidate in e.candidates]
            total += math.log(sum(map(math.exp, values))) - values[e.label]
        return total / len(examples)

    c = (loss_at(mu) - loss_at(-mu)) / (2 * mu) if difference == "central" else (loss_at(mu) - loss_at(0)) / mu
    assert abs(c) > 0.1
    train(made)
    tuned = weights_of(tmp_path / "out")
    assert tuned.keys() == x.keys()
    for name, before in x.items():
        torch.testing.assert_close(tuned[name], before - lr * c * part[name], rtol=0, atol=abs(lr * c) * 1e-3)


@pytest.mark.sample(2)
@pytest.mark.parametrize("method", METHODS)
def test_accumulated_batches_are_one_large_batch(config, tmp_path, method):
    options = {"method": method, "max_steps": 4, "learning_rate": 1e-3, "num_dev": 0}
    for k in (1, 2, 4):
        train(
            config(
                **options,
                gradient_accumulation_steps=k,
                per_device_train_batch_size=8 // k,
                output_dir=tmp_path / str(k),
            )
        )
    for k in (2, 4):
        assert losses_of(tmp_path / str(k)) == pytest.approx(losses_of(tmp_path / "1"), rel=1e-5)
    forwards = metrics_of(tmp_path / "4")[-1]["num_forwards"]
    assert forwards == 4 * metrics_of(tmp_path / "1")[-1]["num_forwards"]


@pytest.mark.parametrize(
    ("method", "optimizer"), [("zo_sgd", zo.ZerothOrder), ("fo_sgd", torch.optim.SGD), ("fo_adam", torch.optim.Adam)]
)
def test_there_are_exactly_max_steps_updates(config, monkeypatch, method, optimizer):
    updates, real = [], optimizer.step
    monkeypatch.setattr(optimizer, "step", lambda self, *args, **kw: (updates.append(1), real(self, *args, **kw))[1])
    assert train(config(method=method, max_steps=3)).num_steps == 3
    assert len(updates) == 3


@pytest.mark.parametrize("method", ["zo_sgd", "fo_sgd"])
@pytest.mark.parametrize(
    ("kind", "rates"),
    [
        ("constant", [0.4] * 4),
        ("linear", [0.4, 0.3, 0.2, 0.1]),
        ("cosine", [0.2 * (1 + math.cos(math.pi * t / 4)) for t in range(4)]),
    ],
)
def test_learning_rates_follow_their_schedule(config, tmp_path, monkeypatch, method, kind, rates):
    used: list[float] = []
    owner = zo.ZerothOrder if method == "zo_sgd" else torch.optim.SGD
    real = owner.step

    def step(self, *args, **kwargs):
        used.append(self.param_groups[0]["lr"])
        return real(self, *args, **kwargs)

    monkeypatch.setattr(owner, "step", step)
    train(config(method=method, max_steps=4, learning_rate=0.4, lr_scheduler_type=kind))
    assert used == pytest.approx(rates)
    assert [line["learning_rate"] for line in metrics_of(tmp_path / "out")] == pytest.approx(rates)


def test_a_config_runs_again_and_gives_the_same_bits(config, tmp_path):
    train(config(max_steps=3, learning_rate=1e-2, tuning="lora", lora_target_modules=("o_proj",), eval_steps=2))
    recipe = tmp_path / "out/config.yaml"
    again = TrainConfig.model_validate({**read_recipe(recipe), "output_dir": tmp_path / "again"})
    train(again)
    assert same_bits(weights_of(tmp_path / "out"), weights_of(tmp_path / "again"))
    first, second = metrics_of(tmp_path / "out"), metrics_of(tmp_path / "again")
    for line in (*first, *second):
        line.get("dev", {}).pop("seconds", None)
    assert first == second
    assert [line["step"] for line in first] == [1, 2, 2, 3]
    written = yaml.safe_load(recipe.read_text(encoding="utf-8")).keys()
    assert written == TrainConfig.model_fields.keys() - {"trust_remote_code"}  # which no file may set


@pytest.mark.parametrize("method", METHODS)
def test_losses_that_are_no_numbers_stop_the_run_and_leave_the_last_sound_weights(
    config, tmp_path, monkeypatch, method
):
    options = {"method": method, "num_dev": 0, "reuse_activations": False, "learning_rate": 1e-2}
    train(config(**options, max_steps=2, output_dir=tmp_path / "sound"))
    # One call tries whether probes may share a pass, then each step is one.
    calls, sound, real = [], 3 if method == "zo_sgd" else 2, LanguageModel.score

    def break_down(self, batch):
        calls.append(1)
        return real(self, batch) * (1.0 if len(calls) <= sound else math.nan)

    monkeypatch.setattr(LanguageModel, "score", break_down)
    with pytest.raises(RunError, match=r"NaN or infinite for 10 steps in a row.*ower the learning rate"):
        train(config(**options, max_steps=50))
    assert same_bits(weights_of(tmp_path / "out"), weights_of(tmp_path / "sound"))
    kept, before = metrics_of(tmp_path / "out", "max_steps"), metrics_of(tmp_path / "sound", "max_steps")
    assert kept[:2] == before
    assert all(line["loss"] is None for line in kept[2:])


def test_single_losses_that_are_no_numbers_are_counted_and_left_out(config, monkeypatch):
    calls, real = [], LanguageModel.score

    def break_down(self, batch):
        score = real(self, batch)
        if len(calls) in (2, 5):  # of the second end alone
            score = score + with_copies(torch.tensor([0.0, math.nan]), maybe_current_level())
        calls.append(1)
        return score

    monkeypatch.setattr(LanguageModel, "score", break_down)
    # The trial whether probes may share a pass would take calls of its own.
    monkeypatch.setattr(Run, "_try_side_by_side", lambda self: None)
    result = train(config(max_steps=6, num_dev=0, reuse_activations=False))
    assert (result.num_steps, result.num_skipped) == (6, 2)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_checkpointed_activations_give_the_same_losses(config, tmp_path, tuning):
    options = {"method": "fo_sgd", "tuning": tuning, "max_steps": 3, "learning_rate": 0.1}
    for on in (False, True):
        train(config(**options, gradient_checkpointing=on, output_dir=tmp_path / str(on)))
    assert losses_of(tmp_path / "True") == pytest.approx(losses_of(tmp_path / "False"), rel=1e-6)
    assert losses_of(tmp_path / "True")[0] != losses_of(tmp_path / "True")[-1]


@pytest.mark.sample(2)
@pytest.mark.parametrize("method", METHODS)
def test_small_steps_on_one_batch_lower_its_loss(config, tmp_path, method):
    train(
        config(
            method=method,
            num_dev=0,
            per_device_train_batch_size=11,
            max_steps=12,
            learning_rate=1e-2 if method == "fo_sgd" else 1e-3,
            **({} if method in FIRST_ORDER else {"num_queries": 4}),
        )
    )
    smoothed = losses_of(tmp_path / "out")
    assert all(later < earlier for earlier, later in itertools.pairwise(smoothed))


@pytest.mark.sample(1)
@pytest.mark.parametrize("options", [{"tuned_layers": 1}, {"tuning": "lora", "tuned_layers": 1}])
def test_reusing_activations_changes_no_result(config, tmp_path, options):
    for on in (False, True):
        train(config(**options, max_steps=4, learning_rate=1e-2, reuse_activations=on, output_dir=tmp_path / str(on)))
    assert losses_of(tmp_path / "True") == pytest.approx(losses_of(tmp_path / "False"), abs=1e-5)


def test_a_result_is_shown_in_a_few_lines_with_its_intervals(config, tmp_path):
    result = train(config(max_steps=1))
    before, after = result.dev_before, result.dev
    assert repr(result).splitlines() == [
        f"<Result: 1 step, 2 forward passes, loss {result.metrics['train_loss']:.4f}",
        f"  held-out rows before: accuracy {before}, loss {before.loss:.4f}",
        f"  held-out rows: accuracy {after}, loss {after.loss:.4f}",
        f"  saved in {tmp_path / 'out'}>",
    ]
    assert repr(after) == f"<AccuracyEvaluation: accuracy {after}, loss {after.loss:.4f}>"
    assert str(result) == repr(result)
    assert "evaluation rows: accuracy" in repr(replace(result, test=replace(after)))
    assert "nothing written>" in repr(replace(result, output_dir=None, test=None))


def test_epochs_that_give_few_steps_are_said(config, capsys):
    train(config(max_steps=1000, num_train_epochs=0.5))
    few = "0.5 epochs of 8 rows are 1 step; forward passes alone need hundreds to thousands: give more, or max_steps"
    assert few in capsys.readouterr().err
    with_back_propagation = TrainConfig(task="sst2", num_train_epochs=2, method="fo_adam")
    assert with_back_propagation.epochs_note(40, 5) == "2 epochs of 40 rows are 5 steps"
    assert "hundreds" not in TrainConfig(task="sst2", num_train_epochs=2).epochs_note(8000, 1000)
    assert TrainConfig(task="sst2").epochs_note(40, 1000) is None
