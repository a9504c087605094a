"""Tuning goes on from an adapter: from its tensors, with its own configuration, to a folder that plain peft loads."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptEncoderConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from zotune.errors import UsageError
from zotune.llm.config.run import TrainConfig, read_recipe
from zotune.llm.config.step import ModelOptions
from zotune.llm.ledger.merge import Merge
from zotune.llm.ledger.rebuild import find_ledger
from zotune.llm.ledger.verify import verify
from zotune.llm.models.load import load
from zotune.llm.training.train import train
from zotune.plan.dry_run import dry_run

IDS = torch.arange(24).view(2, 12) + 20
SCHEMES = {
    "lora": {"tuning": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ("q_proj", "o_proj")},
    "prefix": {"tuning": "prefix", "num_virtual_tokens": 3},
    "prompt": {"tuning": "prompt", "num_virtual_tokens": 3},
    "ia3": {
        "tuning": "peft",
        "peft_type": "ia3",
        "peft_config": {"target_modules": ["k_proj"], "feedforward_modules": []},
    },
}


@pytest.fixture
def base(tmp_path, tiny):
    lm = tiny("llama")
    lm.module.save_pretrained(tmp_path / "base")
    lm.tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def plain_logits(base, folder):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def made_by_peft(base, folder, **options):
    """An adapter made by peft alone, with the base named by a path that starts at its folder."""
    module = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **{"r": 4, **options})
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in (p for p in module.parameters() if p.requires_grad):
            p += 0.1 * torch.randn(p.shape, generator=generator)
    tuned = {name.removeprefix("base_model.model.") for name, p in module.named_parameters() if p.requires_grad}
    with warnings.catch_warnings(action="ignore"):
        module.save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "../base"}))
    return tuned


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")  # peft's own call
@pytest.mark.sample(1)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_run_on_an_adapter_begins_where_the_adapter_ended(scheme, base, config, tmp_path):
    options = {"learning_rate": 1e-2, "num_dev": 3}
    first = train(config(model=str(base), output_dir=tmp_path / "a", **SCHEMES[scheme], **options))
    kind = {key: SCHEMES[scheme][key] for key in ("tuning", "peft_type") if key in SCHEMES[scheme]}
    second = train(config(model=str(tmp_path / "a"), output_dir=tmp_path / "b", **kind, seed=5, **options))
    assert second.dev_before.loss == pytest.approx(first.dev.loss, rel=1e-6)
    before, after = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    assert any(not torch.equal(before[k], after[k]) for k in before)
    ours, theirs = (json.loads((tmp_path / x / "adapter_config.json").read_text()) for x in "ba")
    assert ours == theirs
    # Plain peft computes what the run evaluated last, and the ledger leads from the adapter to these bits.
    lm = load(ModelOptions(model=str(tmp_path / "b"), device="cpu"))
    with torch.no_grad():
        assert torch.equal(lm.module(input_ids=IDS, use_cache=False).logits, plain_logits(base, tmp_path / "b"))
    assert verify(tmp_path / "b").is_right
    assert dry_run(config(model=str(tmp_path / "a"), output_dir=tmp_path / "c", **kind)).num_tuned == first.num_tuned


def test_the_steps_of_both_runs_in_a_row_are_the_second_run(base, config, tmp_path):
    options = {"tuning": "lora", "learning_rate": 1e-2}
    train(config(model=str(base), output_dir=tmp_path / "a", **options))
    train(config(model=str(tmp_path / "a"), output_dir=tmp_path / "b", **options, seed=3))
    row = Merge("row", (find_ledger(tmp_path / "a"), find_ledger(tmp_path / "b"))).rebuild()
    for name, value in weights(tmp_path / "b").items():
        assert torch.equal(row.tensor(name), value)


def test_a_resumed_run_on_an_adapter_has_the_bits_of_one_that_never_stopped(base, config, tmp_path):
    train(config(model=str(base), output_dir=tmp_path / "a", **SCHEMES["lora"]))
    options = {"model": str(tmp_path / "a"), "tuning": "lora", "lr_scheduler_type": "constant", "learning_rate": 1e-2}
    train(config(output_dir=tmp_path / "whole", max_steps=4, **options))
    train(config(output_dir=tmp_path / "part", max_steps=2, **options))
    train(config(output_dir=tmp_path / "part", max_steps=4, resume=True, **options))
    whole, part = weights(tmp_path / "whole"), weights(tmp_path / "part")
    assert all(torch.equal(whole[name], part[name]) for name in whole)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["k_proj"], "rank_pattern": {"layers.1.self_attn.k_proj": 2}},
        {"target_modules": ["q_proj"], "use_dora": True, "modules_to_save": ["norm"]},
        {"target_modules": ["o_proj"], "trainable_token_indices": [21, 30]},
        {"target_modules": r".*\.0\..*v_proj", "use_rslora": True},
    ],
)
def test_another_librarys_adapter_is_tuned_as_it_was_made(options, base, config, tmp_path):
    tuned = made_by_peft(base, tmp_path / "a", **options)
    (tmp_path / "deep").mkdir()
    out = train(config(model=str(tmp_path / "a"), tuning="lora", output_dir=tmp_path / "deep" / "b")).output_dir
    lm = load(ModelOptions(model=str(out), device="cpu"))
    with torch.no_grad():
        assert torch.equal(lm.module(input_ids=IDS, use_cache=False).logits, plain_logits(base, out))
    assert {t["name"] for t in find_ledger(out).header.tensors} == tuned
    assert verify(out).is_right


CONTRADICTIONS = [
    ("lora", {"lora_r": 2}, "lora_r: 2 contradicts the adapter .*, which has 4"),
    ("lora", {"lora_r": 8}, "lora_r: 8 contradicts"),
    ("lora", {"lora_alpha": 16}, "lora_alpha: 16.* contradicts"),
    (
        "lora",
        {"lora_target_modules": ("q_proj",)},
        "lora_target_modules: q_proj contradicts .*which has o_proj, q_proj",
    ),
    ("lora", {"lora_target_modules": ("q_proj", "o_proj", "v_proj")}, "lora_target_modules"),
    ("lora", {"lora_target_modules": ("all-linear",)}, "lora_target_modules: all-linear contradicts"),
    ("lora", {"tuned_layers": 1}, "tuned_layers: 1 contradicts"),
    ("prefix", {"num_virtual_tokens": 5}, "num_virtual_tokens: 5 contradicts the adapter .*, which has 3"),
    ("ia3", {"peft_config": {"target_modules": ["v_proj"]}}, "peft_config: target_modules: .*contradicts"),
]


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
def test_an_option_that_contradicts_the_adapter_is_refused(base, config, tmp_path):
    for scheme in ("lora", "prefix", "ia3"):
        train(config(model=str(base), output_dir=tmp_path / scheme, max_steps=1, **SCHEMES[scheme]))
    for scheme, options, match in CONTRADICTIONS:
        kind = {key: SCHEMES[scheme][key] for key in ("tuning", "peft_type") if key in SCHEMES[scheme]}
        for run in (train, dry_run) if "lora_r" in options else (dry_run,):
            with pytest.raises(UsageError, match=match):
                run(config(model=str(tmp_path / scheme), output_dir=tmp_path / "b", **kind, **options))
    agreed = {"lora_target_modules": ("self_attn.o_proj", "q_proj"), "lora_r": 4, "lora_alpha": 8}
    assert dry_run(config(model=str(tmp_path / "lora"), output_dir=tmp_path / "b", tuning="lora", **agreed))


def test_the_command_line_knows_what_was_given(base, config, tmp_path, zotune, rows_file):
    train(config(model=str(base), output_dir=tmp_path / "a", max_steps=1, **SCHEMES["lora"]))
    command = ("train", "--model", tmp_path / "a", "--train-file", rows_file, "--tuning", "lora", "--num-dev", 2)
    common = (*command, "--max-steps", 1, "--learning-rate", 1e-3, "--device", "cpu", "--output-dir", tmp_path / "b")
    said = zotune(*common, "--lora-r", 8)  # the default of a new adapter
    assert said.code == 2
    assert "lora_r: 8 contradicts the adapter" in said.err
    said = zotune(*common)
    assert said.code == 0
    assert "going on from the adapter" in said.err and "LoRA of rank 4, alpha 8" in said.err
    recipe = read_recipe(tmp_path / "b" / "config.yaml")
    assert (recipe["lora_r"], recipe["lora_alpha"]) == (4, 8)
    assert zotune("train", tmp_path / "b" / "config.yaml", "--output-dir", tmp_path / "c").code == 0
    assert torch.equal(*(next(iter(weights(tmp_path / x).values())) for x in "bc"))


def test_what_peft_fills_in_can_be_read_again(base, config):
    out = train(
        config(model=str(base), tuning="peft", peft_type="ia3", peft_config={"target_modules": ["k_proj"]})
    ).output_dir
    assert plain_logits(base, out).isfinite().all()


def test_what_was_saved_as_an_outcome_alone_is_refused(base, tmp_path, config):
    adapter = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), adapter).save_pretrained(tmp_path / "a")
    with pytest.raises(UsageError, match="cannot be tuned further"):
        train(config(model=str(tmp_path / "a"), tuning="peft", peft_type="p_tuning"))


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
@pytest.mark.sample(1)
@pytest.mark.parametrize("scheme", ["lora", "prompt"])
def test_a_loaded_adapter_is_tuned_on_in_python(scheme, base, config, tmp_path):
    from zotune.llm import load as load_in_python
    from zotune.llm import train as train_in_python

    train(config(model=str(base), output_dir=tmp_path / "a", max_steps=1, **SCHEMES[scheme]))
    model, tokenizer = load_in_python(tmp_path / "a", device="cpu")
    rows = [{"text": text, "label": "yes" if i % 2 else "no"} for i, text in enumerate(["dull", "fine"] * 4)]
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    result = train_in_python(model, tokenizer, rows, max_steps=1, per_device_train_batch_size=4, learning_rate=1e-2)
    assert any(not torch.equal(p, before[n]) for n, p in result.model.named_parameters() if n in before)


def test_a_default_is_not_an_option_that_was_given():
    plain = TrainConfig(task="sst2", tuning="lora")
    assert "lora_r" not in plain.model_fields_set
