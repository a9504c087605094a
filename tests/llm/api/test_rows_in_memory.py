"""Every kind of rows in memory is read as the same rows in a file are; streams are bounded; the rest is refused."""

import itertools
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from zotune.errors import UsageError
from zotune.llm.api import rows as rows_module
from zotune.llm.api.rows import rows_of
from zotune.llm.data.readers import read_rows

ROWS = [{"text": text, "label": i % 2, "score": None if i == 1 else i / 2} for i, text in enumerate("abcde")]


class MapStyle(torch.utils.data.Dataset):
    def __len__(self):
        return len(ROWS)

    def __getitem__(self, i):
        return ROWS[i]


KINDS = {
    "list": lambda: ROWS,
    "tuple": lambda: tuple(ROWS),
    "generator": lambda: (row for row in ROWS),
    "Dataset": lambda: datasets.Dataset.from_list(ROWS),
    "NumPy's Dataset": lambda: datasets.Dataset.from_list(ROWS).with_format("numpy"),
    "torch's Dataset": lambda: datasets.Dataset.from_list(ROWS).with_format("torch"),
    "IterableDataset": lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    "map style": MapStyle,
    "scalars": lambda: [
        {**row, "label": np.int64(row["label"]), "score": torch.tensor(np.nan if i == 1 else row["score"])}
        for i, row in enumerate(ROWS)
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_in_memory_are_those_of_a_file(kind, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    found = rows_of(KINDS[kind](), "train_dataset").rows
    assert [row.columns for row in found] == list(read_rows(file))
    assert [type(row.columns["label"]) for row in found] == [int] * 5
    assert found[2].place == "train_dataset[2]"
    assert [row.columns for row in rows_of(file, "train_dataset").rows] == ROWS
    assert rows_of(str(file), "train_dataset").rows[2].place == f"{file}, line 3"


def test_class_numbers_have_their_names_beside_them():
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    data = datasets.Dataset.from_dict({"text": ["x"], "label": [1]}, features=features)
    assert rows_of(data, "rows").rows[0].columns == {"text": "x", "label": 1, "label_name": "good"}


def test_of_a_stream_only_the_rows_that_are_asked_for_are_read(capsys):
    endless = ({"text": str(i)} for i in itertools.count())
    assert [row.columns["text"] for row in rows_of(endless, "train_dataset", 3).rows] == ["0", "1", "2"]
    assert next(endless) == {"text": "3"}
    assert "its first 3 rows are read" in capsys.readouterr().err


def test_a_stream_without_an_end_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr(rows_module, "MAX_STREAMED_ROWS", 50)
    endless = ({"text": str(i)} for i in itertools.count())
    with pytest.raises(
        UsageError, match=r"more than 50 rows.*with num_train, pass dataset\.take\(N\), or give streaming"
    ):
        rows_of(endless, "train_dataset")
    assert next(endless) == {"text": "51"}
    # A list of any length is there already.
    assert len(rows_of([{"text": "x"}] * 60, "train_dataset").rows) == 60


REFUSED = {
    "splits": (lambda: datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)), r"dataset\[\"train\"\]"),
    "columns": (lambda: {"text": ["a"], "label": [0]}, r"Dataset\.from_dict"),
    "texts": (lambda: ["a", "b"], r"train_dataset\[0\] is a str; a row must be a dict.*\"text\": text"),
    "number": (lambda: 3, "it must be a list of dicts"),
    "loader": (lambda: torch.utils.data.DataLoader(MapStyle()), "yields batches, not rows: pass its dataset"),
    "tokens": (lambda: [{"input_ids": [1], "labels": [1]}], "is tokenised already"),
    "names": (lambda: [{1: "a"}], "has a name that is no text"),
    "no file": (lambda: Path("absent.jsonl"), "there is no file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_rows_is_refused_in_words(name):
    make, words = REFUSED[name]
    with pytest.raises(UsageError, match=words):
        rows_of(make(), "train_dataset")
