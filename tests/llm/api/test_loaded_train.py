"""A loaded model and rows in memory give the bits of the command line; nothing is written unless it is asked for."""

import copy
import json
import re
from pathlib import Path

import accelerate
import pytest
import torch
from safetensors.torch import load_file

from zotune.cli.options import parse
from zotune.errors import UsageError
from zotune.llm import TrainConfig, evaluate, generate, load, train
from zotune.llm.training import find_rate

ROWS = [
    {"text": text, "label": "yes" if i % 2 else "no"}
    for i, text in enumerate(("a", "b", "c", "dd", "ee", "ff", "gg", "hhh", "i", "jj", "k"))
]
PAIRS = [{"prompt": f"{i} plus {i} is", "completion": f" {2 * i}"} for i in range(8)]
CHOICES = [{"prompt": f"{i} is", "choices": ["odd", "even"], "label": i % 2} for i in range(8)]
QUICK = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}


@pytest.fixture
def loaded():
    """A function: a family to a tiny model and its tokenizer."""
    return lambda family="llama": load(f"random:{family}-tiny", device="cpu")


def tensors(model):
    """What is saved of a model, by the names in its file."""
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: p for name, p in model.named_parameters()}


def flags(options):
    return [word for k, v in options.items() for word in (f"--{k.replace('_', '-')}", str(v))]


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("rows", "family", "options"),
    [
        (ROWS, "llama", {"tuning": "lora"}),
        (ROWS, "opt", {"tuning": "full", "num_queries": 2, "num_train": 6, "eval_steps": 1}),
        (PAIRS, "qwen3", {"tuning": "prefix", "method": "zo_adam", "sampler": "gaussian"}),
        (CHOICES, "llama", {"tuning": "lora", "method": "fo_adam", "lora_r": 2}),
    ],
    ids=["classification", "sample of rows", "completion", "choice"],
)
def test_the_bits_are_those_of_the_command_line(loaded, zotune, tmp_path, rows, family, options):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {**QUICK, **options, "num_dev": 2}
    out = tmp_path / "out"
    done = zotune(
        *("train", "--model", f"random:{family}-tiny", "--train-file", file, "--output-dir", out, "--device", "cpu"),
        *flags(options),
        "--json",
    )
    assert done.code == 0, done.err
    result = train(*loaded(family), rows, **options)
    written, found = load_file(next(out.glob("*model.safetensors"))), tensors(result.model)
    assert written.keys() <= found.keys()
    assert all(torch.equal(written[name], found[name]) for name in written)
    assert {n for n, p in result.model.named_parameters() if p.requires_grad} != set()
    said = json.loads(done.out)
    for name in ("dev_before", "dev", "test"):
        ours = getattr(result, name).summary()
        assert {k: v for k, v in ours.items() if k != "seconds"} == {
            k: v for k, v in said[name].items() if k != "seconds"
        }
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("loss") for line in lines] == [line.get("loss") for line in result.log_history]
    assert len(lines) == 2 + 2 * ("eval_steps" in options)


def test_evaluation_rows_are_used_during_the_run_and_after_it(loaded):
    model, tokenizer = loaded()
    result = train(
        *(model, tokenizer, ROWS[:6], ROWS[6:]),
        **QUICK,
        tuning="full",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    evaluated = [line["dev"]["loss"] for line in result.log_history if "dev" in line]
    best = min([result.dev_before.loss, *evaluated])
    assert result.best_step == [result.dev_before.loss, *evaluated].index(best)
    assert result.test is result.dev
    assert result.test.loss == best
    again = evaluate(result.model, tokenizer, ROWS[6:])
    assert again.loss == pytest.approx(best, abs=1e-6)
    assert result.metrics["eval_loss"] == best
    assert result.metrics["train_loss"] == result.log_history[-2]["loss"]


def test_all_rows_are_trained_on_if_none_are_held_out(loaded):
    rows = [{"prompt": row["text"]} for row in ROWS]
    result = train(*loaded(), rows, objective=collected, max_steps=1, per_device_train_batch_size=11, max_new_tokens=1)
    # The two probes of the step; no evaluation.
    assert [sorted(batch) for batch in COLLECTED[-2:]] == [sorted(row["text"] for row in ROWS)] * 2
    assert (result.dev_before, result.dev, result.test) == (None, None, None)


COLLECTED = []


def collected(completions):
    """A reward function at the top level of a module: it keeps what it is given."""
    COLLECTED.append([c.prompt for c in completions])
    return [len(c.text) for c in completions]


def test_callbacks_are_called_and_may_end_the_run(loaded):
    from transformers import TrainerCallback

    class Noting(TrainerCallback):
        def __init__(self):
            self.steps, self.metrics = [], []

        def on_step_end(self, args, state, control, model=None, **kwargs):
            assert type(model).__name__ == "PeftModelForCausalLM"
            self.steps.append(state.global_step)
            control.should_training_stop = state.global_step == 2

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            self.metrics.append(metrics["eval_loss"])

    noting = Noting()
    result = train(*loaded(), ROWS, ROWS, **{**QUICK, "max_steps": 9}, eval_steps=1, callbacks=[noting])
    assert noting.steps == [1, 2]
    assert result.num_steps == 2
    assert noting.metrics[-1] == result.test.loss
    with pytest.raises(UsageError, match="which is no callback"):
        train(*loaded(), ROWS, callbacks=[print])


def test_the_learning_rate_is_found_without_a_folder(loaded, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(find_rate, "MIN_STEPS", 1)
    model, tokenizer = loaded()
    options = {"tuning": "full", "max_steps": 60, "per_device_train_batch_size": 1}
    result = train(model, tokenizer, ROWS[:6], learning_rate="auto", **options)
    (rate,) = {line["learning_rate"] for line in result.log_history}
    assert [*tmp_path.iterdir()] == []
    assert "searching the learning rate" in capsys.readouterr().err
    # The search leaves no trace in the weights.
    again = train(*loaded(), ROWS[:6], learning_rate=rate, **options)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.model.parameters(), strict=True))


def test_epochs_end_the_run(loaded):
    assert train(*loaded(), ROWS, num_train_epochs=2, per_device_train_batch_size=4).num_steps == 6


def test_the_defaults_that_differ_from_the_command_line_are_those_that_the_page_names(loaded, monkeypatch):
    found = []
    monkeypatch.setattr("zotune.llm.api.train.schedule_of", lambda config: found.append(config))
    train(*loaded(), ROWS, max_steps=1)
    ours = found[0].model_dump()
    theirs = parse(
        TrainConfig, {"learning_rate": "auto"}, "", ["--train-file", "x", "--max-steps", "1"], ""
    ).model_dump()
    named = {"model", "dtype", "data_source", "train_file"}
    differing = {name for name in ours if ours[name] != theirs[name]} - named
    page = (Path(__file__).parents[3] / "docs/howto/loaded-model.md").read_text(encoding="utf-8")
    table = page[page.index("### Defaults") :].split("\n\n")[2]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", table, re.M))
    # No folder is written, whatever the option's default; μ is that of what is tuned.
    assert rows.keys() - {"output_dir"} == differing - {"mu"}
    assert f"`{ours['tuning']}`" in rows["tuning"] and f"`{ours['num_dev']}`" in rows["num_dev"]
    assert (ours["learning_rate"], theirs["tuning"], theirs["num_dev"]) == (None, "full", None)


def test_a_reward_function_without_a_name_is_refused(loaded):
    with pytest.raises(UsageError, match=r"cannot be found by its name\. Define it with `def` at the top level"):
        train(*loaded(), PAIRS, objective=lambda completions: [0.0] * len(completions))


def test_nothing_is_written(loaded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = train(*loaded(), ROWS, **QUICK, load_best_model_at_end=True, eval_steps=1, num_dev=3)
    assert result.output_dir is None
    assert result.to_json()["output_dir"] is None
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_that_of_the_command_line_and_loads_again(loaded, tmp_path, zotune):
    model, tokenizer = loaded()
    out = tmp_path / "out"
    result = train(model, tokenizer, ROWS, **QUICK, output_dir=out, num_dev=3, template="{text}?")
    assert {p.name for p in out.iterdir()} >= {
        "adapter_model.safetensors",
        "ledger.zol",
        "metrics.jsonl",
        "results.json",
    }
    assert result.output_dir == out
    ids = torch.arange(8)[None]
    again, its_tokenizer = load(out, device="cpu")
    with torch.no_grad():
        assert torch.equal(result.model(ids).logits, again(ids).logits)
    # The adapter goes on: it is tuned, not another one.
    more = train(again, its_tokenizer, ROWS, **QUICK)
    assert more.num_tuned == result.num_tuned
    # The recorded options are inherited, and the run resumes; but its rows are in no file.
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert "accuracy" in zotune("eval", "--model", out, "--eval-file", file, "--device", "cpu").out
    refused = zotune("train", out / "config.yaml", "--overwrite-output-dir")
    assert refused.code == 2
    assert "those of a run from Python" in refused.err
    resumed = train(
        *loaded(), ROWS, **{**QUICK, "max_steps": 3}, output_dir=out, num_dev=3, template="{text}?", resume=True
    )
    whole = train(*loaded(), ROWS, **{**QUICK, "max_steps": 3}, num_dev=3, template="{text}?")
    one, other = tensors(resumed.model), tensors(whole.model)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.sample(2)
@pytest.mark.parametrize("tuning", ["lora", "full", "prefix"])
def test_an_offloaded_model_gives_the_bits_of_one_in_memory(loaded, tuning):
    plain, tokenizer = loaded()
    offloaded = accelerate.cpu_offload(copy.deepcopy(plain), execution_device=torch.device("cpu"))
    options = {**QUICK, "tuning": tuning, "tuned_layers": None if tuning == "prefix" else 1}
    one, other = (train(m, tokenizer, ROWS, ROWS, **options) for m in (plain, offloaded))
    assert [line["loss"] for line in one.log_history] == [line["loss"] for line in other.log_history]
    assert one.test.loss == other.test.loss != one.dev_before.loss
    if tuning == "lora":
        found = tensors(other.model)
        assert all(torch.equal(p, found[name]) for name, p in tensors(one.model).items())


def test_of_a_peft_model_exactly_the_trainable_parameters_are_tuned(loaded):
    from peft import LoraConfig, get_peft_model

    base, tokenizer = loaded()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.5))
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    result = train(model, tokenizer, ROWS, **QUICK)
    assert result.model is model
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == trainable
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable


def test_frozen_parameters_stay_as_they_are(loaded, capsys):
    model, tokenizer = loaded()
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1" in name)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, tokenizer, ROWS, **QUICK, tuning="full")
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == {
        n for n in before if "layers.1" in n
    }
    assert "do not require a gradient and stay as they are" in capsys.readouterr().err


def test_a_quantised_model_is_tuned_as_it_was_loaded(loaded, tmp_path):
    """A base of GGUF blocks, in memory: its packed integers stay, and the adapter is that of the command line's run."""
    folder = tmp_path / "base"
    model, tokenizer = loaded()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    quantised, _ = load(folder, quantization="bnb-int8", device="cpu")
    packed = {n: p.detach().clone() for n, p in quantised.named_parameters() if not p.is_floating_point()}
    assert packed
    result = train(quantised, tokenizer, ROWS, ROWS, **QUICK)
    now = dict(result.model.get_base_model().named_parameters())
    assert all(any(torch.equal(p, q) for q in now.values() if q.shape == p.shape) for p in packed.values())
    assert result.test.loss != result.dev_before.loss


REFUSED = {
    "text": (lambda m, t, p: (("gpt2", t, ROWS), {}), r"pass `model, tokenizer = zotune\.llm\.load\('gpt2'\)`"),
    "swapped": (lambda m, t, p: ((t, m, ROWS), {}), "the model comes first"),
    "module": (lambda m, t, p: ((torch.nn.Linear(2, 2), t, ROWS), {}), r"zotune\.zo_sgd\(model, lr=…\)"),
    "wrapped": (lambda m, t, p: ((torch.nn.DataParallel(m), t, ROWS), {}), r"pass the model itself, model\.module"),
    "no head": (lambda m, t, p: ((m.model, t, ROWS), {}), "no language-modelling head.*AutoModelForCausalLM"),
    "no tokenizer": (lambda m, t, p: ((m, None, ROWS), {}), r"the tokenizer is missing; pass the model's own"),
    "no rows": (lambda m, t, p: ((m, t), {}), "there are no rows"),
    "unknown": (lambda m, t, p: ((m, t, ROWS), {"max_stepz": 1}), r"train\(\): unknown key 'max_stepz'\. Did you mean"),
    "value": (lambda m, t, p: ((m, t, ROWS), {"method": "zo_sdg"}), "Did you mean 'zo_sgd'"),
    "named": (lambda m, t, p: ((m, t, ROWS), {"dtype": "float16"}), r"use train\(TrainConfig\(dtype=…\)\)"),
    "alias": (lambda m, t, p: ((m, t, ROWS), {"bf16": True}), r"no option dtype \(or another tool's name of it\)"),
    "no held-out rows": (lambda m, t, p: ((m, t, ROWS), {"eval_steps": 1}), "pass eval_dataset, or hold rows"),
    "folder": (lambda m, t, p: ((m, t, ROWS), {"save_steps": 1}), "save_steps has no effect here: it needs output_dir"),
    "trackers": (lambda m, t, p: ((m, t, ROWS), {"report_to": "tensorboard"}), "report_to: tensorboard has no effect"),
    "nested": (lambda m, t, p: ((p, t, ROWS), {"tuning": "lora"}), r"an adapter already \(lora\).*leave out tuning"),
    "rank": (lambda m, t, p: ((p, t, ROWS), {"lora_r": 4}), "leave out lora_r"),
    "injected": (lambda m, t, p: ((p.base_model.model, t, ROWS), {}), r"pass its result\.model"),
    "inference": (lambda m, t, p: ((p.requires_grad_(False), t, ROWS), {}), "is_trainable=True"),
    "frozen": (lambda m, t, p: ((m.requires_grad_(False), t, ROWS), {"tuning": "full"}), "its owner froze them"),
    "held out": (lambda m, t, p: ((m, t, ROWS[:3]), {"num_dev": 3}), "Lower num_train or num_dev"),
    "config": (lambda m, t, p: ((TrainConfig(task="sst2"), t), {}), "from the config alone"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_in_words(loaded, name):
    from peft import LoraConfig, get_peft_model

    model, tokenizer = loaded()
    adapted = (
        get_peft_model(loaded()[0], LoraConfig(target_modules=["q_proj"]))
        if name in ("nested", "rank", "injected", "inference")
        else None
    )
    call, words = REFUSED[name]
    arguments, options = call(model, tokenizer, adapted)
    with pytest.raises(UsageError, match=words) as refusal:
        train(*arguments, **options)
    assert "--" not in str(refusal.value)


def test_an_encoder_decoder_is_refused(loaded):
    import transformers

    _, tokenizer = loaded()
    config = transformers.T5Config(vocab_size=300, d_model=16, num_layers=1, num_heads=2, d_ff=16, d_kv=8)
    with pytest.raises(UsageError, match="is an encoder-decoder"):
        train(transformers.T5ForConditionalGeneration(config), tokenizer, ROWS)


def test_evaluation_is_that_of_the_command_line(loaded, zotune, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    done = zotune("eval", "--model", "random:llama-tiny", "--eval-file", file, "--device", "cpu", "--json")
    found = evaluate(*loaded(), ROWS)
    said = json.loads(done.out)
    assert {k: said[k] for k in ("accuracy", "loss", "low", "high")} == {
        "accuracy": found.accuracy,
        "loss": found.loss,
        "low": found.low,
        "high": found.high,
    }
    assert len(repr(found)) < 300  # a notebook shows it


def test_text_is_what_transformers_generates(loaded):
    model, tokenizer = loaded("opt")
    prompts = ["ab", "a longer prompt"]
    found = generate(model, tokenizer, prompts, max_new_tokens=5)
    for prompt, text in zip(prompts, found, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=5, do_sample=False)[0, ids.input_ids.shape[1] :]
        assert tokenizer.decode(out, skip_special_tokens=True).strip() == text
    assert generate(model, tokenizer, prompts[0], max_new_tokens=5) == found[0]
    drawn = [generate(model, tokenizer, "ab", generation="sample", seed=s, max_new_tokens=8) for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    # As on the command line, a temperature alone asks for sampling, and 0 for the most likely text.
    assert generate(model, tokenizer, "ab", temperature=1.0, max_new_tokens=8) == drawn[0]
    assert generate(model, tokenizer, prompts, temperature=0, max_new_tokens=5) == found


def test_a_chat_is_answered(loaded):
    model, tokenizer = loaded()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    chat = [{"role": "user", "content": "hi"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=4, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert generate(model, tokenizer, [chat], max_new_tokens=4) == [
        tokenizer.decode(out, skip_special_tokens=True).strip()
    ]
    with pytest.raises(UsageError, match=r"a list of chats: give \[messages\]"):
        generate(model, tokenizer, chat)
