"""What a run leaves behind loads elsewhere and is what was reported; nothing of the user's is lost on the way.

Predictions are made again by plain transformers and peft, one unpadded sequence at a time.
"""

import errno
import json
import os
import re
import resource
import shutil
import signal
import time
from collections import namedtuple

import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from zotune.llm.config.step import ModelOptions
from zotune.llm.models.load import load
from zotune.llm.output.metrics_log import MetricsLog
from zotune.llm.tasks.user_data import load_user_data
from zotune.llm.training.train import train


def plain_predictions(model, tokenizer, examples):
    """The best candidate of each example, by whole unpadded sequences and full log-softmax."""
    found = []
    for e in examples:
        values = []
        for candidate in e.candidates:
            start, ids = len(tokenizer(e.prompt)["input_ids"]), tokenizer(e.prompt + candidate)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            values.append(sum(float(logits[i - 1, ids[i]]) for i in range(start, len(ids))) / (len(ids) - start))
        found.append(values.index(max(values)))
    return found


@pytest.mark.sample(2)
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_what_is_saved_loads_elsewhere_and_predicts_what_was_reported(config, tiny, causal_family, tuning, tmp_path):
    base = tiny(causal_family)
    base.module.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    made = config(model=str(tmp_path / "base"), tuning=tuning, learning_rate=0.05, max_steps=5)
    result = train(made)
    auto = AutoPeftModelForCausalLM if tuning == "lora" else AutoModelForCausalLM
    model, tokenizer = auto.from_pretrained(tmp_path / "out").eval(), AutoTokenizer.from_pretrained(tmp_path / "out")
    found = plain_predictions(model, tokenizer, load_user_data(made, None).splits.dev)
    assert tuple(found) == result.dev.predictions
    assert result.dev.loss != result.dev_before.loss


def test_a_tuned_masked_model_loads_elsewhere(config, tmp_path):
    made = config(model="random:roberta-tiny", verbalizer={"yes": "Yes", "no": "No"}, learning_rate=0.05, max_steps=5)
    result = train(made)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out").eval()
    tokenizer, found = AutoTokenizer.from_pretrained(tmp_path / "out"), []
    for e in load_user_data(made, None).splits.dev:
        ids = tokenizer(f"{e.prompt}{tokenizer.mask_token}{e.suffix}")["input_ids"]
        with torch.no_grad():
            row = model(torch.tensor([ids])).logits[0, ids.index(tokenizer.mask_token_id)]
        words = [float(row[tokenizer.convert_tokens_to_ids(word)]) for word in e.candidates]
        found.append(words.index(max(words)))
    assert tuple(found) == result.dev.predictions


@pytest.mark.parametrize(
    ("model", "last", "width"),
    [("random:llama-tiny", 1, 32), pytest.param("smollm2-135m", 29, 576, marks=pytest.mark.slow)],
)
def test_a_model_is_tuned_where_asked_and_saved_as_it_was_evaluated(config, tmp_path, model, last, width):
    made = config(
        model=model,
        tuned_parameters=rf"layers\.{last}\..*norm|^model\.norm",
        learning_rate=1e-3,
        num_dev=4,
        num_train=4,
        max_steps=3,
    )
    before = dict(load(ModelOptions(model=model, device="cpu"), seed=made.seed).module.named_parameters())
    result = train(made)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    changed = {name for name, p in saved.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {
        f"model.layers.{last}.input_layernorm.weight",
        f"model.layers.{last}.post_attention_layernorm.weight",
        "model.norm.weight",
    }
    assert result.num_tuned == 3 * width
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tuple(plain_predictions(saved, tokenizer, load_user_data(made, None).splits.dev)) == result.dev.predictions


# Output folder ---------------------------------------------------------------------------------------------


def test_an_earlier_run_is_kept_unless_told_otherwise(zotune, short, tmp_path):
    assert zotune(*short("--tuning", "lora")).code == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    said = zotune(*short())
    assert said.code == 2
    assert re.search("holds an earlier run.*--overwrite-output-dir", said.err)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert zotune(*short("--overwrite-output-dir")).code == 0
    # An adapter left behind would be loaded in place of the new weights.
    assert not list((tmp_path / "out").glob("adapter*"))


def test_a_readme_or_model_of_the_users_is_not_replaced(zotune, short, tmp_path):
    for name in ("README.md", "model.safetensors"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("mine", encoding="utf-8")
        assert zotune(*short(out=folder.name)).code == 2
        assert (folder / name).read_text(encoding="utf-8") == "mine"


def test_an_output_folder_that_cannot_be_made_is_named(zotune, short, tmp_path):
    (tmp_path / "out").write_text("a file", encoding="utf-8")
    said = zotune(*short())
    assert said.code == 2
    assert re.search("the output folder '.*out' cannot be written", said.err)


def test_too_little_room_for_the_model_is_found_before_the_run(zotune, short, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6, 1000))
    said = zotune(*short())
    assert said.code == 2
    assert re.search(r"has 0 MB free, but the tuned model takes \d+ MB.*--tuning lora", said.err, re.DOTALL)


@pytest.mark.parametrize("saved_by", ["transformers", "tokenizer", "results"])
def test_a_disk_that_fills_up_is_reported_as_such(zotune, short, monkeypatch, saved_by):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    if saved_by == "transformers":
        monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
    elif saved_by == "tokenizer":
        monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", full)
    else:
        monkeypatch.setattr("zotune.llm.output.output_folder.write_json", full)
    said = zotune(*short("--learning-rate", "1e-3"))
    assert (said.code, said.out) == (1, "")
    assert "No space left on device" in said.err


def test_weights_that_cannot_be_written_whole_are_reported_as_such(zotune, short):
    """The operating system refuses, not a stand-in: files of this process may hold at most 60 kB meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        said = zotune(*short())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (said.code, said.out) == (1, "")
    assert re.search("the tuned model could not be saved to .*File too large", said.err)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_a_step_ends_the_run_with_a_saved_model(zotune, short, tmp_path, monkeypatch, number, code):
    append, before = MetricsLog.append, signal.getsignal(number)

    def append_and_interrupt(log, record):
        append(log, record)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(MetricsLog, "append", append_and_interrupt)
    said = zotune(*short("--max-steps", 10**6, "--learning-rate", "1e-3", "--logging-steps", 1, "--json"))
    assert said.code == code, said.err
    result = json.loads(said.out)
    assert result["stopped_by"] == number
    assert result["num_steps"] == 1
    assert json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))["num_steps"] == 1
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert "stopped at step 1" in said.err
    assert signal.getsignal(number) == before


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_saves_and_says_so(start, short, tmp_path, number, code):
    process = start(
        "-m", "zotune", *short("--max-steps", 10**6, "--learning-rate", "1e-3", "--logging-steps", 1, "--json")
    )
    metrics = tmp_path / "out/metrics.jsonl"
    until = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    result = json.loads(out)
    assert result["stopped_by"] == number
    assert 0 < result["num_steps"] < 10**6
    assert json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))["num_steps"] == result["num_steps"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert "stopped at step" in err
    assert "Traceback" not in err
