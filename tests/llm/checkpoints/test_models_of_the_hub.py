"""Models and adapters by their name on the Hub, in their revisions: a stand-in for its cache, without a network."""

import hashlib
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from zotune.cli import main as command_line
from zotune.errors import UsageError
from zotune.llm.checkpoints.adapter_folder import base_of_adapter
from zotune.llm.checkpoints.adapter_source import find_adapter
from zotune.llm.config.generate import ChatConfig
from zotune.llm.config.run import EvalConfig
from zotune.llm.config.step import ModelOptions
from zotune.llm.inference.prompts import style_of
from zotune.llm.ledger.verify import verify
from zotune.llm.models.load import load
from zotune.llm.models.meta_model import load_meta_model
from zotune.llm.sharing.whole_model import whole_model
from zotune.llm.training.evaluation import evaluate, revised_base_model_of
from zotune.llm.training.train import train

IDS = torch.arange(24).view(2, 12) + 20


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function that puts a folder into the Hub's cache as a revision of a repository; nothing is looked up."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def publish(name, folder, revision="main"):
        place = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        commit = hashlib.sha1(f"{name} {revision}".encode()).hexdigest()
        (place / "refs").mkdir(parents=True, exist_ok=True)
        (place / "refs" / revision).write_text(commit)
        shutil.copytree(folder, place / "snapshots" / commit)
        return name

    return publish


def saved(lm, folder, factor=1.0):
    with torch.no_grad():
        lm.module.model.norm.weight *= factor
    lm.module.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


def cpu(name, **options):
    return ModelOptions(model=str(name), device="cpu", **options)


def logits(module):
    with torch.no_grad():
        return module(input_ids=IDS, use_cache=False).logits


def an_adapter(base, folder, **config):
    """An adapter made by peft alone on the model in a folder."""
    module = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", target_modules=["k_proj"], r=4)
    )
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p += 0.1
    module.save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return module.eval()


@pytest.fixture
def base(hub, tiny, tmp_path):
    """A model with two revisions that compute different things."""
    hub("org/base", saved(tiny("llama"), tmp_path / "main"))
    return hub("org/base", saved(tiny("llama"), tmp_path / "v2", factor=3.0), "v2")


def test_the_revision_asked_for_is_loaded(base, tmp_path):
    for revision, folder in ((None, "main"), ("main", "main"), ("v2", "v2")):
        lm = load(cpu(base, model_revision=revision))
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert torch.equal(logits(lm.module), logits(plain))
        load_meta_model(cpu(base, model_revision=revision))
    with pytest.raises(UsageError, match="org/base"):
        load(cpu(base, model_revision="v3"))


@pytest.mark.parametrize("model", ["random:llama-tiny", "smollm2-135m", "."])
def test_a_revision_of_what_has_none_is_refused(model):
    for read in (load, load_meta_model):
        with pytest.raises(UsageError, match="model_revision names a revision of a repository on the Hub"):
            read(cpu(model, model_revision="v2"))


def test_a_run_on_a_revision_is_verified_and_found_again(base, config, tmp_path):
    run = config(model=base, model_revision="v2", tuning="lora", learning_rate=1e-2)
    out = train(run).output_dir
    assert json.loads((out / "adapter_config.json").read_text())["revision"] == "v2"
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "v2"), str(out)).eval()
    assert torch.equal(logits(load(cpu(out)).module), logits(plain))
    assert verify(out).is_right
    assert revised_base_model_of(str(out)) == (base, "v2")
    whole = train(config(model=base, model_revision="v2", output_dir=tmp_path / "whole")).output_dir
    assert verify(whole).is_right
    assert revised_base_model_of(str(whole)) == (base, "v2")
    train(run.model_copy(update={"resume": True}))


def test_an_adapter_of_the_hub_brings_its_base_in_the_revision_that_it_names(base, hub, tmp_path, config):
    made = an_adapter(tmp_path / "v2", tmp_path / "a", base_model_name_or_path=base, revision="v2")
    name = hub("org/adapter", tmp_path / "a")
    lm = load(cpu(name))
    assert torch.equal(logits(lm.module), logits(made))
    assert lm.name == name
    load_meta_model(cpu(name))
    assert revised_base_model_of(name) == (base, "v2")
    rows = config().train_file
    found, _ = evaluate(EvalConfig(model=name, device="cpu", train_file=rows, num_dev=3, baselines=True))
    assert found["rows"].base == base
    out = train(config(model=name, tuning="lora")).output_dir
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    assert verify(out).is_right


@pytest.mark.parametrize("kind", ["adapter", "whole"])
def test_a_run_on_the_hub_is_asked_and_evaluated_as_its_folder_is(kind, base, hub, tmp_path, capsys):
    run = tmp_path / "run"
    if kind == "adapter":
        an_adapter(tmp_path / "main", run, base_model_name_or_path=base)
    else:
        shutil.copytree(tmp_path / "main", run)
        (run / "results.json").write_text("{}")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "Q", "completion": " A"}\n')
    recipe = f"train_file: {rows}\nnum_dev: 0\ndata_format: completion\ntemplate: 'Question: {{question}}'\n"
    (run / "config.yaml").write_text(recipe)
    name = hub("me/run", run)
    (run / "config.yaml").write_text(recipe.replace("Question", "Another"))
    hub("me/run", run, "v2")
    for revision, prompt in ((None, "Question"), ("v2", "Another")):
        options = {"model": name, "model_revision": revision, "device": "cpu"}
        style = style_of(ChatConfig(**options), None)
        assert (style.form, style.config.template) == ("prompt", f"{prompt}: {{question}}")
    assert style_of(ChatConfig(model=base), None).config.template == "{prompt}"
    (run / "results.json").unlink(missing_ok=True)
    (run / "config.yaml").write_text("trust_remote_code: true\n")
    if kind == "whole":  # of another tool
        assert style_of(ChatConfig(model=hub("me/other", run)), None).config.template == "{prompt}"
    assert style_of(ChatConfig(model="nobody/nothing"), None).config.template == "{prompt}"
    assert command_line.run(["eval", "--model", name, "--eval-file", str(rows), "--device", "cpu"]) == 0
    said = capsys.readouterr().err
    assert "the model was tuned on rows of" in said
    if kind == "adapter":
        whole_model(cpu(name)).write(tmp_path / "merged")
        assert (tmp_path / "merged" / "config.yaml").read_text() == recipe


def test_only_the_files_of_an_adapter_are_fetched(base, hub, monkeypatch, tmp_path):
    an_adapter(tmp_path / "main", tmp_path / "a", base_model_name_or_path=base)
    name, asked = hub("org/adapter", tmp_path / "a"), []
    from huggingface_hub import snapshot_download

    def note(*args, allow_patterns, **kwargs):
        asked.extend(allow_patterns)
        return snapshot_download(*args, **kwargs)

    monkeypatch.setattr("huggingface_hub.snapshot_download", note)
    assert find_adapter(name).name == hashlib.sha1(b"org/adapter main").hexdigest()
    assert asked and not any("*" in pattern or pattern.endswith(".py") for pattern in asked)
    assert find_adapter(base) is None
    assert find_adapter("nobody/nothing") is None


def test_adapters_of_the_hub_that_name_each_other_are_refused(base, hub, tmp_path):
    for one, other in (("x", "y"), ("y", "x")):
        an_adapter(tmp_path / "main", tmp_path / one, base_model_name_or_path=f"org/{other}")
        hub(f"org/{one}", tmp_path / one)
    for read in (load, load_meta_model):
        with pytest.raises(UsageError, match="names itself as its base model"):
            read(cpu("org/x"))


def test_a_revision_that_is_no_text_is_refused(base, tmp_path):
    an_adapter(tmp_path / "main", tmp_path / "a", base_model_name_or_path=base, revision=3)
    with pytest.raises(UsageError, match="names the revision 3"):
        base_of_adapter(tmp_path / "a")
