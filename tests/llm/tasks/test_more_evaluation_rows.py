"""Further evaluation rows are training rows that no run trains on, the same ones from every source."""

import json
from pathlib import Path

import pytest

from zotune.errors import UsageError
from zotune.llm.config.data import DataOptions
from zotune.llm.config.schema import validate
from zotune.llm.data.readers import read_rows
from zotune.llm.tasks import TASKS

DATA = Path(__file__).parents[3] / "data"


def splits(**options):
    return TASKS["sst2"].splits(DataOptions(task="sst2", **options), masked=False)


def test_they_stand_behind_the_tasks_own_and_are_neither_trained_on_nor_held_out():
    plain, more = splits(num_eval=872), splits(num_eval=872, num_more_eval=5000)
    assert more.test[:872] == plain.test and len(more.test) == 5872
    assert (more.train, more.dev) == (plain.train, plain.dev)
    used = {example.prompt for example in (*more.train, *more.dev, *plain.test)}
    assert not used & {example.prompt for example in more.test[872:]}
    assert splits(num_eval=0, num_more_eval=7).test == more.test[872:879]
    assert splits(num_train=1000, num_dev=500).test == plain.test


def test_a_folder_of_the_public_splits_gives_the_same_rows_however_few_are_trained_on(tmp_path):
    """The sample's rows in the places where the public training split has them."""
    import numpy as np

    parts = [list(read_rows(DATA / "sst2" / name)) for name in ("train.jsonl", "heldout.jsonl", "unused.jsonl.gz")]
    rows = [row for part in parts for row in part]
    order = np.random.RandomState(0).permutation(len(rows))
    public = dict(zip(order, rows, strict=True))
    lines = "".join(json.dumps(public[i]) + "\n" for i in range(len(rows)))
    (tmp_path / "train.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "validation.jsonl").write_text(lines.splitlines()[0] + "\n", encoding="utf-8")
    for sizes in ({}, {"num_train": 100, "num_dev": 10}):
        found = splits(data_source=str(tmp_path), num_eval=0, num_more_eval=50, **sizes)
        assert found.test == splits(num_eval=0, num_more_eval=50).test


def test_more_than_there_are_and_rows_of_ones_own_are_refused():
    with pytest.raises(UsageError, match=r"sst2: 5001 further evaluation rows.*'sample' has 5000.*--num-more-eval"):
        splits(num_more_eval=5001)
    with pytest.raises(UsageError, match="num_more_eval applies to tasks only"):
        validate(DataOptions, {"train_file": "mine.jsonl", "num_more_eval": 5}, "test")
