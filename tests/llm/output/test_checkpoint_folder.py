"""A folder checkpoint-N is what the run's folder would be after N steps, and a run goes on from it to the same end."""

import json
from types import SimpleNamespace

import pytest
import torch

from zotune.errors import NotWrittenError, UsageError
from zotune.ledger import read
from zotune.llm.callbacks.events import checkpoint_is_due
from zotune.llm.config.step import ModelOptions
from zotune.llm.models.load import load
from zotune.llm.output import checkpoint_folder
from zotune.llm.output.manifest import manifest_of
from zotune.llm.training.train import train

RUNS = {
    "zo_adam, lora": {"method": "zo_adam", "tuning": "lora"},
    "zo_sgd, bfloat16": {"dtype": "bfloat16", "tuned_layers": 1},
    "zo_sgd, master": {"dtype": "float16", "rounding": "master", "tuned_layers": 1},
    "fo_adam": {"method": "fo_adam", "tuning": "lora"},
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("zo_sgd, bfloat16", "zo_sgd, master")]


def weights_in(folder):
    (path,) = (p for p in folder.glob("*model*.safetensors") if p.name != "checkpoint.safetensors")
    return path.read_bytes()


def checkpoints(folder):
    return sorted(int(p.name.partition("-")[2]) for p in folder.glob("checkpoint-*") if p.is_dir())


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["zo_adam, lora", *SLOW])
def test_a_checkpoint_is_the_run_of_so_many_steps(config, tmp_path, name):
    options = {"learning_rate": 1e-2, "max_steps": 3, **RUNS[name]}
    train(config(**options, save_steps=2, output_dir=tmp_path / "whole"))
    train(config(**{**options, "max_steps": 2}, output_dir=tmp_path / "short"))
    part, short = tmp_path / "whole/checkpoint-2", tmp_path / "short"
    assert weights_in(part) == weights_in(short)
    assert json.loads((part / "trainer_state.json").read_text(encoding="utf-8"))["global_step"] == 2
    assert [repr(r) for r in read(part / "ledger.zol")] == [repr(r) for r in read(short / "ledger.zol")]
    assert manifest_of(part).foreign(part) == []


@pytest.mark.sample(2)
@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("name", ["zo_adam, lora", "fo_adam", *SLOW])
def test_a_run_goes_on_from_a_checkpoint_to_the_same_end(config, tmp_path, name, elsewhere):
    options = {"learning_rate": 1e-2, "max_steps": 4, "save_steps": 2, **RUNS[name]}
    whole = tmp_path / "whole"
    train(config(**options, output_dir=whole))
    end = weights_in(whole)
    # In the run's own folder the later steps are taken again.
    out = tmp_path / "other" if elsewhere else whole
    train(config(**options, output_dir=out, resume_from_checkpoint=whole / "checkpoint-2"))
    assert weights_in(out) == weights_in(out / "checkpoint-4") == weights_in(whole / "checkpoint-4") == end
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert steps == [1, 2, 3, 4]
    config_of_other = (out / "config.yaml").read_text(encoding="utf-8")
    assert "resume: false" in config_of_other and "resume_from_checkpoint: null" in config_of_other


@pytest.mark.parametrize("tuning", [pytest.param("full", marks=pytest.mark.slow), "lora"])
def test_transformers_and_peft_load_a_checkpoint(config, tmp_path, tuning):
    train(config(tuning=tuning, max_steps=2, save_steps=1, learning_rate=1e-2))
    folder = tmp_path / "out/checkpoint-1"
    if tuning == "full":
        from transformers import AutoModelForCausalLM

        tuned = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    else:
        from peft import PeftModel

        base = load(ModelOptions(model="random:llama-tiny", device="cpu")).module
        tuned = PeftModel.from_pretrained(base, folder).state_dict()
    ours = load(ModelOptions(model=str(folder), device="cpu")).module.state_dict()
    assert all(torch.equal(ours[name], tuned[name]) for name in tuned if name in ours)
    assert len(ours.keys() & tuned.keys()) > 10


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [(None, 2, [1, 2, 3, 4]), (9, 2, [1, 2, 3, 4]), (2, None, [3, 4]), (2, 2, [2, 4]), (1, 2, [2, 4]), (1, 4, [4])],
)
def test_as_many_checkpoints_stay_as_asked_and_the_best_one(limit, best, kept):
    names = {f"checkpoint-{step}" for step in range(1, 5)}
    output = SimpleNamespace(names=tuple(names), remove=lambda *old: names.difference_update(old))
    checkpoint_folder.remove_old_checkpoints(output, limit, best)
    assert checkpoint_folder.steps_of(names) == kept


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, []),
        ({"save_steps": 2}, [2, 4, 5]),
        ({"save_strategy": "steps"}, [5]),
        ({"save_strategy": "epoch"}, [2, 4, 5]),  # eight rows in batches of four
        ({"save_strategy": "no"}, []),
    ],
)
def test_checkpoints_are_due_as_the_strategy_says(config, options, steps):
    made = config(max_steps=5, **options)
    due = [step for step in range(1, 6) if checkpoint_is_due(made, step, "steps")]
    due += [step for step in (2, 4, 5) if checkpoint_is_due(made, step, "epoch")]
    assert due == steps


def test_the_best_checkpoint_stays_and_is_written_where_it_is_asked_for(config, tmp_path):
    options = {"max_steps": 7, "eval_steps": 1, "learning_rate": 0.01, "seed": 1, "load_best_model_at_end": True}
    best = train(config(**options, save_steps=1, save_total_limit=2, output_dir=tmp_path / "limit")).best_step
    assert 0 < best < 6
    assert checkpoints(tmp_path / "limit") == [best, 7]
    assert weights_in(tmp_path / "limit") == weights_in(tmp_path / "limit" / f"checkpoint-{best}")
    train(config(**options, save_strategy="best", output_dir=tmp_path / "best"))
    assert checkpoints(tmp_path / "best")[-1] == best


def test_what_the_user_put_or_changed_there_is_neither_replaced_nor_deleted(config, tmp_path):
    options, out = {"save_steps": 1, "tuning": "lora"}, tmp_path / "out"
    train(config(**options, max_steps=3))
    (out / "checkpoint-1/mine.txt").write_text("mine", encoding="utf-8")
    (out / "checkpoint-5").mkdir()
    (out / "checkpoint-5/mine.txt").write_text("mine", encoding="utf-8")
    train(config(**options, max_steps=5, resume=True, save_total_limit=1))
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-5", "checkpoint-5.saved"]
    assert [p.read_text(encoding="utf-8") for p in out.glob("*/mine.txt")] == ["mine", "mine"]
    assert not (out / "checkpoint-5/mine.txt").exists()
    train(config(max_steps=1, overwrite_output_dir=True, output_dir=tmp_path / "out/checkpoint-5"))


@pytest.mark.parametrize("failing", ["write_model_files", "_link_or_copy"])
def test_a_checkpoint_that_cannot_be_written_leaves_nothing_and_the_run_goes_on_later(
    config, tmp_path, failing, monkeypatch
):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_folder, failing, full)
        with pytest.raises(NotWrittenError, match=r"checkpoint-2 could not be written: .*No space left"):
            train(config(max_steps=3, save_steps=2))
    assert not [p for p in (tmp_path / "out").iterdir() if p.is_dir()]
    assert train(config(max_steps=3, save_steps=2, resume=True)).num_steps == 3


def test_true_and_false_stand_for_resume(config):
    assert [config(resume_from_checkpoint=value).resume for value in (True, "true", "True")] == [True] * 3
    assert [config(resume_from_checkpoint=value).resume for value in (False, "false", None)] == [False] * 3
    assert config(resume_from_checkpoint=True).resume_from_checkpoint is None


def test_what_is_no_checkpoint_or_of_another_run_is_refused_and_changes_nothing(config, tmp_path):
    options = {"max_steps": 3, "save_steps": 2, "tuning": "lora"}
    train(config(**options, output_dir=tmp_path / "a"))
    train(config(**options, output_dir=tmp_path / "b", seed=1))
    before = content(tmp_path)
    part = tmp_path / "a/checkpoint-2"
    for given, said in (
        ({"resume_from_checkpoint": tmp_path / "a/checkpoint-9"}, "holds checkpoint-2, checkpoint-3"),
        ({"resume_from_checkpoint": tmp_path / "a"}, "is no folder checkpoint-N"),
        ({"resume_from_checkpoint": part, "output_dir": tmp_path / "b"}, "holds an earlier run"),
        ({"resume_from_checkpoint": part, "seed": 1}, "is of a run with seed: 0"),
    ):
        with pytest.raises(UsageError, match=said):
            train(config(**{**options, "output_dir": tmp_path / "a", **given}))
        assert content(tmp_path) == before
    with pytest.raises(UsageError, match="seed: 0"):
        train(config(**options, output_dir=tmp_path / "c", resume_from_checkpoint=part, seed=1))
    assert not (tmp_path / "c").exists()


def test_the_command_line_resumes_from_a_checkpoint(short, zotune, tmp_path):
    assert zotune(*short("--save-steps", 1)).code == 0
    said = zotune(*short("--save-steps", 1, "--resume-from-checkpoint", tmp_path / "out/checkpoint-1"))
    assert said.code == 0, said.err
    assert "resumed at step 1" in said.err
    assert zotune(*short("--resume-from-checkpoint", tmp_path / "none")).code == 2
    assert zotune(*short("--save-total-limit", 3)).code == 2
    assert zotune(*short("--save-steps", 3, "--save-strategy", "epoch")).code == 2
