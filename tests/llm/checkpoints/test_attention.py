"""The attention is the one asked for, on every way to load a model, or is refused in words; none is fetched."""

import pytest
import torch

from model_families import tiny_model
from zotune.errors import UsageError
from zotune.llm.checkpoints.attention import attention_arguments
from zotune.llm.config.run import TrainConfig
from zotune.llm.config.schema import validate
from zotune.llm.config.step import ModelOptions
from zotune.llm.models.load import load
from zotune.llm.models.meta_model import load_meta_model
from zotune.llm.models.random_models import byte_tokenizer

IDS = torch.arange(24).view(2, 12) + 20


@torch.no_grad()
def test_the_attention_asked_for_computes_the_same(tiny, tmp_path):
    lm = tiny("llama")
    lm.module.save_pretrained(tmp_path / "m")
    lm.tokenizer.save_pretrained(tmp_path / "m")
    for name in (str(tmp_path / "m"), "random:llama-tiny"):
        for attention in ("eager", "sdpa"):
            options = ModelOptions(model=name, device="cpu", attn_implementation=attention)
            found = load(options)
            assert found.config._attn_implementation == attention
            assert load_meta_model(options)[0].config._attn_implementation == attention
            expected = lm.module(input_ids=IDS, use_cache=False).logits
            torch.testing.assert_close(found.module(input_ids=IDS, use_cache=False).logits, expected)


@pytest.mark.parametrize("name", ["flash", "kernels-community/flash-attn2", "paged|eager", "SDPA"])
def test_an_unknown_attention_is_refused(name):
    with pytest.raises(UsageError, match="attn_implementation is"):
        validate(ModelOptions, {"attn_implementation": name}, "options")


def test_flash_attention_is_not_fetched(monkeypatch):
    with pytest.raises(UsageError, match="runs on a GPU"):
        load(ModelOptions(model="random:llama-tiny", device="cpu", attn_implementation="flash_attention_2"))
    for has in (False, True):
        monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda has=has: has)
        if has:
            found = attention_arguments("flash_attention_2", torch.device("cuda"))
            assert found == {"attn_implementation": "flash_attention_2"}
        else:
            with pytest.raises(UsageError, match="no kernel is fetched from the Hub"):
                attention_arguments("flash_attention_2", torch.device("cuda"))
    with pytest.raises(UsageError, match="flash_attention_9 needs its package"):
        attention_arguments("flash_attention_9", torch.device("cuda"))


def test_an_attention_that_the_model_does_not_have_is_refused_in_words(tmp_path):
    model = tiny_model("deberta_v2")
    model.save_pretrained(tmp_path / "m")
    byte_tokenizer(model.config).save_pretrained(tmp_path / "m")
    for read in (load, load_meta_model):
        with pytest.raises(UsageError, match="does not run with the attention that was asked for"):
            read(ModelOptions(model=str(tmp_path / "m"), device="cpu", attn_implementation="flex_attention"))


def test_forward_mode_needs_an_attention_with_a_derivative():
    with pytest.raises(UsageError, match="has no derivative in forward mode"):
        values = {"task": "sst2", "method": "forward_grad", "attn_implementation": "flex_attention"}
        validate(TrainConfig, values, "options")
