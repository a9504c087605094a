"""An adapter brings its tokenizer and embedding, fits its base or is refused; merged it computes the same."""

import json
import re
import shutil
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from zotune.errors import UsageError
from zotune.ledger import LedgerError
from zotune.llm.checkpoints.adapter_merge import merged_model
from zotune.llm.checkpoints.tuned_tensors import check_saved
from zotune.llm.config.run import EvalConfig
from zotune.llm.config.step import ModelOptions
from zotune.llm.ledger.merge import Merge
from zotune.llm.ledger.rebuild import export, find_ledger, rebuild
from zotune.llm.ledger.verify import verify
from zotune.llm.models.load import load
from zotune.llm.models.meta_model import load_meta_model
from zotune.llm.training.evaluation import evaluate
from zotune.llm.training.train import train

IDS = torch.arange(24).view(2, 12) + 20


@pytest.fixture
def base(tmp_path, tiny):
    lm = tiny("qwen3")  # its output layer is tied to its embedding
    lm.module.save_pretrained(tmp_path / "base")
    lm.tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapter(base, path, *, tokens=(), template=None, **options):
    """An adapter made by peft alone, with its own tokenizer."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template
    if tokens:
        tokenizer.add_tokens(list(tokens))
        model.resize_token_embeddings(340, mean_resizing=False)
    module = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{"target_modules": ["k_proj"], **options}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in (p for p in module.parameters() if p.requires_grad):
            p += 0.1 * torch.randn(p.shape, generator=generator)
    with warnings.catch_warnings(action="ignore"):  # peft says that it saves a resized embedding
        module.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return module.eval()


def cpu(path):
    return ModelOptions(model=str(path), device="cpu")


def logits(module):
    with torch.no_grad():
        return module(input_ids=IDS, use_cache=False).logits


def refused(path, match):
    for read in (load, load_meta_model):
        with pytest.raises(UsageError, match=match):
            read(cpu(path))


def test_an_adapters_own_tokenizer_and_resized_embedding_are_used(base, tmp_path):
    made = adapter(base, tmp_path / "a", tokens=(" splendid", " dire"), template="{{ messages[0].content }}")
    lm = load(cpu(tmp_path / "a"))
    assert torch.equal(logits(lm.module), logits(made))
    assert len(lm.tokenizer(" splendid", add_special_tokens=False)["input_ids"]) == 1
    assert lm.tokenizer.chat_template == "{{ messages[0].content }}"
    dry, _ = load_meta_model(cpu(tmp_path / "a"))
    assert dry.vocabulary == lm.vocabulary == 340


def test_a_chat_template_and_the_ends_of_a_text_are_those_of_adapter_and_base(base, tmp_path):
    """The template is the adapter's, also without a tokenizer beside it; the ends are those of the base."""
    from transformers import GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "of the base"
    tokenizer.save_pretrained(base)
    GenerationConfig(eos_token_id=[2, 77]).save_pretrained(base)
    adapter(base, tmp_path / "a", template="of the adapter")
    for names in (("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"), ()):
        for read in (load, lambda options: load_meta_model(options)[0]):
            assert read(cpu(tmp_path / "a")).tokenizer.chat_template == "of the adapter"
        for name in names:
            (tmp_path / "a" / name).unlink(missing_ok=True)
    lm = load(cpu(tmp_path / "a"))
    assert (lm.tokenizer.chat_template, lm.end_tokens) == ("of the adapter", {2, 77})
    (tmp_path / "a" / "chat_template.jinja").unlink()
    assert load(cpu(tmp_path / "a")).tokenizer.chat_template == "of the base"


def test_tokens_without_an_embedding_are_refused(base, tmp_path):
    adapter(base, tmp_path / "a")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<{i}>" for i in range(60)])
    tokenizer.save_pretrained(tmp_path / "a")
    refused(tmp_path / "a", r"has 335 tokens, but the embedding of .* has 320 rows")


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("options", "drop"),
    [
        ({"rank_pattern": {"layers.1.self_attn.k_proj": 2}}, "layers.1.self_attn.k_proj.lora_B"),
        ({"modules_to_save": ["norm"]}, "model.norm"),
        ({"trainable_token_indices": [70, 71]}, "trainable_tokens"),
    ],
)
def test_a_missing_tensor_of_an_adapter_is_named(options, drop, base, tmp_path):
    made = adapter(base, tmp_path / "a", **options)
    assert torch.equal(logits(load(cpu(tmp_path / "a")).module), logits(made))
    file = tmp_path / "a" / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({k: v for k, v in weights.items() if drop not in k}, file, metadata={"format": "pt"})
    refused(tmp_path / "a", f"does not hold .*{re.escape(drop)}")
    save_file({**weights, "base_model.model.model.layers.7.x.lora_A.weight": torch.ones(1)}, file)
    refused(tmp_path / "a", r"holds base_model\.model\.model\.layers\.7\.\S+, which has no place")


def test_an_adapter_of_another_base_is_refused(base, tmp_path, tiny, config):
    adapter(base, tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    settings = json.loads(file.read_text())
    tiny("mistral").module.save_pretrained(tmp_path / "other")
    tiny("mistral").tokenizer.save_pretrained(tmp_path / "other")
    file.write_text(json.dumps({**settings, "base_model_name_or_path": str(tmp_path / "other")}))
    refused(tmp_path / "a", r"does not fit its base model .*size mismatch")
    file.write_text(json.dumps({**settings, "base_model_name_or_path": "../base"}))
    load(cpu(tmp_path / "a"))
    file.write_text(json.dumps({**settings, "base_model_name_or_path": "../nowhere"}))
    refused(tmp_path / "a", r"names the base model '\.\./nowhere', and there is no such folder")
    file.write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    refused(tmp_path / "a", "names no base model")


@pytest.mark.parametrize("tuning", ["lora", "prompt"])
def test_a_base_of_other_weights_is_told_from_that_of_the_run(tuning, base, config):
    out = train(config(model=str(base), tuning=tuning)).output_dir
    load(cpu(out))
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] *= 1.01
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"was tuned on another model than .*/base is now"):
        load(cpu(out))


def test_runs_beside_other_frozen_weights_are_not_merged(base, tmp_path, config):
    one = train(config(model=str(base), tuning="lora", output_dir=tmp_path / "1")).output_dir
    weights = load_file(base / "model.safetensors")
    shutil.copytree(base, tmp_path / "other")
    weights["model.norm.weight"] += 0.5
    save_file(weights, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    two = train(config(model=str(tmp_path / "other"), tuning="lora", output_dir=tmp_path / "2")).output_dir
    with pytest.raises(LedgerError, match="beside other frozen weights"):
        Merge("average", (find_ledger(one), find_ledger(two)))


@pytest.mark.sample(1)
@pytest.mark.parametrize("tuning", ["full", "head"])
def test_whole_tuning_of_an_adapters_folder_saves_what_it_tuned(tuning, base, tmp_path, config):
    made = adapter(base, tmp_path / "a", target_modules=["k_proj", "down_proj"])
    result = train(config(model=str(tmp_path / "a"), tuning=tuning, learning_rate=1e-2, num_train=8))
    found = AutoModelForCausalLM.from_pretrained(result.output_dir)
    change = (logits(found) - logits(made)).abs().max()
    assert change > 1e-6
    run, _ = evaluate(EvalConfig(model=str(result.output_dir), device="cpu", task="sst2", num_eval=4))
    assert run["sst2"].evaluation.value >= 0
    proof = verify(result.output_dir)
    assert proof.is_right and proof.num_tensors == len(load_file(result.output_dir / "model.safetensors"))


@pytest.mark.parametrize("tuning", ["prompt", "peft"])
def test_an_adapter_beside_an_adapter_is_refused(tuning, base, tmp_path, config):
    adapter(base, tmp_path / "a")
    with pytest.raises(UsageError, match=r"is an adapter \(lora\), and what --tuning .* could not be saved beside it"):
        train(config(model=str(tmp_path / "a"), tuning=tuning, peft_type="ia3" if tuning == "peft" else None))


def test_verify_compares_the_sets_of_tensors(config):
    out = train(config(tuning="lora", learning_rate=1e-2)).output_dir
    assert verify(out).is_right
    file = out / "adapter_model.safetensors"
    weights = load_file(file)
    gone = sorted(weights)[0]
    save_file({k: v for k, v in weights.items() if k != gone}, file, metadata={"format": "pt"})
    assert verify(out).missing == (gone,)
    save_file({**weights, "another": torch.ones(1)}, file, metadata={"format": "pt"})
    assert (verify(out).missing, verify(out).unexpected) == ((), ("another",))


def test_verify_misses_a_tuned_tensor_of_the_whole_model(config):
    out = train(config(model="random:opt-tiny", tuned_parameters="fc1")).output_dir
    file = out / "model.safetensors"
    weights = load_file(file)
    gone = "model.decoder.layers.1.fc1.bias"
    save_file({k: v for k, v in weights.items() if k != gone}, file, metadata={"format": "pt"})
    proof = verify(out)
    assert (proof.missing, proof.different, proof.is_right) == ((gone,), (), False)


def test_a_tuned_tensor_that_peft_does_not_save_is_refused(tiny):
    module = get_peft_model(tiny("llama").module, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    check_saved(module, "llama")
    module.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(UsageError, match=r"model\.norm\.weight of llama would be tuned but not saved"):
        check_saved(module, "llama")


TIED = {
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "head": {"target_modules": ["lm_head"]},
    "tokens": {"target_modules": ["o_proj"], "trainable_token_indices": [21, 30]},
    "saved head": {"target_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", TIED)
def test_a_merged_model_computes_what_the_adapted_one_does(name, base, tmp_path, config):
    options = {"tuning": "peft", "peft_type": "lora", "peft_config": json.dumps({"r": 4, **TIED[name]})}
    out = train(config(model=str(base), **options, learning_rate=3e-2, mu=1e-2, max_steps=4)).output_dir
    assert verify(out).is_right
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out).eval()
    export(rebuild(find_ledger(out)), tmp_path / "merged", merged=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), logits(adapted), atol=1e-5)
    assert not torch.allclose(logits(merged), logits(AutoModelForCausalLM.from_pretrained(base)), atol=1e-3)


def test_a_merge_that_would_compute_something_else_is_refused(base, tmp_path, monkeypatch):
    module = adapter(base, tmp_path / "a", target_modules=["k_proj", "up_proj"])
    read = lambda model, ids: model(input_ids=ids).logits  # noqa: E731
    plain = type(module.base_model).merge_and_unload
    monkeypatch.setattr(type(module.base_model), "merge_and_unload", lambda self: self.unload())
    with pytest.raises(UsageError, match="cannot be merged into the weights"):
        merged_model(module, read, "a")
    assert plain


@pytest.mark.filterwarnings("ignore:.*corda_config", "ignore:.*loftq_config", "ignore:.*lora_ga")
@pytest.mark.parametrize("init", ["pissa_niter_2", "corda", "loftq", "lora_ga"])
def test_an_initialisation_that_loading_cannot_repeat_is_refused(init, base, tmp_path, config):
    options = {"tuning": "peft", "peft_type": "lora"}
    settings = {"init_lora_weights": init, "target_modules": ["q_proj"]}
    with pytest.raises(UsageError, match=init):
        train(config(model=str(base), **options, peft_config=json.dumps(settings)))
    adapter(base, tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": init}))
    refused(tmp_path / "a", "onto another base than it was tuned on|no configuration of an adapter")


@pytest.mark.sample(2)
@pytest.mark.parametrize("init", ["pissa", "olora", "gaussian", "orthogonal"])
def test_other_initialisations_are_saved_as_they_were_evaluated(init, base, config, rows_file):
    settings = {"init_lora_weights": init, "target_modules": ["q_proj", "v_proj"], "r": 2}
    result = train(
        config(model=str(base), tuning="peft", peft_type="lora", peft_config=json.dumps(settings), learning_rate=1e-2)
    )
    found, _ = evaluate(EvalConfig(model=str(result.output_dir), device="cpu", train_file=rows_file, num_dev=3))
    assert found["rows"].evaluation.loss == pytest.approx(result.test.loss, rel=1e-5)


@pytest.mark.parametrize("names", [["a"], ["a", "b"], ["a", "b", "c"]], ids=len)
def test_adapters_that_name_each_other_as_their_base_are_refused(base, tmp_path, names):
    for name, other in zip(names, [*names[1:], names[0]], strict=True):
        shutil.copytree(base, tmp_path / name)
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(tmp_path / other)}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    for read in (load, load_meta_model):
        with pytest.raises(UsageError, match="names itself as its base model"):
            read(cpu(tmp_path / names[0]))


@pytest.mark.parametrize("value", [3, ["x"], {"a": 1}, True, ""], ids=str)
def test_a_base_that_is_no_name_is_refused(base, tmp_path, value):
    (base / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": value}))
    with pytest.raises(UsageError, match=r"names no base model|no configuration of an adapter"):
        load(cpu(base))
