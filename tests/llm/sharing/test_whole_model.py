"""A merged folder is a whole model: plain transformers computes from it what the adapted model computed."""

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from zotune.errors import UsageError
from zotune.llm.config.step import ModelOptions
from zotune.llm.models.load import load
from zotune.llm.sharing.whole_model import whole_model
from zotune.llm.training.train import train

IDS = torch.tensor([[0, 70, 80, 90]])


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def merged(folder, target):
    target.mkdir()
    whole_model(ModelOptions(model=str(folder), device="cpu")).write(target)
    return target


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("options", "auto"),
    [
        ({"model": "random:llama-tiny", "tuning": "lora"}, AutoModelForCausalLM),
        ({"model": "random:llama-tiny", "tuning": "lora", "method": "fo_adam"}, AutoModelForCausalLM),
        # The embedding is tied to the output layer.
        ({"model": "random:opt-tiny", "tuning": "peft", "peft_type": "lora"}, AutoModelForCausalLM),
        ({"model": "random:roberta-tiny", "tuning": "lora"}, AutoModelForMaskedLM),
    ],
    ids=["zeroth order", "first order", "tied", "masked"],
)
def test_a_merged_folder_loads_with_plain_transformers(config, tmp_path, options, auto):
    if options.get("peft_type"):
        options = {**options, "peft_config": {"target_modules": ["embed_tokens", "q_proj"]}}
    result = train(config(**options, learning_rate=0.1, verbalizer={"yes": "Yes", "no": "No"}))
    folder = merged(result.output_dir, tmp_path / "merged")
    found = auto.from_pretrained(folder)
    assert torch.allclose(logits(found), logits(result.model), atol=1e-4)
    assert not any("lora" in name for name in found.state_dict())
    assert len(AutoTokenizer.from_pretrained(folder)) == len(result.tokenizer)
    assert (folder / "config.yaml").read_text() == (result.output_dir / "config.yaml").read_text()
    card = huggingface_hub.ModelCard((folder / "README.md").read_text())
    assert (card.data.library_name, str(tmp_path) in card.content) == ("transformers", False)


def test_the_head_of_a_classifier_is_merged_with_its_adapter(config, tmp_path):
    options = {"model": "random:roberta-tiny", "task": "sst2", "prompt": "none", "train_file": None}
    result = train(config(**options, tuning="lora", learning_rate=0.1, num_train=8, num_dev=4, num_eval=4))
    found = AutoModelForSequenceClassification.from_pretrained(merged(result.output_dir, tmp_path / "merged"))
    assert torch.allclose(logits(found), logits(result.model), atol=1e-4)


@pytest.mark.parametrize(
    ("tuning", "message"),
    [("full", r"whole weights, so there is nothing to merge"), ("prompt", "virtual tokens .* cannot be merged")],
)
def test_what_cannot_be_merged_says_why(config, tmp_path, tuning, message):
    folder = train(config(model="random:llama-tiny", tuning=tuning)).output_dir
    with pytest.raises(UsageError, match=message):
        merged(folder, tmp_path / "merged")


@pytest.mark.slow
def test_a_quantised_base_is_dequantised(config, tmp_path, tiny, capsys):
    pytest.importorskip("torchao")
    lm = tiny("llama")
    lm.module.save_pretrained(tmp_path / "base")
    lm.tokenizer.save_pretrained(tmp_path / "base")
    options = {"model": str(tmp_path / "base"), "quantization": "torchao-int8", "tuning": "lora"}
    folder = train(config(**options, learning_rate=0.1)).output_dir
    capsys.readouterr()
    found = AutoModelForCausalLM.from_pretrained(merged(folder, tmp_path / "merged"))
    assert "are quantised: the merged model has them dequantised, in float32" in capsys.readouterr().err
    adapted = load(ModelOptions(model=str(folder), device="cpu")).module
    assert torch.allclose(logits(found), logits(adapted), atol=0.05)
    assert {p.dtype for p in found.parameters()} == {torch.float32}
