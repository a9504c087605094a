"""Rewards and metrics take columns of the rows by name; further metrics judge what was answered, ROUGE among them."""

import json
import sys
from types import ModuleType

import pytest
import torch

from zotune.errors import RunError, UsageError
from zotune.llm.config.data import DataOptions
from zotune.llm.config.objective import METRICS
from zotune.llm.config.run import TrainConfig
from zotune.llm.config.schema import validate
from zotune.llm.scoring.functions import Completion, call, columns_taken
from zotune.llm.scoring.generation import generate
from zotune.llm.scoring.metrics import NAMED, checked_metrics, load_metric, rouge
from zotune.llm.tasks.load_data import load_rows

BATCH = [Completion("p", "a", (), {"solution": 1, "level": "x"}), Completion("q", "b", (), {"solution": 2})]


def old(batch):
    return [c.text for c in batch]


def named(batch, solution):
    return solution


def as_trl(prompts, completions, solution, **others):
    return prompts, [c.text for c in completions], solution, others


def with_default(completions, weight=3, *, level=None):
    return [weight, level]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (old, ["a", "b"]),
        (named, [1, 2]),
        (as_trl, (["p", "q"], ["a", "b"], [1, 2], {"level": ["x", None]})),
        (with_default, [3, ["x", None]]),
        (lambda *batch: len(batch), 1),
        (len, 2),
    ],
    ids=["old", "named", "trl", "default", "star", "builtin"],
)
def test_a_function_is_given_the_columns_that_it_names(function, expected):
    assert call(function, BATCH) == expected


def test_a_column_that_is_missing_is_named_before_anything_runs():
    assert columns_taken(as_trl, ("solution", "level", "prompts"), "m:f") == ("solution", "level")
    with pytest.raises(UsageError, match=r"m:f takes the column 'solution'.*Did you mean 'solutions'\?.*columns are"):
        columns_taken(named, ("prompt", "solutions"), "m:f")


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    name = f"metrics_{tmp_path.name}".replace("-", "_")

    def write(text):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        return name

    return write


@pytest.fixture
def own(tiny, tmp_path):
    lm = tiny("llama")

    def make(rows, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return lm, load_rows(lm, DataOptions(eval_file=path, **options))

    return make


def test_a_reward_sees_the_columns_of_its_rows_in_every_order(own, module):
    name = module("def r(batch, level): return [float(x) * 10 + len(c.prompt) for c, x in zip(batch, level)]\n")
    rows = [{"prompt": "a" * n, "level": 9 - n, "unused": "u"} for n in (1, 5, 3)]
    lm, data = own(rows, objective=f"{name}:r", max_new_tokens=1)
    found = data.measure(lm, data.test, 2)
    assert found.values == tuple(10 * (9 - n) + n for n in (1, 5, 3))
    assert [dict(e.columns) for e in data.test] == [{"level": 9 - n} for n in (1, 5, 3)]
    with pytest.raises(UsageError, match="takes the column 'level', which the rows do not have"):
        own([{"prompt": "a"}], objective=f"{name}:r")


def test_another_value_of_a_column_that_a_reward_reads_is_another_row(own, module):
    from zotune.llm.training.origin import data_digest

    name = module("def r(batch, level): return level\n\ndef s(batch): return [0.0 for _ in batch]\n")
    by = {f: [data_digest(own([{"prompt": "a", "level": x}], objective=f"{name}:{f}")[1].test) for x in (1, 2)]
          for f in "rs"}  # fmt: skip
    assert by["r"][0] != by["r"][1] and by["s"][0] == by["s"][1]


@torch.no_grad()
@pytest.mark.parametrize("shape", ["completion", "chat"])
def test_metrics_of_completions_and_chats_judge_generated_text(own, module, shape):
    name = module(
        "SEEN = []\n\n"
        "def m(batch, id):\n    SEEN.extend((c.prompt, c.text, c.references, i) for c, i in zip(batch, id))\n"
        "    return {'mean_id': sum(id) / len(id)}\n"
    )
    turns = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c d"}]
    row = {"prompt": "p:", "completion": " c d"} if shape == "completion" else {"messages": turns}
    options = {} if shape == "completion" else {"chat_template": "plain"}
    lm, data = own([{**row, "id": 4}], compute_metrics=f"{name}:m", max_new_tokens=3, stop_at="end", **options)
    found = data.measure(lm, data.test, 1, objective=data.objective)
    prompt = "p:" if shape == "completion" else "<s>User: p\nAssistant:"
    ids = tuple(lm.tokenizer(prompt, add_special_tokens=shape == "completion")["input_ids"])
    text = generate(lm, [ids], 3, stops_at_newline=False)[0]
    assert [(prompt, text, ("c d",), 4)] == sys.modules[name].SEEN
    assert found.summary()["mean_id"] == 4 and found.metric == "f1"


def test_metrics_of_rows_with_labels_judge_the_chosen_words(own, module):
    name = module("def share(batch): return sum(c.text == c.reference for c in batch) / len(batch)\n")
    rows = [{"text": f"film {i}", "label": "good" if i % 3 else "bad"} for i in range(7)]
    lm, data = own(rows, compute_metrics=f"{name}:share")
    found = data.measure(lm, data.test, 2, objective=data.objective)
    assert found.summary()["share"] == found.accuracy and "accuracy" in found.summary()


def word_share(completions, hint):
    return {"share": sum(c.text == h for c, h in zip(completions, hint, strict=True)) / len(hint)}


def test_a_metric_may_be_a_function_in_python(tiny):
    from zotune.llm import evaluate

    lm = tiny("llama")
    rows = [{"text": f"film {i}", "label": "good" if i % 2 else "bad", "hint": "good"} for i in range(4)]
    found = evaluate(lm.module, lm.tokenizer, rows, compute_metrics=word_share)
    assert found.more == {"share": sum(found.predictions) / 4}  # `bad` comes before `good`
    with pytest.raises(UsageError, match="compute_metrics: the function '<lambda>' cannot be found by its name"):
        evaluate(lm.module, lm.tokenizer, rows, compute_metrics=lambda completions: 1)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("'a'", "returned 'a'"),
        ("{'x': None}", "for 'x'"),
        ("{'loss': 1.0}", "returned 'loss', a name that the evaluation has"),
        ("1 / 0", "line 1: ZeroDivisionError"),
    ],
)
def test_what_a_metric_does_wrong_is_said(own, module, returned, message):
    name = module(f"def m(batch): return {returned}\n")
    lm, data = own([{"text": "a", "label": 1}, {"text": "b", "label": 2}], compute_metrics=f"{name}:m")
    with pytest.raises(RunError, match=message):
        data.measure(lm, data.test, 2, objective=data.objective)
    assert checked_metrics("m:f", lambda batch: torch.tensor(2), []) == {"f": 2.0}


@pytest.mark.parametrize(
    ("given", "message"), [("rogue", r"no metric 'rogue'. Did you mean 'rouge'\?"), ("a b:c", "module:function")]
)
def test_a_metric_that_is_none_is_refused(given, message):
    with pytest.raises(UsageError, match=message):
        validate(TrainConfig, {"train_file": "a.csv", "compute_metrics": given}, "recipe.yaml")


def test_rouge_is_that_of_torchmetrics_and_said_to_be_missing_without_it(monkeypatch):
    assert set(METRICS) == NAMED.keys()
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.text", None)
    with pytest.raises(UsageError, match=r"torchmetrics, which is not installed: pip install 'zotune\[metrics\]'"):
        load_metric("rouge")
    given = ModuleType("torchmetrics.functional.text")

    def rouge_score(texts, references, accumulate, rouge_keys):
        assert (texts, references, accumulate) == (["the cat"], [["a cat", "cat"]], "best")
        return {f"{key}_fmeasure": torch.tensor(0.5) for key in rouge_keys}

    given.rouge_score = rouge_score
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.text", given)
    assert rouge([Completion("p", "the cat", ("a cat", "cat"))]) == dict.fromkeys(("rouge1", "rouge2", "rougeL"), 0.5)
    with pytest.raises(UsageError, match="references, which some rows lack"):
        rouge([Completion("p", "the cat")])


def test_rouge_of_the_library_is_what_its_formula_gives():
    pytest.importorskip("torchmetrics")
    found = rouge([Completion("p", "the cat sat", ("the cat sat down",)), Completion("p", "dog", ("cat",))])
    # Precision 1 and recall 3/4 of words, 1 and 2/3 of pairs.
    assert found == pytest.approx({"rouge1": 6 / 7 / 2, "rouge2": 0.8 / 2, "rougeL": 6 / 7 / 2})
