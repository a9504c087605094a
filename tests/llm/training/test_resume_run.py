"""A run that ended in any way goes on with `--resume` and ends as if nothing had happened."""

import json
import math
import shutil

import pytest
import torch

from zotune.errors import NonFiniteLossError, UsageError
from zotune.ledger import read
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.training import checkpoint
from zotune.llm.training.origin import data_digest
from zotune.llm.training.train import train

PASSING = {"seconds", "peak_memory"}

RUNS = {
    "lora": {"tuning": "lora"},
    "full, bfloat16, linear": {"dtype": "bfloat16", "lr_scheduler_type": "linear", "learning_rate": 1e-2},
    "float16, master, queries": {"dtype": "float16", "rounding": "master", "num_queries": 2, "sampler": "gaussian"},
    "cosine, evaluations": {"lr_scheduler_type": "cosine", "eval_steps": 2, "logging_steps": 3},
    "momentum": {"method": "zo_sgd_mmt"},
    "adam": {"method": "zo_adam", "tuning": "lora", "weight_decay": 0.1},
    "adam, window": {"method": "zo_adam", "window": 3, "tuned_layers": 1},
    "conservative": {"method": "zo_sgd_cons", "learning_rate": 0.1},
    "blocks one by one": {"blocks": "layer", "block_order": "sequential"},
    "random masks": {"sparsity": 0.3, "mask_interval": 2},
    "masks by magnitude": {"sparsity": 0.3, "mask": "magnitude", "mask_interval": 2},
    "low rank": {"rank": 2, "rank_interval": 3, "sampler": "gaussian"},
    "forward gradient": {"method": "forward_grad", "tuning": "lora"},
    "best model": {"eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 0.05},
    "early stopping": {"eval_steps": 1, "early_stopping_patience": 2, "learning_rate": 0.3},
    "micro-batches": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
}
WITHOUT_LEDGER = {
    "fo_adam": {"method": "fo_adam", "eval_steps": 2},
    "fo_adam, dropout": {"method": "fo_adam", "model": "random:opt-tiny", "tuning": "lora"},
    "fo_sgd": {"method": "fo_sgd", "lr_scheduler_type": "linear", "dtype": "bfloat16"},
    "hybrid, bfloat16": {"hybrid_layers": 1, "hybrid_tied": "zeroth_order", "dtype": "bfloat16"},
    "hybrid": {"hybrid_layers": 1, "hybrid_method": "fo_adam", "sparsity": 0.2, "hybrid_tied": "zeroth_order"},
}


def lines_of(folder):
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        line.get("dev", {}).pop("seconds", None)
    return [{k: v for k, v in line.items() if k not in PASSING} for line in lines]


def results_of(folder):
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    for key in ("dev_before", "dev", "test"):
        (found[key] or {}).pop("seconds", None)
    config = {k: v for k, v in found["config"].items() if k not in ("output_dir", "resume", "save_steps")}
    return {**{k: v for k, v in found.items() if k not in {*PASSING, "output_dir"}}, "config": config}


def assert_same_run(one, other):
    (weights,) = one.glob("*model.safetensors")
    assert weights.read_bytes() == (other / weights.name).read_bytes()
    assert lines_of(one) == lines_of(other)
    assert results_of(one) == results_of(other)
    if (one / "ledger.zol").exists():
        ours, theirs = read(one / "ledger.zol"), read(other / "ledger.zol")
        assert ours.rows.tobytes()[4:] and [repr(r) for r in ours] == [repr(r) for r in theirs]


def cut_short(folder, into, num_records, num_bytes, metrics_bytes):
    """What a power cut may leave of a run: any number of bytes at the end of each file is gone."""
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir()
    shutil.copy(folder / "config.yaml", into)
    ledger = read(folder / "ledger.zol")
    end = len(ledger.first(num_records).to_bytes())
    (into / "ledger.zol").write_bytes((folder / "ledger.zol").read_bytes()[: end + num_bytes])
    (into / "metrics.jsonl").write_bytes((folder / "metrics.jsonl").read_bytes()[:metrics_bytes])


# Records of the ledger that are left, bytes of the next one, and those of the metrics as a function of their size.
CUTS = {
    "at its start": (0, 0, lambda _: 0),
    "in the second record": (1, 7, lambda size: size),
    "in the fourth record": (3, 19, lambda size: size // 2 + 3),
    "in the metrics": (7, 0, lambda _: 40),
}


@pytest.mark.sample(8)
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("cut", CUTS)
def test_a_run_cut_anywhere_goes_on_to_the_same_end(config, tmp_path, name, cut):
    options = {"max_steps": 7, "learning_rate": 1e-2, **RUNS[name]}
    whole, part = tmp_path / "whole", tmp_path / "part"
    train(config(**options, output_dir=whole))
    num_records, num_bytes, metrics_bytes = CUTS[cut]
    size = (whole / "metrics.jsonl").stat().st_size
    cut_short(whole, part, min(num_records, len(read(whole / "ledger.zol"))), num_bytes, metrics_bytes(size))
    train(config(**options, output_dir=part, resume=True))
    assert_same_run(whole, part)


@pytest.mark.sample(1)
@pytest.mark.parametrize("save_steps", [2, 3])
@pytest.mark.parametrize(
    "name", ["full, bfloat16, linear", "adam", "adam, window", "masks by magnitude", "random masks"]
)
def test_a_checkpoint_and_the_rest_of_the_ledger_give_the_same_end(config, tmp_path, name, save_steps, capsys):
    options = {"max_steps": 7, "learning_rate": 1e-2, **RUNS[name]}
    whole, part = tmp_path / "whole", tmp_path / "part"
    train(config(**options, output_dir=whole))
    stop_after(config, {**options, "output_dir": part, "save_steps": save_steps}, 5)
    capsys.readouterr()
    train(config(**options, output_dir=part, resume=True, save_steps=save_steps))
    assert f"from the checkpoint of step {5 - 5 % save_steps}" in capsys.readouterr().err
    assert_same_run(whole, part)


class Killed(BaseException):
    """Stands in for the end of the process."""


def stop_after(config, options, num_steps):
    """A run whose process is gone in the middle of a step."""
    from zotune.llm.training import loop as module

    real = module.Run._closures

    def closures(self, examples):
        if self.counters.step == num_steps:
            raise Killed
        return real(self, examples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Run, "_closures", closures)
        with pytest.raises(Killed):
            train(config(**options))


@pytest.mark.sample(3)
@pytest.mark.parametrize("save_steps", [None, 2])
@pytest.mark.parametrize("name", WITHOUT_LEDGER)
def test_first_order_and_hybrid_runs_go_on_from_their_checkpoint(config, tmp_path, name, save_steps):
    options = {"max_steps": 6, "learning_rate": 1e-2, **WITHOUT_LEDGER[name]}
    whole, part = tmp_path / "whole", tmp_path / "part"
    train(config(**options, output_dir=whole))
    options |= {"output_dir": part, "save_steps": save_steps}
    for steps in (3, 5):
        torch.manual_seed(steps)
        stop_after(config, {**options, "resume": True}, steps)
    train(config(**options, resume=True))
    assert_same_run(whole, part)
    assert not (part / "ledger.zol").exists()


def test_a_damaged_checkpoint_is_done_without(config, tmp_path, capsys):
    options = {"max_steps": 5, "tuning": "lora", "learning_rate": 1e-2}
    whole, part = tmp_path / "whole", tmp_path / "part"
    train(config(**options, output_dir=whole))
    stop_after(config, {**options, "output_dir": part, "save_steps": 2}, 4)
    content = bytearray((part / "checkpoint.safetensors").read_bytes())
    content[-5] ^= 1
    (part / "checkpoint.safetensors").write_bytes(content)
    train(config(**options, output_dir=part, resume=True))
    assert "checkpoint.safetensors is damaged" in capsys.readouterr().err
    assert_same_run(whole, part)


def test_a_complete_run_resumed_is_the_same_run(config, tmp_path):
    options = {"max_steps": 3, "tuning": "lora", "output_dir": tmp_path / "out"}
    train(config(**options))
    shutil.copytree(tmp_path / "out", tmp_path / "kept")
    train(config(**options, resume=True))
    assert_same_run(tmp_path / "out", tmp_path / "kept")


def test_more_steps_go_on_where_the_run_ended(config, tmp_path):
    train(config(max_steps=7, output_dir=tmp_path / "whole"))
    train(config(max_steps=4, output_dir=tmp_path / "part"))
    train(config(max_steps=7, output_dir=tmp_path / "part", resume=True))
    (whole,), (part,) = ([*f.glob("*model.safetensors")] for f in (tmp_path / "whole", tmp_path / "part"))
    assert whole.read_bytes() == part.read_bytes()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"learning_rate": 0.5}, "with learning_rate: 0.01, so it cannot resume with 0.5"),
        ({"seed": 1}, "with seed: 0"),
        ({"lr_scheduler_type": "linear"}, "with lr_scheduler_type: constant"),
        ({"overwrite_output_dir": True}, "give only one of them"),
    ],
)
def test_a_run_asked_for_differently_is_not_resumed(config, tmp_path, changed, said):
    options = {"max_steps": 3, "learning_rate": 0.01, "output_dir": tmp_path / "out"}
    train(config(**options))
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=said):
        train(config(**{**options, **changed}, resume=True))
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before


def test_other_rows_are_noticed(config, tmp_path, rows_file):
    train(config(max_steps=3))
    text = rows_file.read_text(encoding="utf-8")
    rows_file.write_text(text.replace("i", "y"), encoding="utf-8")
    with pytest.raises(UsageError, match="other training rows"):
        train(config(max_steps=3, resume=True))


FIRST_ORDER_OPTIONS = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2}
KINDS = {
    "fo_sgd": {"method": "fo_sgd"},
    "fo_adam, no checkpoint of a step": {"method": "fo_adam", "save_steps": None},
    "hybrid": {"hybrid_layers": 1, "hybrid_tied": "zeroth_order"},
    "best": {"method": "fo_sgd", "eval_steps": 2, "load_best_model_at_end": True},
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_without_a_ledger_notices_other_rows_and_changes_nothing(config, tmp_path, rows_file, kind):
    options = {**FIRST_ORDER_OPTIONS, **KINDS[kind]}
    train(config(**options))
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    rows = rows_file.read_text(encoding="utf-8")
    rows_file.write_text(rows.replace("film", "movie").replace("yawn", "sigh"), encoding="utf-8")
    with pytest.raises(UsageError, match="other training rows"):
        train(config(**{**options, "max_steps": 6}, resume=True))
    rows_file.write_text("".join(sorted(rows.splitlines(keepends=True))), encoding="utf-8")
    with pytest.raises(UsageError, match="other training rows"):  # the same ones in another order
        train(config(**{**options, "max_steps": 6}, resume=True))
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
    rows_file.write_text(rows, encoding="utf-8")
    assert train(config(**{**options, "max_steps": 6}, resume=True)).num_steps == 6


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", [*KINDS, "lora"])
def test_a_run_without_a_ledger_notices_another_base_model(config, tmp_path, tiny, kind):
    lm, base = tiny("llama"), tmp_path / "base"
    lm.tokenizer.save_pretrained(base)
    lm.base.save_pretrained(base)
    options = {**FIRST_ORDER_OPTIONS, **KINDS.get(kind, {"method": "fo_sgd", "tuning": "lora"}), "model": str(base)}
    train(config(**options))
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    with torch.no_grad():
        lm.base.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    lm.base.save_pretrained(base)
    with pytest.raises(UsageError, match="other weights of the base model"):
        train(config(**{**options, "max_steps": 6}, resume=True))
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before


def test_held_out_rows_that_choose_the_weights_may_not_change(config, tmp_path):
    options = {**FIRST_ORDER_OPTIONS, **KINDS["best"]}
    train(config(**options))
    found = checkpoint.load(tmp_path / "out" / "checkpoint.safetensors")
    found["origin"]["held_out"] = "another"
    checkpoint.save(tmp_path / "out" / "checkpoint.safetensors", found)
    with pytest.raises(UsageError, match="other held-out rows"):
        train(config(**options, resume=True))


def test_a_ledger_names_the_held_out_rows_that_choose_the_weights(config, tmp_path, monkeypatch):
    for options, named in (({}, False), ({"eval_steps": 2, "load_best_model_at_end": True}, True)):
        out = tmp_path / str(named)
        train(config(max_steps=2, output_dir=out, **options))
        about = read(out / "ledger.zol").header.about
        assert ("held_out" in about) == named
        if named:
            assert about["held_out"] not in (data_digest(()), about["data"])
            monkeypatch.setattr(
                "zotune.llm.training.origin.data_digest",
                lambda rows, d=about["data"]: d if len(rows) > 3 else "another",
            )
            with pytest.raises(UsageError, match="other held-out rows"):
                train(config(max_steps=2, output_dir=out, resume=True, **options))


def test_a_checkpoint_that_is_gone_and_fewer_steps_are_refused(config, tmp_path):
    options = {**FIRST_ORDER_OPTIONS, "method": "fo_sgd"}
    train(config(**options))
    with pytest.raises(UsageError, match="a run of 4 steps, so it cannot end after 3"):
        train(config(**{**options, "max_steps": 3}, resume=True))
    (tmp_path / "out" / "checkpoint.safetensors").unlink()
    with pytest.raises(UsageError, match=r"its checkpoint\.safetensors is not there"):
        train(config(**options, resume=True))


def test_a_folder_is_one_runs_at_a_time(config, tmp_path):
    from zotune.llm.output.output_folder import OutputFolder

    made = config(tuning="lora")
    folder = OutputFolder(made)
    with pytest.raises(UsageError, match="another run is writing to"):
        train(made)
    folder.close()
    train(made)


def test_a_run_that_failed_for_losses_fails_again_at_once(config, tmp_path, monkeypatch):
    calls, real = [], LanguageModel.score

    def break_down(self, batch):
        # One call tries whether probes may share a pass, then each step is one.
        calls.append(1)
        return real(self, batch) * (1.0 if len(calls) <= 3 else math.nan)

    monkeypatch.setattr(LanguageModel, "score", break_down)
    options = {"num_dev": 0, "reuse_activations": False, "max_steps": 50}
    with pytest.raises(NonFiniteLossError):
        train(config(**options))
    assert len(read(tmp_path / "out/ledger.zol")) == 12
    before = (tmp_path / "out/model.safetensors").read_bytes()
    with pytest.raises(NonFiniteLossError, match="10 steps in a row"):
        train(config(**options, resume=True))
    assert len(read(tmp_path / "out/ledger.zol")) == 12
    assert (tmp_path / "out/model.safetensors").read_bytes() == before


def test_a_chat_has_the_date_of_the_runs_first_day(config, tmp_path, monkeypatch):
    """A template that writes the date: a run resumed on another day, and its evaluation, write the first one."""
    from datetime import date

    from zotune.llm.config.run import EvalConfig, inherited_options
    from zotune.llm.config.step import ModelOptions
    from zotune.llm.models.load import load
    from zotune.llm.tasks import user_data

    def on(*day):
        monkeypatch.setattr(user_data, "date", type("Day", (date,), {"today": classmethod(lambda cls: cls(*day))}))

    lm = load(ModelOptions(model="random:llama-tiny", device="cpu"))
    lm.tokenizer.chat_template = (
        "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    lm.module.save_pretrained(tmp_path / "chat")
    lm.tokenizer.save_pretrained(tmp_path / "chat")
    messages = [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}]
    rows = tmp_path / "chats.jsonl"
    rows.write_text((json.dumps({"messages": messages}) + "\n") * 6, encoding="utf-8")
    options = {"model": str(tmp_path / "chat"), "train_file": rows, "num_dev": 2, "tuning": "lora"}
    on(2024, 5, 1)
    train(config(output_dir=tmp_path / "whole", max_steps=3, **options))
    train(config(output_dir=tmp_path / "cut", max_steps=2, **options))
    on(2024, 5, 2)
    train(config(output_dir=tmp_path / "cut", max_steps=3, resume=True, **options))
    (weights,) = (tmp_path / "whole").glob("*model.safetensors")
    assert weights.read_bytes() == (tmp_path / "cut" / weights.name).read_bytes()
    assert results_of(tmp_path / "cut")["config"]["chat_date"] == "2024-05-01"
    inherited, _ = inherited_options(EvalConfig(model=str(tmp_path / "cut"), eval_file=rows), tmp_path / "cut")
    assert inherited["chat_date"] == "2024-05-01"
    train(config(output_dir=tmp_path / "later", max_steps=3, **options))
    assert results_of(tmp_path / "later")["config"]["chat_date"] == "2024-05-02"
