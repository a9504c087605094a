"""Rows become the examples they should, chosen as the protocol says; what cannot be used is named by file and line."""

import gzip
import json
from collections import Counter

import numpy as np
import pytest

from zotune.errors import UsageError
from zotune.llm.config.data import DataOptions
from zotune.llm.data.examples import Example
from zotune.llm.tasks import TASKS, find_task
from zotune.llm.tasks.sst2 import SST2, masked
from zotune.llm.tasks.user_data import load_user_data


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def splits_of(path, **options):
    return load_user_data(DataOptions(train_file=path, **options), None).splits


@pytest.fixture
def source(tmp_path):
    """A task's folder with 2,000 training rows that say their number."""
    write(tmp_path / "train.jsonl", [{"sentence": f"row {i} ", "label": i % 2} for i in range(2000)])
    write(tmp_path / "validation.jsonl", [{"sentence": f"test {i} ", "label": i % 2} for i in range(30)])
    return tmp_path


def numbers(examples):
    return [int(e.prompt.split()[1]) for e in examples]


def test_the_sample_of_sst2_has_the_papers_sizes_and_known_label_counts():
    splits = SST2.splits(DataOptions(task="sst2"), masked=False)
    parts = (splits.train, splits.dev, splits.test)
    assert [len(part) for part in parts] == [1000, 500, 872]
    assert [Counter(e.label for e in part) for part in parts] == [{1: 568, 0: 432}, {1: 290, 0: 210}, {1: 444, 0: 428}]


def test_the_sample_of_sst2_is_the_first_permutation_of_the_public_split():
    from zotune.llm.data.readers import read_rows
    from zotune.llm.tasks.task import _sample_folder

    chosen = np.random.RandomState(0).permutation(67_349)[:1500].tolist()
    found = [r["idx"] for name in ("train", "heldout") for r in read_rows(_sample_folder("sst2") / f"{name}.jsonl")]
    assert found == chosen


def test_a_rendered_example_is_the_papers():
    splits = SST2.splits(DataOptions(task="sst2"), masked=False)
    assert splits.train[0] == Example("very pleasing at its best moments It was", (" terrible", " great"), 1)
    assert splits.test[1] == Example("unflinchingly bleak and desperate It was", (" terrible", " great"), 0)
    row = {"sentence": "dull ", "label": 0}
    assert masked(row) == Example("dull It was", (" terrible", " great"), 0, suffix=".")


@pytest.mark.parametrize("seed", [0, 3])
def test_rows_are_chosen_by_the_protocols_permutation(source, seed):
    options = DataOptions(task="sst2", data_source=str(source), data_seed=seed, num_eval=10)
    splits = SST2.splits(options, masked=False)
    order = np.random.RandomState(seed).permutation(2000)[:1500].tolist()
    assert numbers(splits.train) == order[:1000]
    assert numbers(splits.dev) == order[1000:]
    assert numbers(splits.test) == np.random.RandomState(seed).permutation(30)[:10].tolist()


@pytest.mark.parametrize(("num_train", "num_dev"), [(1500, 500), (2000, 0), (1, 1), (10, 20)])
def test_held_out_rows_are_no_training_rows(source, num_train, num_dev):
    options = DataOptions(task="sst2", data_source=str(source), num_train=num_train, num_dev=num_dev)
    splits = SST2.splits(options, masked=False)
    train, dev = set(numbers(splits.train)), set(numbers(splits.dev))
    assert (len(train), len(dev)) == (num_train, num_dev)
    assert not train & dev


def test_more_rows_than_there_are_are_refused_and_never_cut_silently(source):
    with pytest.raises(UsageError, match=r"1900 training and 500 held-out rows.*has 2000.*Lower --num-train"):
        SST2.splits(DataOptions(task="sst2", data_source=str(source), num_train=1900), masked=False)
    with pytest.raises(UsageError, match=r"1001 training and 500 held-out rows.*has 1500"):
        SST2.splits(DataOptions(task="sst2", num_train=1001), masked=False)
    with pytest.raises(UsageError, match=r"holds no validation.jsonl"):
        (source / "validation.jsonl").unlink()
        SST2.splits(DataOptions(task="sst2", data_source=str(source)), masked=False)


def test_tasks_are_found_by_name_and_misspelt_ones_suggested():
    assert {name: task.name for name, task in TASKS.items()} == {name: name for name in TASKS}
    assert find_task("sst2") is SST2
    with pytest.raises(UsageError, match=r"no task 'sts2'\. Did you mean 'sst2'"):
        find_task("sts2")


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "jsonl.gz", "csv.gz"])
def test_files_of_every_kind_give_the_same_examples(tmp_path, ending):
    rows = [("good, very", "yes"), ('"bad"', "no"), ("größe\nin two lines", "yes")]
    if "json" in ending:
        text = "\n\n".join(json.dumps({"text": t, "label": label}, ensure_ascii=False) for t, label in rows)
    else:
        text = "text,label\n" + "".join('"{}",{}\n'.format(t.replace('"', '""'), label) for t, label in rows)
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(gzip.compress(text.encode()) if ending.endswith("gz") else text.encode())
    splits = splits_of(path, num_dev=0)
    labels = ("no", "yes")
    assert sorted(splits.train, key=lambda e: e.prompt) == sorted(
        (Example(f"{t}\nLabel:", (" no", " yes"), labels.index(label)) for t, label in rows), key=lambda e: e.prompt
    )


def test_templates_take_columns_and_verbalizers_words(tmp_path):
    rows = [{"a": 1, "b": "x", "target": 0}, {"a": 2, "b": "y", "target": 1}]
    path = write(tmp_path / "rows.jsonl", rows)
    splits = splits_of(
        path,
        text_column="b",
        label_column="target",
        template="{a}: {text} ({b}) is",
        verbalizer={"0": "bad", "1": " good "},
        num_dev=0,
    )
    assert set(splits.train) == {
        Example("1: x (x) is", (" bad", " good"), 0),
        Example("2: y (y) is", (" bad", " good"), 1),
    }


def test_user_rows_are_split_without_overlap(tmp_path):
    path = write(tmp_path / "train.jsonl", [{"text": f"row {i}", "label": i % 2} for i in range(23)])
    other = write(tmp_path / "test.jsonl", [{"text": f"test {i}", "label": i % 2} for i in range(5)])
    splits = splits_of(path)
    assert (len(splits.train), len(splits.dev)) == (19, 4)
    assert sorted(numbers(splits.train) + numbers(splits.dev)) == list(range(23))
    assert splits.test == splits.dev
    few = splits_of(path, num_train=10, num_dev=3, data_seed=1, eval_file=other, num_eval=4)
    assert (len(few.train), len(few.dev), len(few.test)) == (10, 3, 4)
    assert not set(numbers(few.train)) & set(numbers(few.dev))
    drawn = sorted(np.random.RandomState(1).permutation(5)[:4])
    assert [e.prompt for e in few.test] == [f"test {i}\nLabel:" for i in drawn]
    assert splits_of(path, data_seed=1).train != splits.train
    with pytest.raises(UsageError, match=r"has 23 rows, too few for 20 to train on and 4 held out"):
        splits_of(path, num_train=20, num_dev=4)
    with pytest.raises(UsageError, match=r"has 23 rows, too few"):
        splits_of(path, num_dev=23)


def test_evaluation_rows_alone_are_enough(tmp_path):
    path = write(tmp_path / "test.jsonl", [{"text": f"test {i}", "label": i % 2} for i in range(5)])
    splits = load_user_data(DataOptions(eval_file=path, num_eval=3), None).splits
    assert (splits.train, splits.dev) == ((), ())
    assert numbers(splits.test) == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ('{"text": "a", "label": 1}\n\n{"text": oops}\n', {}, r"rows.jsonl, line 3: malformed JSON .*column 10"),
        ('{"text": "a", "label": 1}\n[1, 2]\n', {}, r"rows.jsonl, line 2: a row must be an object"),
        (
            '{"txt": "a", "label": 1}\n{"txt": "b", "label": 0}\n',
            {},
            r"rows.jsonl: there is no column 'text'. Did you mean 'txt'\?",
        ),
        (
            '{"text": "a", "label": 1}\n{"text": "b", "lable": 0}\n',
            {},
            r"rows.jsonl, line 2: there is no column 'label'. Did you mean 'lable'\?",
        ),
        (
            '{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n',
            {"template": "{sentense}"},
            r"no column 'sentense'. The columns 'text', 'label' fit no shape",
        ),
        (
            '{"text": "a", "label": 1}\n',
            {"verbalizer": {"yes": "Yes", "no": "No"}},
            r"line 1: the label '1' is not in the verbalizer",
        ),
        ('{"text": "a", "label": "yess"}\n', {"verbalizer": {"yes": "Yes", "no": "No"}}, r"Did you mean 'yes'\?"),
        ('{"text": "a", "label": 1}\n{"text": "b", "label": 1}\n', {}, r"holds 1 different labels; at least two"),
        ("", {}, r"contains no row"),
        ("".join(f'{{"text": "a", "label": {i}}}\n' for i in range(101)), {}, r"101 different labels, too many"),
        ('{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n', {"template": "{text"}, r"template"),
        ('{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n', {"template": "{}"}, r"template"),
        ('{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n', {"template": "{text!q}"}, r"template"),
    ],
)
def test_unusable_rows_are_named(tmp_path, text, options, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        splits_of(path, **options)


def test_unusable_files_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"there is no file .*nothing.jsonl"):
        splits_of(tmp_path / "nothing.jsonl")
    for name in ("rows.parquet.gz", "rows.doc.gz", "rows"):
        (tmp_path / name).write_text("x", encoding="utf-8")
        with pytest.raises(UsageError, match=r"extension must be \.jsonl"):
            splits_of(tmp_path / name)
    for name in ("rows.jsonl", "rows.csv"):
        (tmp_path / name).write_bytes("text,label\ngröße,1\n".encode("latin-1"))
        with pytest.raises(UsageError, match=f"{name}, line 2: not UTF-8 text"):
            splits_of(tmp_path / name)
    (tmp_path / "rows.csv.gz").write_bytes(b"text,label\n")
    with pytest.raises(UsageError, match=r"rows.csv.gz is not a complete gzip file"):
        splits_of(tmp_path / "rows.csv.gz")
