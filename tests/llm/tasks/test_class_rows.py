"""A sequence classifier on own rows: the loss is that of its head in plain transformers, before and after tuning."""

import json
import sys

import pytest
import torch
import transformers
from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from zotune.errors import UsageError
from zotune.llm import load as load_in_python
from zotune.llm import train as train_in_python
from zotune.llm.config.data import DataOptions
from zotune.llm.config.run import EvalConfig
from zotune.llm.ledger.verify import verify
from zotune.llm.models.random_models import byte_tokenizer
from zotune.llm.tasks.load_data import load_examples, load_rows
from zotune.llm.training.evaluation import evaluate
from zotune.llm.training.train import train
from zotune.plan.dry_run import dry_run

CLASSES = ("Negative", "neutral", "POSITIVE")
SIZES = {
    "vocab_size": 320,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 300,
}
TEXTS = ("a gorgeous film", "dull", "it never quite comes alive , and then it ends", "fine", "see it twice", "bad")
# Each spelling that means a class, and no row of the class in the middle.
LABELS = ("POSITIVE", "negative", 0, "positive", "2", "Negative")
RIGHT = (2, 0, 0, 2, 2, 0)


def classifier(folder, family, **config):
    torch.manual_seed(0)
    model_type = {"bert": "Bert", "roberta": "Roberta", "llama": "Llama"}[family]
    classes = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
    settings = getattr(transformers, f"{model_type}Config")(**SIZES, pad_token_id=1, **{**classes, **config})
    module = AutoModelForSequenceClassification.from_config(settings)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.3 * torch.randn(p.shape)
    module.save_pretrained(folder)
    byte_tokenizer(settings).save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "classes.jsonl"
    pairs = zip(TEXTS, LABELS, strict=True)
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in pairs))
    return path


def numbered(tiny, names):
    """A model that counts as a classifier of classes of these names; none of its outputs is asked for."""
    lm = tiny("llama")
    lm.classifies = True
    lm.config.num_labels = len(names)
    lm.config.id2label = dict(enumerate(names))
    return lm


def rows_of(tmp_path, labels):
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps({"text": f"film {i}", "label": x}) + "\n" for i, x in enumerate(labels)))
    return path


@torch.no_grad()
def plain_loss(model, folder):
    """The loss that transformers computes itself, one text at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    losses = [
        model.eval()(**tokenizer(text, return_tensors="pt"), labels=torch.tensor([label])).loss
        for text, label in zip(TEXTS, RIGHT, strict=True)
    ]
    return float(torch.stack(losses).mean())


@pytest.mark.sample(2)
@pytest.mark.parametrize("tuning", ["full", "head", "lora"])
@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_a_classifier_is_tuned_on_own_rows_and_saved_for_plain_transformers(family, tuning, tmp_path, rows, config):
    base = classifier(tmp_path / "base", family)
    options = {"model": str(base), "train_file": rows, "eval_file": rows, "tuning": tuning, "num_dev": 0}
    before, _ = evaluate(EvalConfig(model=str(base), eval_file=rows, device="cpu"))
    start = plain_loss(AutoModelForSequenceClassification.from_pretrained(base), base)
    assert before["rows"].evaluation.loss == pytest.approx(start, rel=1e-5)
    run = config(**options, learning_rate=1e-2, mu=1e-2, max_steps=3)
    result = train(run)
    out = result.output_dir
    kind = AutoPeftModelForSequenceClassification if tuning == "lora" else AutoModelForSequenceClassification
    plain = kind.from_pretrained(out, **({"num_labels": 3} if tuning == "lora" else {}))
    assert plain_loss(plain, out) == pytest.approx(result.test.loss, rel=1e-5)
    assert abs(result.test.loss - start) > 1e-4
    assert [plain.config.id2label[i] for i in range(3)] == list(CLASSES)
    assert verify(out).is_right
    again, _ = evaluate(EvalConfig(model=str(out), eval_file=rows, device="cpu"))
    assert again["rows"].evaluation.loss == pytest.approx(result.test.loss, rel=1e-6)
    assert dry_run(run.model_copy(update={"output_dir": tmp_path / "x"})).num_tuned == result.num_tuned
    if tuning == "lora":
        settings = json.loads((out / "adapter_config.json").read_text())
        assert settings["task_type"] == "SEQ_CLS" and settings["modules_to_save"]


def test_words_name_classes_and_a_template_joins_columns(tmp_path, config):
    base = classifier(tmp_path / "base", "bert")
    path = tmp_path / "pairs.jsonl"
    values = [
        {"a": text, "b": "so", "label": "yes" if right else "no"} for text, right in zip(TEXTS, RIGHT, strict=True)
    ]
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    options = {"model": str(base), "eval_file": path, "device": "cpu", "template": "{a} {b}"}
    found, _ = evaluate(EvalConfig(**options, verbalizer={"yes": "positive", "no": "Negative"}))
    shown = found["rows"].examples[0]
    assert (shown.prompt, [word.strip() for word in shown.candidates]) == ("a gorgeous film so", list(CLASSES))
    assert tuple(example.label for example in found["rows"].examples) == RIGHT
    with pytest.raises(UsageError, match=r"the label 'yes' is not in the verbalizer"):
        evaluate(EvalConfig(**options))
    with pytest.raises(UsageError, match=r"has no class 'posit' for the label 'yes'.*POSITIVE"):
        evaluate(EvalConfig(**options, verbalizer={"yes": "posit"}))


@pytest.mark.parametrize(
    ("names", "verbalizer", "labels", "right"),
    [
        (("1", "2", "3"), {"0": "1", "1": "2", "2": "3"}, (0, 1, 2), (0, 1, 2)),
        (("1", "2", "3"), {"1": "1", "2": "2"}, (3, 1, 2), (2, 0, 1)),
        (("a", "b", "c"), {"a": "c", "0": "c"}, ("a", "b", "c"), (2, 1, 2)),
        (("0", "1", "2"), {}, (2, 0, 1), (2, 0, 1)),
    ],
    ids=["numbers", "names", "no label of a class", "names that are numbers"],
)
def test_the_candidates_are_the_heads_outputs_whatever_the_verbalizer(names, verbalizer, labels, right, tiny, tmp_path):
    lm = numbered(tiny, names)
    path = rows_of(tmp_path, labels)
    data = load_examples(lm, DataOptions(eval_file=path, verbalizer=verbalizer))
    assert {e.candidates for e in data.splits.test} == {names}
    assert tuple(e.label for e in data.splits.test) == right
    again = load_examples(lm, DataOptions(eval_file=path, verbalizer=data.options.verbalizer))
    assert again.splits == data.splits
    encoded = load_rows(lm, DataOptions(eval_file=path, verbalizer=verbalizer)).test
    assert [[c.tokens for c in e.candidates] for e in encoded] == [[(0,), (1,), (2,)]] * 3
    assert tuple(e.label for e in encoded) == right


def test_a_metric_sees_the_text_and_the_names_of_the_classes(tmp_path, rows, monkeypatch):
    (tmp_path / "class_metric.py").write_text(
        "SEEN = []\n\ndef m(batch):\n    SEEN.extend(batch)\n    return sum(c.text == c.reference for c in batch)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    base = classifier(tmp_path / "base", "roberta")
    found, _ = evaluate(EvalConfig(model=str(base), eval_file=rows, device="cpu", compute_metrics="class_metric:m"))
    seen = sys.modules["class_metric"].SEEN
    assert [c.references for c in seen] == [(CLASSES[i],) for i in RIGHT]
    assert [c.text for c in seen] == [CLASSES[i] for i in found["rows"].evaluation.predictions]
    assert all(text in c.prompt for text, c in zip(TEXTS, seen, strict=True))


@pytest.mark.parametrize("verbalizer", [{}, {"1": "2"}])
def test_a_label_that_is_a_name_and_the_number_of_another_class_is_refused(verbalizer, tiny, tmp_path):
    path = rows_of(tmp_path, (0, 1, 2))
    with pytest.raises(UsageError, match=r"the label '[12]' may mean two classes.*--verbalizer .*2 3 if they are num"):
        load_examples(numbered(tiny, ("1", "2", "3")), DataOptions(eval_file=path, verbalizer=verbalizer))


@pytest.mark.parametrize(
    ("settings", "options", "match"),
    [
        ({"id2label": {0: "score"}, "label2id": {"score": 0}}, {}, r"has 1 output\(s\) for regression"),
        ({"problem_type": "multi_label_classification"}, {}, "multi_label_classification"),
        ({"id2label": {0: "a", 1: "a"}, "label2id": {"a": 0}}, {}, "no names of their own"),
        ({}, {"data_format": "completion"}, "is a sequence classifier.*data_format: completion"),
        ({}, {"objective": "teacher_forcing"}, "predicts words"),
    ],
)
def test_what_a_head_cannot_learn_is_refused(settings, options, match, tmp_path, rows):
    base = classifier(tmp_path / "base", "bert", **settings)
    with pytest.raises(UsageError, match=match):
        evaluate(EvalConfig(model=str(base), eval_file=rows, device="cpu", **options))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # between peft and transformers
@pytest.mark.sample(1)
@pytest.mark.parametrize("family", ["roberta", "llama"])
def test_a_classifiers_adapter_beside_a_language_model_brings_its_head(family, tmp_path, rows, config):
    """As peft users share them: the base is a language model without a head, and the adapter saves one."""
    base = tmp_path / "base"
    kind = {"roberta": transformers.AutoModelForMaskedLM, "llama": transformers.AutoModelForCausalLM}[family]
    settings = getattr(transformers, f"{family.capitalize()}Config")(**SIZES, pad_token_id=1)
    torch.manual_seed(0)
    kind.from_config(settings).save_pretrained(base)
    byte_tokenizer(settings).save_pretrained(base)
    classes = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    made = get_peft_model(classes, LoraConfig(task_type="SEQ_CLS", target_modules=["v_proj", "value"], r=2)).eval()
    made.save_pretrained(tmp_path / "a")
    numbered = tmp_path / "numbered.jsonl"
    values = [{"text": text, "label": right} for text, right in zip(TEXTS, RIGHT, strict=True)]
    numbered.write_text("".join(json.dumps(value) + "\n" for value in values))
    options = {"model": str(tmp_path / "a"), "device": "cpu", "eval_file": numbered}
    found, _ = evaluate(EvalConfig(**options))
    assert found["rows"].evaluation.loss == pytest.approx(plain_loss(made, base), rel=1e-5)
    run = config(**options, train_file=numbered, tuning="lora", learning_rate=1e-2, mu=1e-2, num_dev=0)
    result = train(run)
    plain = AutoPeftModelForSequenceClassification.from_pretrained(result.output_dir, num_labels=3)
    assert plain_loss(plain, base) == pytest.approx(result.test.loss, rel=1e-5)
    assert dry_run(run.model_copy(update={"output_dir": tmp_path / "x"})).num_tuned == result.num_tuned


def test_a_loaded_classifier_is_tuned_in_python(tmp_path):
    model, tokenizer = load_in_python(classifier(tmp_path / "base", "roberta"), device="cpu")
    values = [{"text": text, "label": right} for text, right in zip(TEXTS, RIGHT, strict=True)]
    result = train_in_python(model, tokenizer, values, values, tuning="full", max_steps=1, learning_rate=1e-2)
    result.model.save_pretrained(tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "out")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert plain_loss(plain, tmp_path / "out") == pytest.approx(result.test.loss, rel=1e-5)
