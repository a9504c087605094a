"""An adapter of the built-in model names its base as the Hub does, and zotune finds its own weights all the same.

A tiny model stands in for the built-in one, and a folder of the Hub's name for the Hub.
"""

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM

from zotune.errors import UsageError
from zotune.llm.api.load import load as load_both
from zotune.llm.checkpoints.adapter_folder import base_of_adapter
from zotune.llm.checkpoints.hub_names import HUB_IDS, built_in_name, hub_id
from zotune.llm.config.run import EvalConfig
from zotune.llm.config.step import ModelOptions
from zotune.llm.models import load as loading
from zotune.llm.sharing.shared_folder import base_on_hub, write_shared
from zotune.llm.training.evaluation import base_model_of, evaluate
from zotune.llm.training.train import train

NAME = "smollm2-135m"
IDS = torch.tensor([[0, 70, 80, 90]])


@pytest.fixture
def built_in(tiny, tmp_path, monkeypatch):
    """The folder of a tiny model in place of the built-in one's."""
    folder = tmp_path / "cache"
    lm = tiny("llama")
    lm.module.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    monkeypatch.setattr(loading, "fetch", lambda name, accept_terms: folder)
    return folder


@pytest.fixture
def hub(built_in, tmp_path, monkeypatch):
    """The current folder, in which a folder of the Hub's name is the model on the Hub."""
    here = tmp_path / "elsewhere"
    (here / HUB_IDS[NAME]).parent.mkdir(parents=True)
    (here / HUB_IDS[NAME]).symlink_to(built_in)
    monkeypatch.chdir(here)
    return here


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


@pytest.mark.parametrize("tuning", ["lora", "prompt"])
def test_peft_opens_an_adapter_of_the_built_in_model_by_the_hubs_name(built_in, hub, config, tuning):
    result = train(config(model=NAME, tuning=tuning, learning_rate=0.1))
    saved = json.loads((result.output_dir / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == HUB_IDS[NAME]
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(result.output_dir)), logits(result.model))
    # What the caller of Python saves is named likewise.
    result.model.save_pretrained(hub / "again")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(hub / "again")), logits(result.model))


def test_zotune_goes_on_with_its_own_weights_of_it(built_in, config, rows_file):
    """No folder of the Hub's name is there, and no network: its own commands find the built-in weights."""
    result = train(config(model=NAME, tuning="lora", learning_rate=0.1))
    folder = result.output_dir
    assert base_of_adapter(folder) == NAME == base_model_of(str(folder))
    assert torch.equal(logits(load_both(folder, device="cpu")[0]), logits(result.model))
    found, _ = evaluate(EvalConfig(model=str(folder), eval_file=rows_file, device="cpu", baselines=True))
    assert found["rows"].base == NAME
    again = train(config(model=NAME, tuning="lora", learning_rate=0.1, max_steps=3, resume=True))
    assert again.num_steps == 3


def test_other_weights_than_those_of_the_training_are_refused(built_in, config, tiny):
    folder = train(config(model=NAME, tuning="lora")).output_dir
    other = tiny("llama").module
    with torch.no_grad():
        other.get_input_embeddings().weight += 1
    other.save_pretrained(built_in)
    with pytest.raises(UsageError, match=f"tuned on another model than {NAME} is now"):
        loading.load(ModelOptions(model=str(folder), device="cpu"))


def test_an_adapter_of_the_hubs_model_stays_on_the_hubs_weights(built_in, hub, config):
    """Only an adapter that zotune tuned on the built-in weights is put on them."""
    folder = train(config(model=HUB_IDS[NAME], tuning="lora")).output_dir
    assert built_in_name(folder, HUB_IDS[NAME]) is None
    assert base_of_adapter(folder) == HUB_IDS[NAME]


@pytest.mark.parametrize(
    "content", ["", "[]", '{"model": 7}', '{"model": "gemma3-270m"}', '{"model": "/etc"}', "[" * 9999]
)
def test_a_damaged_fingerprint_names_no_model(tmp_path, content):
    (tmp_path / "base_model.json").write_text(content)
    assert built_in_name(tmp_path, HUB_IDS[NAME]) is None


def test_folders_and_files_have_no_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a/b").mkdir(parents=True)
    assert [hub_id(name) for name in ("a/b", "./a/b", str(tmp_path), "a/b/c/d", "x.gguf", "~/a", "../a")] == [None] * 7
    assert hub_id("c/d") == "c/d"


def test_a_folder_in_a_snapshot_of_the_cache_is_another_model():
    snapshot = "/home/me/hub/models--facebook--opt-125m/snapshots/27dc"
    assert [hub_id(snapshot), hub_id(f"{snapshot}/")] == ["facebook/opt-125m"] * 2
    assert [hub_id(f"{snapshot}/checkpoint-5"), hub_id(f"{snapshot}-mine")] == [None] * 2


def test_an_adapter_names_a_local_base_by_its_whole_path(tiny, config, tmp_path, monkeypatch):
    """From another folder the relative name of the base would be that of somebody else's model on the Hub."""
    lm = tiny("llama")
    lm.module.save_pretrained(tmp_path / "models/llama")
    lm.tokenizer.save_pretrained(tmp_path / "models/llama")
    monkeypatch.chdir(tmp_path)
    result = train(config(model="models/llama", tuning="lora", learning_rate=0.1))
    folder = result.output_dir.resolve()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert base_of_adapter(folder) == str(tmp_path / "models/llama")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(folder)), logits(result.model))
    with pytest.raises(UsageError, match="which nobody else can load"):
        base_on_hub(folder)
    write_shared(folder, tmp_path / "elsewhere", "org/base")
    for name in ("adapter_config.json", "config.yaml", "README.md"):
        assert "org/base" in (tmp_path / "elsewhere" / name).read_text()
