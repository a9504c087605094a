"""TRL's trainers by forward passes: their losses are objectives, their metrics and counts are of each batch once."""

import json
import math
import re
from pathlib import Path

import datasets
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as hf

import zotune as zo
from zotune.integrations.trainer_checks import _steps
from zotune.integrations.transformers import ZerothOrderMixin

trl = pytest.importorskip("trl")
ours = pytest.importorskip("zotune.integrations.trl")

# TRL warns of what transformers deprecates, and of what of its own.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
datasets.disable_progress_bars()
PLAIN = {
    **{
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
    },
    **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "seed": 7, "max_steps": 2},
    **{"gradient_checkpointing": False, "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential"},
}
ANSWERS = [{"prompt": f"Review {i} is", "completion": " good" * (i + 1)} for i in range(4)]
PAIRS = [{"prompt": f"Review {i} is", "chosen": " good", "rejected": " bad"} for i in range(4)]


def sft(tmp_path, lm, **options):
    args = ours.ZOSFTConfig(str(tmp_path), **{**PLAIN, "learning_rate": 1e-3, "loss_type": "nll", **options})
    rows = datasets.Dataset.from_list(ANSWERS)
    return ours.ZOSFTTrainer(
        lm.module, args=args, train_dataset=rows, eval_dataset=rows, processing_class=lm.tokenizer
    )  # fmt: skip


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_the_losses_of_fine_tuning_are_those_of_the_answers_tokens(tmp_path, tiny):
    trainer = sft(tmp_path, tiny("llama"), eval_strategy="steps", eval_steps=2)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trainer.train()
    other = tiny("llama").module
    opt = zo.zo_sgd(other, lr=1e-3, seed=7)

    def token_mean():
        predictions = other(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits.double()
        return F.cross_entropy(predictions[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)

    assert losses(trainer) == pytest.approx([opt.step(token_mean) for _ in range(2)], rel=1e-5)
    # A step counts its tokens once, though it reads them twice; and what it logs is of training.
    counts = [line["num_tokens"] for line in trainer.state.log_history if "num_tokens" in line]
    assert counts == [int(batch["attention_mask"].sum()) * step for step in (1, 2)]
    assert all("mean_token_accuracy" in line for line in trainer.state.log_history if "loss" in line)
    assert "eval_mean_token_accuracy" in trainer.state.log_history[-2]


def test_an_adapter_alone_is_tuned_and_saved(tmp_path, tiny):
    lm = tiny("llama")
    before = {name: p.clone() for name, p in lm.module.named_parameters()}
    args = ours.ZOSFTConfig(str(tmp_path / "out"), **PLAIN, learning_rate=1e-2)
    rows = datasets.Dataset.from_list(ANSWERS)
    trainer = ours.ZOSFTTrainer(
        lm.module, args=args, train_dataset=rows, processing_class=lm.tokenizer,
        peft_config=peft.LoraConfig(r=2, target_modules=["q_proj"]),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "out/adapter_model.safetensors").exists()
    after = {
        name.replace("base_model.model.", "").replace("base_layer.", ""): p
        for name, p in trainer.model.named_parameters()
    }
    assert all(torch.equal(after[name], p) for name, p in before.items())
    assert any(p.any() for name, p in after.items() if "lora_B" in name)


def test_preferences_and_rewards_are_objectives(tmp_path, tiny):
    lm = tiny("llama")
    args = ours.ZODPOConfig(str(tmp_path), **PLAIN, learning_rate=1e-4)
    rows = datasets.Dataset.from_list(PAIRS)
    dpo = ours.ZODPOTrainer(
        lm.module, args=args, train_dataset=rows, processing_class=lm.tokenizer, peft_config=peft.LoraConfig(r=2)
    )  # fmt: skip
    dpo.train()
    # Before the first step the model is its own reference, so both probes are near -log σ(0).
    assert losses(dpo)[0] == pytest.approx(math.log(2), abs=0.05)
    assert dpo._stepped.optimizer.num_forwards == 4

    torch.manual_seed(0)
    net = hf.LlamaForSequenceClassification(hf.LlamaConfig(**{**lm.module.config.to_dict(), "num_labels": 1}))
    args = ours.ZORewardConfig(str(tmp_path), **PLAIN, learning_rate=1e-2, method="zo_adam")
    reward = ours.ZORewardTrainer(net, args=args, train_dataset=rows, processing_class=lm.tokenizer)
    reward.train()
    assert all(map(math.isfinite, losses(reward)))
    assert reward._stepped.optimizer.num_skipped == 0


def test_unpaired_preferences_are_an_objective_and_the_card_names_zotune(tmp_path, tiny, caplog):
    lm = tiny("llama")
    # The kind of adapter that is there has no dropout and begins as the base model, which is the reference.
    args = ours.ZOKTOConfig(
        str(tmp_path), **{**PLAIN, "max_steps": 3, "save_strategy": "steps", "save_steps": 3}, learning_rate=1e-2
    )
    rows = [{"prompt": f"Review {i} is", "completion": " good" * (i + 1), "label": i % 2 == 0} for i in range(8)]
    kto = ours.ZOKTOTrainer(
        lm.module, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=lm.tokenizer,
        peft_config=peft.LoraConfig(r=2, target_modules=["q_proj"]),
    )  # fmt: skip
    kto.train()
    # 1 - σ(0) before the first step, but for the probes.
    assert losses(kto)[0] == pytest.approx(0.5, abs=0.01)
    assert len(set(losses(kto))) == 3
    assert kto._stepped.optimizer.num_forwards == 6
    assert any(p.any() for name, p in kto.model.named_parameters() if "lora_B" in name)
    assert "KL term" in caplog.text
    for card in (tmp_path / "README.md", tmp_path / "checkpoint-3/README.md"):
        head = card.read_text(encoding="utf-8").split("---")[1].splitlines()
        assert {"- zotune", "- zeroth-order", "- kto", "- trl"} <= set(head)


def test_losses_that_are_no_objective_are_refused(tmp_path, tiny):
    with pytest.raises(zo.UsageError, match='loss_type="dft" is no objective'):
        sft(tmp_path, tiny("llama"), loss_type="dft").create_optimizer()

    class Generating(ZerothOrderMixin, trl.GRPOTrainer):
        pass

    (found,) = _steps(object.__new__(Generating), ZerothOrderMixin)
    assert "GRPOTrainer has a training_step of its own" in found
    for known in (ours.ZOSFTTrainer, ours.ZODPOTrainer, ours.ZOKTOTrainer, ours.ZORewardTrainer):
        assert not list(_steps(object.__new__(known), ZerothOrderMixin))


def test_the_script_of_the_docs_runs(tmp_path, tiny, monkeypatch):
    """With a tiny model and two steps; and it is TRL's script but for two lines."""
    page = (Path(__file__).parents[2] / "docs/howto/trainer.md").read_text(encoding="utf-8")
    script = re.search(r"^:caption: sft.py\n(.*?)^```", page, re.M | re.S)[1]
    assert len(re.findall(r"# was: ", script)) == 2
    lm = tiny("llama")
    lm.module.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ANSWERS))
    monkeypatch.chdir(tmp_path)
    for old, new in (
        ('"HuggingFaceTB/SmolLM2-135M-Instruct"', '"model"'),
        ("max_steps=2000,", "max_steps=2, report_to=[], use_cpu=True,"),
        ("LoraConfig()", 'LoraConfig(target_modules="all-linear")'),
    ):
        assert old in script
        script = script.replace(old, new)
    exec(compile(script, "sft.py", "exec"), names := {})
    assert names["trainer"].state.global_step == 2
    assert (tmp_path / "runs/sft/adapter_model.safetensors").exists()
