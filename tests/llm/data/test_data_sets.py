"""Data sets of the library `datasets`: folders of `save_to_disk`, and the names of classes."""

import datasets
import pytest
from pyarrow import parquet

from zotune.errors import UsageError
from zotune.llm.api.rows import rows_of
from zotune.llm.config.data import DataOptions
from zotune.llm.data.readers import read_located_rows
from zotune.llm.rows.sources import UserRows
from zotune.llm.tasks.user_data import load_user_data

FEATURES = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])})
ROWS = [{"text": f"row {i}", "label": i % 2} for i in range(6)]


@pytest.fixture(scope="module")
def data():
    return datasets.Dataset.from_list(ROWS, features=FEATURES)


@pytest.fixture
def folder(tmp_path, data):
    datasets.DatasetDict({"train": data, "test": data.select([5, 0])}).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_folder_of_save_to_disk_gives_the_rows_of_its_splits(folder):
    found = list(read_located_rows(folder))
    assert [row.columns["text"] for row in found] == [row["text"] for row in ROWS]
    assert found[2].place == f"{folder}/train, row 3"
    # Rows in another order than the file's.
    assert [row.columns["text"] for row in read_located_rows(folder / "test")] == ["row 5", "row 0"]
    with pytest.raises(UsageError, match=r"saved holds the splits test, train, and none named validation; name the fo"):
        list(read_located_rows(folder, "validation"))
    with pytest.raises(UsageError, match="is a folder, and not one of save_to_disk"):
        list(read_located_rows(folder.parent))


def test_the_names_of_classes_are_the_words_of_labels(folder, data):
    loaded = load_user_data(DataOptions(train_file=folder, num_dev=0), None)
    assert loaded.options.verbalizer == {"0": "bad", "1": "good"}
    assert {(e.prompt[:5], e.candidates[e.label]) for e in loaded.splits.train} == {
        (row["text"], " good" if row["label"] else " bad") for row in ROWS
    }
    # The number is the label, so words of the user's are given for it as for any other file; the name is no column.
    own = load_user_data(DataOptions(train_file=folder, num_dev=0, verbalizer={"0": "no", "1": "yes"}), None)
    assert own.splits.train[0].candidates == (" no", " yes")
    assert not any("not read" in note for note in own.notes)
    given = UserRows(rows_of(data, "train_dataset"))
    options = DataOptions(data_source="memory", num_dev=0)
    assert load_user_data(options, None, given=given).options.verbalizer == {"0": "bad", "1": "good"}


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (None, {"0": "bad", "1": "good"}),
        (b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": ["no"]}}}}', None),
        (b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": [1, 2]}}}}', {"0": "0", "1": "1"}),
        (b'{"info": {"features": {"label": 7}}}', {"0": "0", "1": "1"}),
        (b"[" * 100_000, {"0": "0", "1": "1"}),
        (b"\xff", {"0": "0", "1": "1"}),
    ],
)
def test_a_parquet_file_of_datasets_has_the_names_of_its_classes(tmp_path, data, features, words):
    path = tmp_path / "rows.parquet"
    data.to_parquet(path)
    if features is not None:
        table = parquet.read_table(path)
        parquet.write_table(table.replace_schema_metadata({"huggingface": features}), path)
    options = DataOptions(train_file=path, num_dev=0)
    if words is None:  # fewer names than numbers
        with pytest.raises(
            UsageError, match=r"rows\.parquet, row 2: the column 'label' is 1, which stands for no class"
        ):
            load_user_data(options, None)
    else:
        assert load_user_data(options, None).options.verbalizer == words


def test_a_row_without_a_class_is_refused_by_its_place(tmp_path, data):
    data.add_item({"text": "unknown", "label": -1}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UsageError, match=r"saved, row 7: the column 'label' is -1, which stands for no class"):
        load_user_data(DataOptions(train_file=tmp_path / "saved", num_dev=0), None)


def test_a_damaged_folder_is_read_or_refused_by_name(folder):
    (arrow,) = (folder / "train").glob("*.arrow")
    whole = arrow.read_bytes()
    for at in range(0, len(whole), 37):
        arrow.write_bytes(whole[:at] + b"\xff\xff\xff\x7f" + whole[at + 4 :])
        try:
            assert len(list(read_located_rows(folder))) <= 6
        except UsageError as error:
            assert str(folder) in str(error)
    arrow.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="not a valid folder of save_to_disk"):
        list(read_located_rows(folder))
    arrow.write_bytes(whole)
    (folder / "train" / "state.json").write_text("[]")
    with pytest.raises(UsageError, match="not a valid folder of save_to_disk"):
        list(read_located_rows(folder))


@pytest.mark.parametrize(("variable", "bound"), [("ZOTUNE_MAX_ROWS", 5), ("ZOTUNE_MAX_DATA_VALUES", 9)])
def test_a_folder_is_bounded(folder, monkeypatch, variable, bound):
    monkeypatch.setenv(variable, str(bound))
    with pytest.raises(UsageError, match=variable):
        list(read_located_rows(folder))
