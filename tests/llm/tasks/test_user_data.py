"""Own rows from file to result: what is learnt and reported equals plain computations.

An evaluation of what was tuned need not be told again how rows are read.
"""

import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from zotune.llm.config.data import DataOptions
from zotune.llm.scoring.accuracy import evaluate_accuracy
from zotune.llm.scoring.generation import generate
from zotune.llm.scoring.intervals import ratio_interval
from zotune.llm.scoring.perplexity import evaluate_log_loss
from zotune.llm.tasks.load_data import load_rows

ROOT = Path(__file__).parents[3]
DATA = ROOT / "examples" / "data"

COMPLETIONS = [("Say so:", " a"), ("👋 and", " longer than the first"), ("The third:", "é x")]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def completions(tmp_path):
    return write(tmp_path / "rows.jsonl", [{"prompt": p, "completion": c} for p, c in COMPLETIONS])


@torch.no_grad()
def plain_log_losses(lm, prompt, completion):
    """-ln p of each token behind the prompt, the end of text among them, one by one."""
    ids = lm.tokenizer(prompt + completion)["input_ids"] + [lm.tokenizer.eos_token_id]
    begin = len(lm.tokenizer(prompt)["input_ids"])
    logits = lm.module(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(1)
    return [-float(logits[i - 1, ids[i]]) for i in range(begin, len(ids))]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_log_loss_is_the_mean_over_all_tokens_of_the_completions(tiny, causal_family, completions, batch_size):
    lm = tiny(causal_family)
    rows = load_rows(lm, DataOptions(eval_file=completions))
    found = rows.measure(lm, rows.test, batch_size, objective=rows.objective)
    plain = [plain_log_losses(lm, *both) for both in COMPLETIONS]
    every = [loss for losses in plain for loss in losses]
    assert found.log_loss == found.value == found.loss == pytest.approx(sum(every) / len(every), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(sum(every) / len(every)), rel=1e-4)
    assert found.predictions == pytest.approx([sum(losses) / len(losses) for losses in plain], rel=1e-5)
    assert found.low < found.log_loss < found.high
    assert next(iter(found.summary())) == "log_loss"


def test_the_interval_of_a_ratio_covers_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(1000):
        counts = torch.randint(1, 20, (200,), generator=generator)
        # Exponential losses of mean 1, and longer rows are harder: a ratio of sums, not a mean of ratios.
        per_token = -torch.rand(200, generator=generator).log() * counts / 10
        low, high = ratio_interval((per_token * counts).tolist(), counts.tolist())
        truth = float(torch.arange(1.0, 20.0).square().mean() / torch.arange(1.0, 20.0).mean()) / 10
        covered += low <= truth <= high
    assert abs(covered / 1000 - 0.95) < 0.03
    assert ratio_interval([3.0], [2]) == (0.0, math.inf)


def test_exact_match_compares_generated_answers(tiny, completions):
    lm = tiny("llama")
    rows = load_rows(lm, DataOptions(eval_file=completions, exact_match=True))
    found = rows.measure(lm, rows.test, 2, objective=rows.objective)
    assert found.predictions == tuple(generate(lm, [tuple(lm.tokenizer(p)["input_ids"])])[0] for p, _ in COMPLETIONS)
    assert "exact match" in str(found)


def test_choices_are_scored_as_candidates_are(tiny, plain_score, tmp_path):
    lm = tiny("llama")
    choices = ["good", "good enough", "👋", "bad"]
    path = write(tmp_path / "rows.jsonl", [{"prompt": "It is", "choices": choices, "label": 1}])
    rows = load_rows(lm, DataOptions(eval_file=path))
    scores = [plain_score(lm, "It is", f" {c}") for c in choices]
    found = evaluate_accuracy(lm, rows.test, 1, objective=rows.objective)
    assert found.predictions == (scores.index(max(scores)),)
    assert found.loss == pytest.approx(-scores[1], rel=1e-5)


def test_a_token_across_the_border_is_scored_whole(tmp_path, smollm2):
    """`wal` + `king` is one token of this vocabulary, ` walking`: it is what the model must say behind `I was`."""
    lm = smollm2
    path = write(tmp_path / "rows.jsonl", [{"prompt": "I was wal", "completion": "king"}])
    rows = load_rows(lm, DataOptions(eval_file=path))
    (candidate,) = rows.test[0].candidates
    whole = lm.tokenizer("I was walking")["input_ids"]
    assert list(candidate.tokens) == [whole[-1], lm.tokenizer.eos_token_id]
    assert list(rows.test[0].sequences[0]) == whole
    assert candidate.positions == (len(whole) - 2, len(whole) - 1)


TURNS = """{% for m in messages %}<{{ m.role }}> {{ m.content }}
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


@pytest.fixture(params=["tiny", pytest.param("smollm2-135m", marks=pytest.mark.slow)])
def model(request, tiny, tmp_path):
    """A model for chats."""
    if request.param != "tiny":
        return request.param
    lm, folder = tiny("llama"), tmp_path / "model"
    lm.tokenizer.chat_template = TURNS
    lm.module.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ["capitals.jsonl", "support.jsonl", "consequences.jsonl"])
def test_training_on_each_shape_reports_what_an_evaluation_of_the_folder_finds(zotune, tmp_path, name, model):
    """Trained as little as can be; the evaluation is told nothing but the folder and the rows."""
    out, rows = tmp_path / "out", tmp_path / name
    rows.write_text((DATA / name).read_text(encoding="utf-8"), encoding="utf-8")
    more = {"support.jsonl": ["--scored-turns", "all"]}.get(name, [])
    tuned = [
        "--tuning",
        "lora",
        "--tuned-layers",
        1,
        "--learning-rate",
        "0.05",
        "--mu",
        "0.01",
        "--max-steps",
        1,
        "--model",
        model,
    ]
    said = zotune("train", "--train-file", rows, "--eval-file", rows, "--output-dir", out, "--json", *tuned, *more)
    assert said.code == 0, said.err
    trained = json.loads(said.out)["test"]
    found = json.loads(zotune("eval", "--model", out, "--eval-file", rows, "--json").out)
    metric = next(iter(trained))
    assert metric == ("accuracy" if name == "consequences.jsonl" else "log_loss")
    assert (found[metric], found["loss"]) == pytest.approx((trained[metric], trained["loss"]), abs=1e-4)
    assert found["config"]["scored_turns"] == ("all" if more else "last")
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"| {metric} (95 % interval) | " in card


def test_an_evaluation_reads_template_and_words_where_they_were_saved(zotune, short, tmp_path, rows_file):
    words = ["--verbalizer", "yes", "good", "no", "bad"]
    assert zotune(*short("--template", "{text} It was", *words, "--eval-file", rows_file)).code == 0
    evaluated = ["eval", "--model", tmp_path / "out", "--eval-file", rows_file, "--json"]
    found = json.loads(zotune(*evaluated).out)
    trained = json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))["test"]
    assert (found["accuracy"], found["loss"]) == (trained["accuracy"], pytest.approx(trained["loss"], abs=1e-6))
    assert found["config"]["template"] == "{text} It was"
    other = json.loads(zotune(*evaluated, "--template", "{text}\nSo:").out)
    assert (other["config"]["template"], other["config"]["verbalizer"]) == (
        "{text}\nSo:",
        found["config"]["verbalizer"],
    )
    assert other["loss"] != found["loss"]


def test_words_that_were_taken_from_the_rows_are_saved(zotune, short, tmp_path):
    """An evaluation file with one of the labels alone is then no riddle."""
    assert zotune(*short()).code == 0
    saved = yaml.safe_load((tmp_path / "out/config.yaml").read_text(encoding="utf-8"))
    assert (saved["data_format"], saved["verbalizer"]) == ("classification", {"no": "no", "yes": "yes"})
    one = write(tmp_path / "one.jsonl", [{"text": "fine", "label": "yes"}])
    assert zotune("eval", "--model", tmp_path / "out", "--eval-file", one).code == 0
    # Rows of another shape are read on their own terms.
    other = write(tmp_path / "other.jsonl", [{"prompt": "a", "completion": "b"}])
    said = zotune("eval", "--model", tmp_path / "out", "--eval-file", other, "--data-format", "completion")
    assert said.code == 0 and "perplexity" in said.out


def test_long_and_strange_texts_are_read_as_they_are(zotune, tmp_path):
    texts = ["שלום עולם", "👩‍👩‍👧 \u200b x", "a\r\nb", "word " * 20_000]
    rows = write(tmp_path / "rows.jsonl", [{"id": 1, "text": t, "label": i % 2} for i, t in enumerate(texts)])
    run = ["train", "--model", "random:llama-tiny", "--train-file", rows, "--num-dev", 0, "--max-steps", 1]
    said = zotune(*run, "--output-dir", tmp_path / "out")
    assert said.code == 2
    assert re.search(r"rows.jsonl, line 4 has 100\d\d\d tokens, but the model reads at most 512", said.err)
    said = zotune(*run, "--output-dir", tmp_path / "out", "--max-length", 64)
    assert said.code == 0, said.err


def documented_commands():
    text = (ROOT / "docs" / "start" / "your-data.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("line", documented_commands(), ids=lambda line: line.split("/")[2].split()[0])
def test_the_examples_of_the_docs_would_run(zotune, line, tmp_path, monkeypatch, model):
    monkeypatch.chdir(ROOT)
    _, verb, *arguments = shlex.split(line)
    if verb == "eval":
        monkeypatch.chdir(tmp_path)
        (tmp_path / "runs").mkdir()
        (tmp_path / "examples").symlink_to(ROOT / "examples")
        training = next(shlex.split(x)[1:] for x in documented_commands() if "--output-dir runs/reviews" in x)
        assert zotune(*training, "--max-steps", 1, "--model", model).code == 0
        assert zotune(verb, *arguments).code == 0
        return
    said = zotune(verb, *[a for a in arguments if a != "--dry-run"], "--dry-run", "--model", model)
    assert said.code == 0, said.err
    assert said.out.count("⟦") >= 4 and "refused: 0" in said.out


def test_evaluate_log_loss_is_the_measure_of_completions(tiny, completions):
    assert load_rows(tiny("llama"), DataOptions(eval_file=completions)).measure is evaluate_log_loss


def test_rows_of_alpaca_are_read_as_they_are_and_by_a_template_of_the_user(zotune, short, tmp_path):
    rows = [{"instruction": f"Add {i} and:", "input": str(i), "output": str(2 * i)} for i in range(9)]
    path = write(tmp_path / "alpaca.jsonl", rows)
    shown = zotune(*short(), "--train-file", path, "--dry-run")
    assert shown.code == 0, shown.err
    assert "data_format: alpaca), written with Alpaca's prompt" in shown.out
    assert re.search(r"### Instruction:\nAdd (\d) and:\n\n### Input:\n\1\n\n### Response:\n⟦", shown.out)
    for more in ([], ["--columns", "completion", "output"]):
        shown = zotune(*short(), "--train-file", path, "--dry-run", "--template", "{instruction} {input} =", *more)
        assert shown.code == 0, shown.err
        assert re.search(r"Add (\d) and: \1 =⟦", shown.out)
