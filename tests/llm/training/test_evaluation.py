"""`zotune eval` of tasks is each alone; baselines, demonstrations and predictions are what is computed by hand."""

import json
import math
import random
import re

import numpy as np
import pytest

from zotune.errors import UsageError
from zotune.llm.config.run import EvalConfig
from zotune.llm.data.demonstrations import choose_demonstrations, prepend_demonstrations
from zotune.llm.data.examples import Example
from zotune.llm.models.load import load
from zotune.llm.scoring.baselines import majority, paired_difference
from zotune.llm.tasks.user_data import load_user_data
from zotune.llm.training.evaluation import base_model_of, evaluate
from zotune.llm.training.train import train

Z = 1.959963984540054
TINY = {"model": "random:llama-tiny", "device": "cpu"}
PASSING = {"seconds", "peak_memory", "config", "environment"}


def steady(entry):
    return {k: v for k, v in entry.items() if k not in PASSING}


@pytest.fixture
def own(rows_file):
    """A function: options of an evaluation of six rows, five to choose demonstrations from."""
    plain = {**TINY, "train_file": rows_file, "num_dev": 6, "template": "{text} is"}
    return lambda **options: EvalConfig.model_validate({**plain, **options})


# Comparison ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("only_one", "only_other", "neither"), [(5, 2, 43), (0, 0, 20), (30, 0, 0), (1, 9, 862)])
def test_the_interval_of_a_paired_difference_is_bonett_and_prices(only_one, only_other, neither):
    n = only_one + only_other + neither
    ones = [1.0] * only_one + [0.0] * only_other + [1.0] * neither
    others = [0.0] * only_one + [1.0] * only_other + [1.0] * neither
    p, q = (only_one + 1) / (n + 2), (only_other + 1) / (n + 2)
    half = Z * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    found = paired_difference(ones, others)
    assert found.value == pytest.approx((only_one - only_other) / n)
    assert (found.low, found.high) == pytest.approx((max(-1, p - q - half), min(1, p - q + half)))


def test_the_interval_of_a_paired_difference_holds_the_truth_as_often_as_it_says():
    """Two models that agree on four rows of five, right on 70 % and 65 %."""
    draw = np.random.RandomState(0)
    kinds = [(1, 1), (1, 0), (0, 1), (0, 0)]
    truth, held, trials = 0.05, 0, 2000
    for _ in range(trials):
        rows = draw.choice(4, size=100, p=[0.575, 0.125, 0.075, 0.225])
        found = paired_difference(*zip(*(kinds[i] for i in rows), strict=True))
        held += found.low <= truth <= found.high
    assert 0.935 < held / trials < 0.975


def test_a_paired_difference_is_known_better_than_either_side():
    hits = [float(i % 3 > 0) for i in range(300)]
    other = [0.0 if i < 15 else hit for i, hit in enumerate(hits)]
    found = paired_difference(hits, other)
    assert found.low > 0
    assert found.high - found.low < 0.06


def test_the_majority_class_is_the_training_rows_most_frequent_label():
    train_rows = [Example("p", (" a", " b", " c"), label) for label in (2, 2, 1, 0, 2)]
    test_rows = [Example("p", (" a", " b", " c"), label) for label in (0, 0, 2, 0)]
    found = majority(train_rows, test_rows)
    assert (found.label, found.accuracy, found.chosen_on) == (2, 0.25, "training")
    found = majority([], test_rows)
    assert (found.label, found.accuracy, found.chosen_on) == (0, 0.75, "evaluation")
    assert majority([], [Example("p", ("x",), 0, answers=("x",))]) is None
    assert majority([], [*test_rows, Example("p", (" a", " b"), 0)]) is None


# Demonstrations --------------------------------------------------------------------------------------------


def test_demonstrations_are_training_rows_with_their_answers_between_blank_lines(own, plain_score):
    """Prompts and scores against a plain reading of the file and the model run on one whole sequence at a time."""
    config = own(num_demonstrations=3, data_seed=4)
    (found,) = evaluate(config)[0].values()
    splits, lm = load_user_data(config, None).splits, load(config)
    order = np.random.RandomState(4).permutation(5)[:3]
    shown = [f"{splits.train[i].prompt}{splits.train[i].candidates[splits.train[i].label]}" for i in order]
    for e, asked, prediction in zip(splits.test, found.examples, found.evaluation.predictions, strict=True):
        prompt = "\n\n".join([*shown, e.prompt])
        assert asked.prompt == prompt
        values = [plain_score(lm, prompt, c) for c in e.candidates]
        assert prediction == values.index(max(values))
    assert {e.prompt for e in splits.train}.isdisjoint(e.prompt for e in splits.test)


def test_data_seed_chooses_demonstrations_and_changes_no_evaluation_row_of_a_sample():
    asked = []
    for seed in (0, 1):
        config = EvalConfig(**TINY, task="sst2", num_eval=3, num_demonstrations=2, data_seed=seed, max_length=500)
        asked.append([e.prompt.split("\n\n") for e in evaluate(config)[0]["sst2"].examples])
    assert [parts[-1] for parts in asked[0]] == [parts[-1] for parts in asked[1]]
    assert [parts[:-1] for parts in asked[0]] != [parts[:-1] for parts in asked[1]]
    texts = {f"{row['sentence'].strip()} It was {('terrible', 'great')[row['label']]}" for row in _training("sst2")}
    assert all(text in texts for run in asked for parts in run for text in parts[:-1])


def _training(task):
    from zotune.llm.tasks.task import _sample_folder, _sample_rows

    return _sample_rows(_sample_folder(task), "train")


def test_what_the_context_has_no_room_for_is_left_out_whole_and_said():
    """Against adding up the lengths one by one, for many lengths and limits."""
    draw = random.Random(0)
    for _ in range(200):
        texts = tuple("x" * draw.randint(1, 9) for _ in range(draw.randint(0, 6)))
        example, limit = Example("p" * draw.randint(1, 9), ("a", "bcd"), 0), draw.randint(10, 60)
        ((asked,), (count,)) = prepend_demonstrations([example], texts, len, limit)
        room, expected = limit - len(example.prompt) - 3, 0
        for text in reversed(texts):
            room -= len(text) + 2
            if room < 0:
                break
            expected += 1
        assert count == expected
        assert asked.prompt == "\n\n".join([*texts[len(texts) - count :], example.prompt])
        assert len(asked.prompt) + 3 <= max(limit, len(example.prompt) + 3)


def test_fewer_demonstrations_than_asked_are_reported(own, capsys):
    found, results = evaluate(own(num_demonstrations=5, max_length=120))
    assert re.search(
        r"rows have no room for 5 demonstrations in 120 tokens; they get the last ones that fit, at least \d",
        capsys.readouterr().err,
    )
    counts = found["rows"].counts
    assert min(counts) < 5
    assert results["demonstrations"] == {"asked": 5, "fewest": min(counts), "mean": sum(counts) / len(counts)}


def test_demonstrations_come_from_no_other_rows_than_there_are():
    rows = [Example(str(i), (" a",), 0) for i in range(9)]
    assert sorted(choose_demonstrations(rows, 9, 3)) == [f"{i} a" for i in range(9)]
    with pytest.raises(UsageError, match=r"10 demonstrations were asked for, but there are 9.*Lower --num-demon"):
        choose_demonstrations(rows, 10, 0)


def test_a_chat_has_no_demonstrations(tmp_path):
    path = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    path.write_text("".join(json.dumps({"messages": turns, "n": i}) + "\n" for i in range(6)), encoding="utf-8")
    config = EvalConfig(model="smollm2-135m", device="cpu", train_file=path, num_dev=2, num_demonstrations=1)
    with pytest.raises(UsageError, match="cannot be combined with chats"):
        evaluate(config)


# Whole evaluations -----------------------------------------------------------------------------------------


def test_several_tasks_are_each_alone(zotune):
    options = ["--model", "random:llama-tiny", "--device", "cpu", "--num-eval", 4, "--max-length", 200, "--json"]
    alone = {t: json.loads(zotune("eval", *options, "--task", t).out) for t in ("sst2", "copa", "rte")}
    for named in (["sst2", "copa", "rte"], ["sst2,copa,rte"], ["sst2", "copa,rte", "sst2"]):
        together = json.loads(zotune("eval", "--task", *named, *options).out)
        assert list(together["tasks"]) == ["sst2", "copa", "rte"]
        for task, entry in together["tasks"].items():
            assert steady(entry) == steady(alone[task])
    said = zotune("eval", "--task", "sst2", "copa", *options[:-1]).out
    assert re.fullmatch(r"sst2:\naccuracy .*\ncopa:\naccuracy .*\n", said)


@pytest.mark.sample(2)
@pytest.mark.parametrize("tuning", ["full", "lora", "prompt"])
def test_zero_shot_is_the_base_of_what_was_tuned_on_the_same_rows(config, own, tmp_path, tuning):
    made = config(tuning=tuning, max_steps=4, learning_rate=0.5, template="{text} is", num_dev=6)
    train(made)
    found, results = evaluate(own(model=str(tmp_path / "out"), baselines=True))
    alone, _ = evaluate(own())
    one, base = found["rows"], alone["rows"].evaluation
    zero_shot = results["baselines"]["zero_shot"]
    assert zero_shot["model"] == "random:llama-tiny"
    assert one.zero_shot.predictions == base.predictions
    assert (zero_shot["accuracy"], zero_shot["loss"]) == (base.accuracy, base.loss)
    assert one.evaluation.loss != base.loss
    assert zero_shot["difference"]["value"] == pytest.approx(one.evaluation.accuracy - base.accuracy)
    labels = [e.label for e in load_user_data(made, None).splits.train]
    most = max((0, 1), key=labels.count)
    assert results["baselines"]["majority"]["accuracy"] == sum(e.label == most for e in one.examples) / 6
    assert f"zero-shot (random:llama-tiny): {one.zero_shot}; difference" in "\n".join(one.lines())


def test_zero_shot_reads_the_same_prompts_where_virtual_tokens_leave_less_room(config, own, tmp_path, monkeypatch):
    """The base has room for more demonstrations; it is asked what the tuned model was asked."""
    from zotune.llm.models.language_model import LanguageModel

    monkeypatch.setattr(LanguageModel, "context", property(lambda self: 160 - self.num_virtual_tokens))
    train(config(tuning="prompt", num_virtual_tokens=40, template="{text} is", num_dev=6))
    asked = {"baselines": True, "num_demonstrations": 5}
    tuned, _ = evaluate(own(model=str(tmp_path / "out"), **asked))
    alone, _ = evaluate(own(**asked))
    assert sum(tuned["rows"].counts) < sum(alone["rows"].counts)
    monkeypatch.setattr(LanguageModel, "context", 120)
    as_short, _ = evaluate(own(**asked))
    assert tuned["rows"].zero_shot.loss == as_short["rows"].evaluation.loss != alone["rows"].evaluation.loss


def test_zero_shot_has_the_precision_of_what_was_tuned(config, own, tmp_path):
    train(config(dtype="bfloat16", template="{text} is", num_dev=6))
    found, _ = evaluate(own(model=str(tmp_path / "out"), baselines=True))
    alone, _ = evaluate(own(dtype="bfloat16"))
    assert found["rows"].zero_shot.loss == alone["rows"].evaluation.loss


def test_what_was_tuned_twice_has_the_first_base(config, tmp_path):
    train(config(output_dir=tmp_path / "once"))
    train(config(model=str(tmp_path / "once"), tuning="lora", output_dir=tmp_path / "twice"))
    assert base_model_of(str(tmp_path / "twice")) == base_model_of(str(tmp_path / "once")) == "random:llama-tiny"
    assert base_model_of("random:llama-tiny") is None


def test_a_model_that_was_not_tuned_has_no_zero_shot_beside_it(own):
    _, results = evaluate(own(baselines=True))
    assert results["baselines"]["zero_shot"] is None


def test_predictions_are_rows_in_order_with_the_scores_by_definition(own, tmp_path, plain_score):
    """Scores against whole unpadded sequences in float64, normalised over the candidates."""
    config = own(predictions=tmp_path / "said.jsonl")
    _, results = evaluate(config)
    lines = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text(encoding="utf-8").splitlines()]
    examples, lm = load_user_data(config, None).splits.test, load(config)
    assert len(lines) == len(examples)
    for line, e in zip(lines, examples, strict=True):
        values = [plain_score(lm, e.prompt, c) for c in e.candidates]
        total = math.log(sum(map(math.exp, values)))
        assert line["scores"] == pytest.approx([v - total for v in values], abs=1e-6)
        assert (line["task"], line["prompt"], tuple(line["candidates"])) == ("rows", e.prompt, e.candidates)
        assert (line["label"], line["prediction"]) == (e.label, values.index(max(values)))
        assert line["accuracy"] == float(line["prediction"] == e.label)
    assert sum(line["accuracy"] for line in lines) / len(lines) == results["accuracy"]
    loss = -sum(line["scores"][line["label"]] for line in lines) / len(lines)
    assert loss == pytest.approx(results["loss"])


def test_predictions_of_generated_answers_are_texts_with_their_f1(tmp_path):
    config = EvalConfig(**TINY, task="squad", num_eval=2, max_length=120, predictions=tmp_path / "said.jsonl")
    found, results = evaluate(config)
    lines = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["prediction"] for line in lines] == list(found["squad"].evaluation.predictions)
    assert [tuple(line["answers"]) for line in lines] == [e.answers for e in found["squad"].examples]
    assert sum(line["f1"] for line in lines) / 2 == results["f1"]
    assert all("candidates" not in line for line in lines)


def test_a_log_loss_is_written_row_by_row_and_has_no_paired_difference(config, tmp_path):
    path = tmp_path / "texts.jsonl"
    rows = [{"prompt": f"say {word}:", "completion": f" {word}"} for word in ("one", "two", "three", "four", "five")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    train(config(train_file=path, num_dev=2))
    asked = {**TINY, "model": str(tmp_path / "out"), "train_file": path, "num_dev": 2, "baselines": True}
    found, results = evaluate(EvalConfig(**asked, predictions=tmp_path / "said.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["log_loss"] for line in lines] == list(found["rows"].evaluation.predictions)
    assert all("prediction" not in line and "label" not in line for line in lines)
    assert results["baselines"]["majority"] is None
    assert results["baselines"]["zero_shot"]["difference"] is None
    assert results["baselines"]["zero_shot"]["log_loss"] > 0


def test_predictions_take_the_place_of_no_file(own, rows_file):
    before = rows_file.read_bytes()
    with pytest.raises(UsageError, match=r"rows.jsonl' exists; remove it or name another"):
        evaluate(own(predictions=rows_file))
    assert rows_file.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "sst2,rtee"}, r"no task 'rtee'. Did you mean 'rte'"),
        ({"task": "sst2,rte", "prompt": "none"}, "one task at a time"),
        ({"task": "sst2", "predictions": "no/such/folder/rows.jsonl"}, "no folder 'no/such/folder'"),
        ({"task": "sst2", "num_eval": 0}, "no row to evaluate on"),
        ({"task": "sst2", "data_seed": 1}, "data_seed has no effect"),
        ({"task": "sst2", "num_demonstrations": 1001}, "there are 1000 training rows"),
        ({"task": "drop", "num_demonstrations": 2}, "there are 0 training rows .* --train-file"),
        ({"task": "sst2", "num_demonstrations": 2, "model": "random:roberta-tiny"}, "needs a causal language model"),
    ],
)
def test_evaluations_that_cannot_be_are_refused_with_a_reason(options, message):
    with pytest.raises(UsageError, match=message):
        evaluate(EvalConfig.model_validate({**TINY, **options}))
