"""Each task's prompts, labels, sizes and splits are the protocol's, and what a task has not is refused with a reason.

`tests/prompts/` holds how the first evaluation row of each sample reads in every form.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from zotune.errors import UsageError
from zotune.llm.config.data import DataOptions
from zotune.llm.data.collator import collate
from zotune.llm.data.readers import read_rows
from zotune.llm.data.tokenization import Encoder
from zotune.llm.scoring.generated_answers import evaluate_answers
from zotune.llm.scoring.objectives import TEACHER_FORCING
from zotune.llm.tasks import TASKS
from zotune.llm.tasks import task as task_module
from zotune.llm.tasks.load_data import load_rows
from zotune.llm.tasks.task import _hub_rows, _sample_folder, _sample_rows
from zotune.llm.tasks.trec import label_of

HERE = Path(__file__).parents[2]
FORMS = {"causal": (False, "aligned"), "masked": (True, "aligned"), "plain": (False, "none"), "head": (True, "none")}

# train, dev, test that the protocol states, and those of the shipped rows where they are fewer.
STATED = {
    **dict.fromkeys(TASKS, (1000, 500, 1000)),
    "sst2": (1000, 500, 872),
    "trec": (1000, 500, 500),
    "rte": (1000, 500, 277),
    "cb": (150, 100, 56),
    "wsc": (54, 500, 104),
    "wic": (1000, 500, 638),
    "copa": (300, 100, 100),
    "winogrande": (1000, 100, 1000),
}
SHIPPED = {**STATED, "boolq": (48, 16, 1000), "record": (24, 8, 32), "drop": (0, 0, 19)}


def render(name):
    """Every form of a task's first evaluation row as text."""
    (row, *_) = _sample_rows(_sample_folder(name), "validation")
    parts = []
    for form, key in FORMS.items():
        try:
            e = TASKS[name].form(*key)(row)
        except UsageError as refusal:
            parts.append(f"== {form}: refused ==\n{refusal}\n")
            continue
        gap = "[M]" if form == "masked" else ""
        second = "" if e.second is None else f"\n-- second --\n{e.second}"
        lines = [
            f"{'*' if i == e.label else '+' if i in e.also_right else '-'}{c!r}" for i, c in enumerate(e.candidates)
        ]
        parts.append(f"== {form} ==\n{e.prompt}{gap}{e.suffix}|{second}\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


@pytest.mark.parametrize("name", TASKS)
def test_rendered_prompts_are_the_snapshots(name):
    assert render(name) == (HERE / "prompts" / f"{name}.txt").read_text(encoding="utf-8")


NLI = {"premise": "PREMISE.", "hypothesis": "The H", "label": 2}
ENTAILS = 'Suppose PREMISE. Can we infer that "The H"? Yes, No, or Maybe?\n'
PARAGRAPH = {"paragraph": "P", "question": "Q?", "answer": "A", "label": 1}
WSC_ROW = {"text": "T.", "span1_text": "Ann Lee", "span2_text": "She", "label": 1}
WIC_ROW = {"word": "w", "sentence1": "A.", "sentence2": "B.", "label": 1}
COPA_ROW = {"premise": "P.", "choice1": "The Dog ate.", "choice2": "I ate."}


@pytest.mark.parametrize(
    ("name", "row", "prompt", "candidates", "label"),
    [
        ("sst2", {"sentence": "s ", "label": 1}, "s It was", (" terrible", " great"), 1),
        ("sst5", {"text": "s", "label": 4}, "s It was", (" terrible", " bad", " okay", " good", " great"), 4),
        ("snli", NLI, ENTAILS, ("Yes", "Maybe", "No"), 2),
        ("mnli", NLI, ENTAILS, ("Yes", "Maybe", "No"), 2),
        ("cb", NLI, ENTAILS, ("Yes", "No", "Maybe"), 2),
        ("rte", {**NLI, "label": 1}, 'PREMISE.\nDoes this mean that "The H" is true? Yes or No?\n', ("Yes", "No"), 1),
        ("boolq", {"passage": "P.", "question": "is it", "label": 1}, "P. Is it?\n", ("Yes", "No"), 0),
        ("boolq", {"passage": "P.", "question": "is it?", "answer": False}, "P. Is it?\n", ("Yes", "No"), 1),
        (
            "wsc",
            WSC_ROW,
            'T.\nIn the previous sentence, does the pronoun "she" refer to Ann Lee? Yes or No?\n',
            ("No", "Yes"),
            1,
        ),
        (
            "wic",
            WIC_ROW,
            'Does the word "w" have the same meaning in these two sentences? Yes, No?\nA.\nB.\n',
            ("No", "Yes"),
            1,
        ),
        (
            "multirc",
            PARAGRAPH,
            'P\nQuestion: Q?\nI found this answer "A". Is that correct? Yes or No?\n',
            ("No", "Yes"),
            1,
        ),
        ("copa", {**COPA_ROW, "question": "effect", "label": 0}, "P so", (" the Dog ate.", " I ate."), 0),
        ("copa", {**COPA_ROW, "question": "cause", "label": 1}, "P because", (" the Dog ate.", " I ate."), 1),
    ],
)
def test_causal_prompts_are_the_protocols(name, row, prompt, candidates, label):
    example = TASKS[name].form(False, "aligned")(row)
    assert (example.prompt, example.candidates, example.label) == (prompt, candidates, label)


@pytest.mark.parametrize(
    ("name", "row", "text", "words"),
    [
        ("sst2", {"sentence": "s ", "label": 0}, "s It was[M].", " terrible great"),
        ("sst5", {"text": "s", "label": 0}, "s It was[M].", " terrible bad okay good great"),
        ("snli", NLI, "PREMISE?[M], the H", " Yes Maybe No"),
        ("mnli", NLI, "PREMISE?[M], the H", " Yes Maybe No"),
        ("rte", {**NLI, "label": 1}, "PREMISE?[M], the H", " Yes No"),
        (
            "trec",
            {"text": "Q ?", "coarse_label": "LOC"},
            "[M]: Q ?",
            " Description Entity Expression Human Location Number",
        ),
    ],
)
def test_masked_prompts_are_the_protocols(name, row, text, words):
    example = TASKS[name].form(True, "aligned")(row)
    assert f"{example.prompt}[M]{example.suffix}" == text
    assert "".join(example.candidates) == words


@pytest.mark.parametrize("name", TASKS)
def test_forms_that_do_not_exist_are_refused_with_a_reason(name):
    masked = {"sst2", "sst5", "snli", "mnli", "trec", "rte"}
    without = {"record", "winogrande", "squad", "drop"}
    heads = masked | {"cb", "boolq"}
    expected = {"causal": True, "masked": name in masked, "plain": name not in without, "head": name in heads}
    for form, exists in expected.items():
        if exists:
            assert callable(TASKS[name].form(*FORMS[form]))
        else:
            with pytest.raises(UsageError, match=rf"the task {name} (has|generates) .*"):
                TASKS[name].form(*FORMS[form])
    assert bool(TASKS[name].labels) == (name in heads)


@pytest.mark.parametrize("name", TASKS)
def test_shipped_rows_have_the_stated_sizes_and_every_label(name):
    splits = TASKS[name].splits(DataOptions(task=name), masked=False)
    assert tuple(map(len, (splits.train, splits.dev, splits.test))) == SHIPPED[name]
    examples = [*splits.train, *splits.dev, *splits.test]
    assert {e.label for e in examples} >= set(range(len(TASKS[name].labels)))
    assert all(0 <= e.label < len(e.candidates) and all(e.candidates) for e in examples)
    assert len({(e.prompt, e.candidates) for e in splits.train} & {(e.prompt, e.candidates) for e in splits.dev}) <= 2
    assert (TASKS[name].measure is evaluate_answers) == all(e.answers for e in examples)


@pytest.mark.sample(8)
@pytest.mark.parametrize("name", TASKS)
def test_default_sizes_and_order_of_a_whole_split_are_the_protocols(name, tmp_path):
    """With as many rows as the public splits have (at most 3,000), each marked by its number."""
    num_train, num_dev, num_eval = STATED[name]
    sizes = {"train": min(TASKS[name].size[0], 3000), "validation": min(TASKS[name].size[1], 3000)}
    (template, *_) = _sample_rows(_sample_folder(name), "validation")
    text = next(
        k for k in ("passage", "paragraph", "context", "premise", "sentence", "text", "sentence1") if k in template
    )
    for part, size in sizes.items():
        rows = [{**template, text: f"#{i}# {template[text]}"} for i in range(size)]
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    splits = TASKS[name].splits(DataOptions(task=name, data_source=str(tmp_path), data_seed=5), masked=False)

    def numbers(examples):
        return [int(re.search(r"#(\d+)#", e.prompt)[1]) for e in examples]

    train, test = (np.random.RandomState(5).permutation(sizes[part]).tolist() for part in ("train", "validation"))
    assert numbers(splits.train) == train[:num_train]
    assert numbers(splits.dev) == train[num_train : num_train + num_dev]
    assert numbers(splits.test) == test[:num_eval]
    assert len(splits.test) == num_eval


def test_more_rows_than_a_sample_has_are_refused():
    with pytest.raises(UsageError, match=r"copa: 301 training and 100 held-out rows.*'sample' has 400"):
        TASKS["copa"].splits(DataOptions(task="copa", num_train=301), masked=False)
    with pytest.raises(UsageError, match=r"boolq: 65 training and 0 held-out rows.*has 64"):
        TASKS["boolq"].splits(DataOptions(task="boolq", num_train=65, num_dev=0), masked=False)


def test_a_task_without_training_rows_can_be_evaluated_but_not_trained(zotune, tmp_path):
    options = [
        "--task",
        "drop",
        "--model",
        "random:llama-tiny",
        "--max-length",
        200,
        "--num-eval",
        3,
        "--device",
        "cpu",
    ]
    found = zotune("eval", *options, "--json")
    results = json.loads(found.out)
    assert found.code == 0 and results["num_examples"] == 3
    assert 0 <= results["low"] <= results["f1"] <= results["high"] <= 1 and 0 <= results["exact_match"] <= results["f1"]
    said = zotune("eval", *options)
    assert re.match(r"mean F1 [^\d]+ [\d.]+ % \([\d.]+ to [\d.]+, n = 3\), exact match [\d.]+ %, loss", said.out)
    refused = zotune("train", *options, "--output-dir", tmp_path / "out")
    assert refused.code == 2 and "no training row" in refused.err


def test_samples_are_found_in_the_repository_else_in_the_package(monkeypatch, tmp_path):
    installed = tmp_path / "zotune" / "llm"
    (installed / "tasks" / "data" / "copa").mkdir(parents=True)
    assert _sample_folder("copa").parts[-5:] == ("zotune", "llm", "tasks", "data", "copa")
    monkeypatch.setattr(task_module, "__file__", str(installed / "tasks" / "task.py"))
    assert _sample_folder("copa") == installed / "tasks" / "data" / "copa"
    with pytest.raises(UsageError, match=r"sample rows of rte are part of zotune's repository.*which has copa"):
        _sample_folder("rte")


OLD = ["DESC", "ENTY", "ABBR", "HUM", "LOC", "NUM"]
NEW = ["ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"]


@pytest.mark.parametrize(("column", "names"), [("coarse_label", NEW), ("label-coarse", OLD)])
def test_kinds_of_trec_are_mapped_by_name_whatever_their_numbers(monkeypatch, column, names):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), column: datasets.ClassLabel(names=names)})
    data = datasets.Dataset.from_dict({"text": list("abcdef"), column: list(range(6))}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    assert [OLD[label_of(row)] for row in _hub_rows(("CogComp/trec", None), "train")] == names


def test_kinds_of_trec_are_never_taken_by_number():
    with pytest.raises(UsageError, match=r"names no kind of answer.*coarse_label_name with one of DESC, ENTY"):
        label_of({"text": "Who ?", "coarse_label": 3})


def test_rows_without_a_gold_label_are_left_out(monkeypatch, tmp_path):
    import datasets

    features = datasets.Features({"label": datasets.ClassLabel(names=["yes", "no"])})
    data = datasets.Dataset.from_dict({"label": [1, -1, 0]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    assert _hub_rows(("x", None), "train") == [{"label": 1, "label_name": "no"}, {"label": 0, "label_name": "yes"}]
    for part in ("train", "validation"):
        lines = [json.dumps({"premise": f"p{i}.", "hypothesis": "h", "label": i % 4 - 1}) for i in range(8)]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    options = DataOptions(task="snli", data_source=str(tmp_path), num_train=4, num_dev=2)
    splits = TASKS["snli"].splits(options, masked=False)
    assert tuple(map(len, (splits.train, splits.dev, splits.test))) == (4, 2, 6)


def test_winogrande_is_cut_at_the_blank():
    form = TASKS["winogrande"].form(False, "aligned")
    for name in ("train", "validation"):
        for row in _sample_rows(_sample_folder("winogrande"), name):
            example = form(row)
            assert not example.prompt.endswith(" ") and row["sentence"].startswith(example.prompt)
            for option, candidate in zip((row["option1"], row["option2"]), example.candidates, strict=True):
                whole = row["sentence"].rstrip().replace("_", option)
                assert re.sub(" +", " ", f"{example.prompt}{candidate}").strip() == re.sub(" +", " ", whole).strip()
            assert row["answer"] == str(example.label + 1)
    row = {"option1": "Ann", "option2": "Bo", "answer": "2"}
    ends = form({**row, "sentence": "So it was  _. "})
    assert (ends.prompt, ends.candidates, ends.label) == ("So it was", (" Ann.", " Bo."), 1)


def test_each_right_answer_of_record_counts_and_the_first_is_trained_on(tiny):
    row = {"passage": "A b.\n@highlight\nC", "query": "@placeholder x @placeholder", "entities": ["A", "b", "C"]}
    example = TASKS["record"].form(False, "aligned")({**row, "answers": ["C", "A"]})
    assert example.candidates == (" A x A", " b x b", " C x C")
    lm = tiny("llama")
    encoded = Encoder(lm.tokenizer, masked=False, context=lm.context, max_length=None)(example)
    assert [encoded.is_right(i) for i in range(3)] == [True, False, True]
    alone = TEACHER_FORCING.reads(encoded)
    assert lm.tokenizer.decode(alone.candidates[0].tokens, clean_up_tokenization_spaces=False) == " C x C"


def test_first_texts_of_masked_models_are_cut_at_the_right(tiny):
    """The premise to 240 tokens, the mask and the hypothesis whole."""
    lm = tiny("roberta")
    row = {"premise": "x" * 300 + "yz.", "hypothesis": "It is <mask>", "label": 0}
    example = TASKS["rte"].form(True, "aligned")(row)
    encoded = Encoder(lm.tokenizer, masked=True, context=lm.context, max_length=None)(example)
    (ids,) = encoded.sequences
    decoded = lm.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert decoded == "<s>" + "x" * 240 + "?<mask>, it is <mask></s>"
    assert encoded.candidates[0].positions == (ids.index(lm.tokenizer.mask_token_id),)


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", ["rte", "copa", "winogrande", "sst5", "trec", "wsc", "cb"])
@torch.no_grad()
def test_scores_of_real_rows_are_one_by_one_scores(tiny, causal_family, plain_score, name):
    lm = tiny(causal_family)
    some = [e for e in TASKS[name].splits(DataOptions(task=name), masked=False).test if len(e.prompt) < 300][:3]
    encode = Encoder(lm.tokenizer, masked=False, context=lm.context, max_length=None)
    batch = collate([encode(e) for e in some], lm.pad_token_id, lm.device, exact=True)
    for row, e in zip(lm.score(batch).tolist(), some, strict=True):
        expected = [plain_score(lm, e.prompt, c) for c in e.candidates]
        assert row[: len(expected)] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["rte", "snli", "trec", "sst5"])
@torch.no_grad()
def test_masked_scores_of_real_rows_are_one_by_one_scores(tiny, name):
    lm = tiny("roberta")
    some = [e for e in TASKS[name].splits(DataOptions(task=name), masked=True).test if len(e.prompt + e.suffix) < 230][
        :3
    ]
    encode = Encoder(lm.tokenizer, masked=True, context=lm.context, max_length=None)
    got = lm.score(collate([encode(e) for e in some], lm.pad_token_id, lm.device))
    for row, e in zip(got, some, strict=True):
        ids = lm.tokenizer(f"{e.prompt}<mask>{e.suffix}")["input_ids"]
        logits = lm.module(torch.tensor([ids])).logits[0, ids.index(lm.tokenizer.mask_token_id)].double()
        words = [lm.tokenizer.convert_tokens_to_ids(word) for word in e.candidates]
        torch.testing.assert_close(row - row[0], logits[words] - logits[words[0]], rtol=0, atol=1e-5)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("name", "n"),
    [
        *(("sst2", 2), ("copa", 1), ("winogrande", 1)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("sst2", 20), ("rte", 6), ("copa", 16), ("winogrande", 12))
        ),
    ],
)
def test_zero_shot_accuracy_of_the_built_in_model_is_an_independent_computations(smollm2, plain_score, name, n):
    options = DataOptions(task=name, num_eval=n, num_train=1, num_dev=0)
    rows = load_rows(smollm2, options)
    found = rows.measure(smollm2, rows.test, 8, objective=rows.objective)
    predictions, hits = [], 0
    for e in TASKS[name].splits(options, masked=False).test:
        values = [plain_score(smollm2, e.prompt, c) for c in e.candidates]
        predictions.append(values.index(max(values)))
        hits += predictions[-1] == e.label
    assert found.predictions == tuple(predictions)
    assert found.accuracy == hits / n


def test_own_rows_have_no_prompt_to_leave_out(zotune, rows_file):
    refused = zotune("eval", "--train-file", rows_file, "--prompt", "none")
    assert refused.code == 2 and "--template" in refused.err


def forms(name):
    """How the docs name a task's forms."""
    task = TASKS[name]
    have = {"masked": task.masked, "none": task.plain, "head": task.head}
    return ", ".join(["causal", *(form for form, found in have.items() if callable(found))])


def docs_row(name):
    task = TASKS[name]
    prompt = " ".join(task.causal.__doc__.split("\n\n")[0].split()).rstrip(".").replace("|", "\\|")
    metric = "F1" if task.measure is evaluate_answers else "accuracy"
    sizes, shipped = (" / ".join(f"{n:,}" for n in table[name]) for table in (STATED, SHIPPED))
    public = " / ".join(f"{n:,}" for n in task.size)
    cells = [f"`{name}`", prompt, forms(name), task.objective.name, metric, public, sizes, shipped, task.licence]
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("name", TASKS)
def test_the_docs_table_is_the_code(name):
    assert docs_row(name) in (HERE.parent / "docs" / "reference" / "tasks.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", TASKS)
def test_each_sample_states_its_rows_source_and_licence(name):
    folder = _sample_folder(name)
    text = (folder / "README.md").read_text(encoding="utf-8")
    for path in folder.glob("*.jsonl*"):
        assert f"| `{path.name}` | {len(list(read_rows(path))):,} |" in text
    if name != "sst2":
        assert TASKS[name].source in text and f"Licence: {TASKS[name].licence}." in text
