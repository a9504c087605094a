"""Readers give the rows that were written or say by file and line what is wrong: never a crash, never a wrong row."""

import csv
import gzip
import io
import json
import math
import os
from pathlib import Path

import datasets
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from zotune.errors import UsageError
from zotune.llm.data.readers import read_located_rows, read_rows

FUZZ = settings(
    max_examples=int(os.environ.get("ZOTUNE_FUZZ", "60")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

TEXT = st.text(st.characters(codec="utf-8"), max_size=30)
NAMES = st.lists(TEXT, min_size=2, max_size=4, unique=True)


def read(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_located_rows(path))


def refusal(path, content):
    with pytest.raises(UsageError) as caught:
        read(path, content)
    return str(caught.value).replace(str(path.parent) + "/", "")


def as_csv(names, rows):
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(names)
    writer.writerows(rows)
    return out.getvalue()


@st.composite
def tables(draw):
    names = draw(NAMES)
    return names, draw(st.lists(st.lists(TEXT, min_size=len(names), max_size=len(names)), max_size=5))


@FUZZ
@given(table=tables(), packed=st.booleans(), bom=st.booleans())
def test_what_is_written_as_csv_is_read_again(tmp_path, table, packed, bom):
    names, rows = table
    content = (("\ufeff" if bom else "") + as_csv(names, rows)).encode()
    path = tmp_path / ("rows.csv.gz" if packed else "rows.csv")
    found = read(path, gzip.compress(content) if packed else content)
    if not bom and names[0].startswith("\ufeff"):
        names = [names[0].removeprefix("\ufeff"), *names[1:]]
    assert [row.columns for row in found] == [dict(zip(names, row, strict=True)) for row in rows]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@FUZZ
@given(rows=st.lists(st.dictionaries(TEXT, JSON, max_size=4), max_size=5), end=st.sampled_from(["\n", "\r\n", "\n\n"]))
def test_what_is_written_as_json_lines_is_read_again(tmp_path, rows, end):
    found = read(tmp_path / "rows.jsonl", end.join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert [row.columns for row in found] == rows


@FUZZ
@given(
    rows=st.lists(
        st.fixed_dictionaries({"text": st.none() | TEXT, "n": st.none() | st.floats()}), min_size=1, max_size=5
    )
)
def test_what_is_written_as_parquet_is_read_again(tmp_path, rows):
    schema = pyarrow.schema([("text", pyarrow.string()), ("n", pyarrow.float64())])
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), path)
    missing = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in rows]
    assert [row.columns for row in read_located_rows(path)] == missing
    assert [row.place for row in read_located_rows(path)] == [f"{path}, row {i}" for i in range(1, len(rows) + 1)]


SOUND = {
    "rows.jsonl": '{"text": "größe 👋", "label": 1}\n{"text": "b", "label": [0, {"a": null}]}\n'.encode(),
    "rows.csv": 'text,label\n"größe, 👋",1\n"two\nlines",0\n'.encode(),
}
SOUND |= {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in SOUND.items()}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": ["größe 👋", "b"] * 20, "label": [1, 0] * 20}), path)
    return {**SOUND, "rows.parquet": path.read_bytes()}


@pytest.mark.parametrize("name", [*SOUND, "rows.parquet"])
@FUZZ
@given(data=st.data())
def test_a_file_with_broken_bytes_is_read_or_refused_by_name(tmp_path, sound, name, data):
    content = bytearray(sound[name])
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    try:
        rows = read(tmp_path / name, bytes(content))
    except UsageError as error:
        assert name in str(error)
    else:
        assert all(isinstance(row.columns, dict) and name in row.place for row in rows)


def test_text_of_a_parquet_file_that_is_not_utf_8_is_refused_by_name(tmp_path):
    parquet.write_table(pyarrow.table({"text": ["größe", "b"]}), tmp_path / "whole.parquet", compression="none")
    content = (tmp_path / "whole.parquet").read_bytes().replace("größe".encode(), b"gr\xc3\x9f\x9f\xc3e")
    with pytest.raises(UsageError, match=r"rows\.parquet, after row 0: not a valid Parquet file \(.*utf-8"):
        read(tmp_path / "rows.parquet", content)


@FUZZ
@given(content=st.binary(max_size=200), name=st.sampled_from([*SOUND, "rows.parquet"]))
def test_any_bytes_are_read_or_refused_by_name(tmp_path, content, name):
    try:
        read(tmp_path / name, content)
    except UsageError as error:
        assert name in str(error)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\na,1\nb\n", "a.csv, line 3: 1 cells, but the header names 2 columns"),
        ("a.csv", "text,label\n\n\na,1,2\n", "a.csv, line 4: 3 cells, but the header names 2 columns"),
        ("a.csv", 'text,label\n"a\nb",1\nc,d,e\n', "a.csv, line 4: 3 cells"),
        ("a.csv", 'text,label\n"a,1\nb,2\n', "a.csv, line 2: malformed CSV"),
        ("a.csv", 'text,label\n"a"b,1\n', "a.csv, line 2: malformed CSV"),
        ("a.csv", "text,text\na,b\n", "a.csv, line 1: two columns are named 'text'"),
        ("a.csv", b"text,label\na,1\n\xff,2\n", "a.csv, line 3: not UTF-8 text"),
        ("a.csv", "text,label\na,1\n".encode("utf-16"), "a.csv, line 1: not UTF-8 text"),
        ("a.csv.gz", gzip.compress(b"text,label\na,1\n" * 99, mtime=0)[:-9], "a.csv.gz is not a complete gzip file"),
        ("a.csv.gz", b"text,label\n", "a.csv.gz is not a complete gzip file"),
        ("a.jsonl", '{"a": 1}\n{"a": 1, "a": 2}\n', "a.jsonl, line 2: unusable JSON (the key 'a' appears twice)"),
        ("a.jsonl", '{"a": 1}\r\n{"a": }\r\n', "a.jsonl, line 2: malformed JSON"),
        ("a.jsonl", "[" * 100_000, "a.jsonl, line 1 (row 1): unusable JSON"),
        ("a.jsonl", '{"a": ' + "9" * 5000 + "}", "a.jsonl, line 1: unusable JSON"),
        ("a.json", '[\n{"a": 1}\n{"a": 2}]\n', "a.json, line 3: malformed JSON (after row 1 must come a comma"),
        ("a.jsonl", '{"a": ' + "[" * 300 + "]" * 300 + "}\n", "a.jsonl, line 1: values are nested more than 64 deep"),
        ("a.jsonl", '{"a": ' + '{"b": ' * 64 + "[1]" + "}" * 65 + "\n", "a.jsonl, line 1: values are nested more than"),
        ("a.jsonl", '{"a": 1}{"a": 2}\n', "a.jsonl, line 1: malformed JSON"),
        ("a.parquet", b"PAR1 no PAR1", "a.parquet, after row 0: not a valid Parquet file"),
        ("a.xlsx", "a\tb\n", "the extension must be .jsonl"),
    ],
)
def test_what_is_wrong_is_said_by_file_and_line(tmp_path, name, content, message):
    assert message in refusal(tmp_path / name, content)


def test_places_are_the_lines_where_rows_begin(tmp_path):
    found = read(tmp_path / "a.csv", 'text,label\r\n"one\r\ntwo",1\r\n\r\nb,0\r\n')
    assert [row.place.rpartition(", ")[2] for row in found] == ["line 2", "line 5"]
    assert found[0].columns == {"text": "one\r\ntwo", "label": "1"}
    found = read(tmp_path / "a.jsonl", '\ufeff{"a": 1}\n\n{"a": NaN}\n')
    assert [(r.place.rpartition(", ")[2], r.columns) for r in found] == [("line 1", {"a": 1}), ("line 3", {"a": None})]


@pytest.fixture
def usual_limit():
    """The longest cell that `csv` reads by default, for other code of the process too."""
    before = csv.field_size_limit(131_072)
    yield
    csv.field_size_limit(before)


def test_a_cell_may_be_long(tmp_path, usual_limit):
    long = "word " * 60_000
    assert read(tmp_path / "a.csv", f"text,label\n{long},1\n")[0].columns["text"] == long
    assert list(read_rows(tmp_path / "a.csv")) == [{"text": long, "label": "1"}]
    csv.field_size_limit(2**31)
    assert len(list(read_rows(tmp_path / "a.csv"))) == 1
    assert csv.field_size_limit() == 2**31


def test_cells_may_be_long_in_a_file_that_is_read_beside_one_that_ends_before(tmp_path, usual_limit):
    long = "x" * 200_000
    (tmp_path / "a.csv").write_text("text,label\na,0\nb,1\n")
    (tmp_path / "b.csv").write_text(f"text,label\na,0\n{long},1\n")
    short_rows, long_rows = (read_rows(tmp_path / name) for name in ("a.csv", "b.csv"))
    found = [next(short_rows), next(long_rows)]
    assert len(list(short_rows)) == 1
    assert found[0] == found[1]
    assert [row["text"] for row in long_rows] == [long]


@pytest.mark.parametrize("content", ["", "\n\n", "text,label\n", "text,label\r\n\r\n"])
def test_a_file_without_rows_has_none(tmp_path, content):
    assert read(tmp_path / "a.csv", content) == []


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("hub:me/mine", ("me/mine", None, "train")),
        ("hub:me/mine:test", ("me/mine", None, "test")),
        ("hub:me/mine/small:test", ("me/mine", "small", "test")),
        ("hub:squad", ("squad", None, "train")),
    ],
)
def test_data_sets_of_the_hub_are_asked_for_by_name_configuration_and_split(tmp_path, monkeypatch, source, asked):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    data = datasets.Dataset.from_list([{"text": "a", "label": 1}, {"text": "b", "label": -1}], features=features)
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, split: calls.append((*args, split)) or data)
    found = list(read_located_rows(Path(source)))
    assert calls == [asked]
    assert [row.columns["label_name"] for row in found] == ["yes", None]
    assert found[1].place == f"{source.removesuffix(':test')}:{asked[2]}, row 2"


def test_a_data_set_that_cannot_be_had_is_named(monkeypatch):
    def nothing(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", nothing)
    with pytest.raises(UsageError, match=r"the data set me/mine could not be loaded from the Hub: no network"):
        list(read_located_rows(Path("hub:me/mine")))
    for name in ("hub:", "hub:a/b/c/d", "hub:a/"):
        with pytest.raises(UsageError, match="is not the name of a data set"):
            # A path drops a last slash, so the text itself is what is read.
            from zotune.llm.data.readers.data_sets import read_hub

            list(read_hub(name.removeprefix("hub:"), "train"))
