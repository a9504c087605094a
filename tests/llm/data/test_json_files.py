"""JSON in each of its forms gives the rows that `json` gives of the whole text, wherever its parts are cut."""

import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zotune.errors import UsageError
from zotune.llm.data.readers import json_files, read_located_rows, read_rows
from zotune.llm.data.row_bounds import RowBounds

MIB = 1 << 20
# Characters at which a part may be cut in two: quotes, escapes, brackets, line ends, surrogate pairs.
TEXT = st.text(st.sampled_from('a"\\/[]{},: \n\té👋'), max_size=8)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(st.dictionaries(TEXT, VALUE, max_size=3), max_size=5)
FORMS = {
    "list": lambda rows, indent, ascii: json.dumps(rows, indent=indent, ensure_ascii=ascii),
    "objects": lambda rows, indent, ascii: "\n\n".join(json.dumps(r, indent=2, ensure_ascii=ascii) for r in rows),
    "lines": lambda rows, indent, ascii: "\n".join(json.dumps(r, ensure_ascii=ascii) for r in rows),
}


@settings(max_examples=80, deadline=None)
@given(
    rows=ROWS,
    form=st.sampled_from(sorted(FORMS)),
    indent=st.sampled_from([None, 1, 4, "\t"]),
    ascii=st.booleans(),
    part=st.integers(20, 60),
    ends=st.sampled_from(["\n", "\r\n"]),
)
def test_rows_are_those_of_json_wherever_the_text_is_cut(rows, form, indent, ascii, part, ends):
    text = FORMS[form](rows, indent, ascii).replace("\n", ends)
    before, json_files._PART = json_files._PART, part
    try:
        # As if the form were known: the beginning of a file is longer than these.
        if form == "lines":
            found = list(json_files.read_json_file(io.StringIO(text, newline=""), Path("a.jsonl"), RowBounds("a")))
        else:
            found = list(json_files._values(io.StringIO(text, newline=""), Path("a.json"), RowBounds("a")))
    finally:
        json_files._PART = before
    assert [row.columns for row in found] == rows
    lines = text.split("\n")
    for row in found:
        number = int(row.place.split("line ")[1].split(" ")[0])
        assert "{" in lines[number - 1]


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.json", '[{"a": 1}, {"a": 2}]', 2),
        ("a.jsonl", ' \n[\n{"a": 1},\n{"a": 2}\n]\n', 2),
        ("a.json", "[]", 0),
        ("a.json", '{\n "a": 1\n}\n{\n "a": 2}', 2),
        ("a.json", '{"a": 1}\n{"a": 2}\n', 2),
        ("a.json", '{"a": 1}', 1),
        ("a.json", '\ufeff[{"a": NaN}]', 1),
        ("a.json", "", 0),
    ],
)
def test_the_form_is_found(tmp_path, name, content, rows):
    (tmp_path / name).write_bytes(content.encode())
    assert len(list(read_rows(tmp_path / name))) == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"a": 1},\n {"a": 2,\n  "b": }]', "line 2 (row 2): malformed JSON (Expecting value in line 3)"),
        ("a.json", '[{"a": 1},\n {"a": 2},\n]', "line 3 (row 3): malformed JSON"),
        ("a.json", '[{"a": 1}\n', "line 2: malformed JSON (after row 1 must come a comma and another row, or the list"),
        ("a.json", '[{"a": 1}]\n{"a": 2}', "line 2: malformed JSON (there is text after the end of the list)"),
        ("a.json", '[{"a": 1},\n 7]', 'line 2 (row 2): a row must be an object {"column": value, …}, got 7'),
        ("a.json", '[{"a": 1},\n {"a": 2, "a": 3}]', "line 2 (row 2): unusable JSON (the key 'a' appears twice)"),
        ("a.json", '[{"a": "x]', "line 1 (row 1): malformed JSON (Unterminated string"),
        ("a.json", '{\n "a": 1,\n "b" 2\n}', "line 1 (row 1): malformed JSON (Expecting ':' delimiter in line 3)"),
        ("a.jsonl", '{"a": 1,\n"b": 2}\n', "line 1: malformed JSON"),
    ],
)
def test_what_is_wrong_is_said_by_line_and_row(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, "utf-8")
    with pytest.raises(UsageError) as caught:
        list(read_rows(tmp_path / name))
    assert f"{tmp_path / name}, {message}" in str(caught.value)


def test_a_long_list_on_one_line_is_read_a_row_at_a_time(tmp_path, little_memory):
    """Twenty megabytes of rows, of which the reader holds a part."""
    path, row = tmp_path / "a.json", json.dumps({"text": "word " * 2000})
    path.write_text("[" + ",".join([row] * 2000) + "]", "ascii")
    with little_memory(10 * MIB):
        assert sum(len(found["text"]) for found in read_rows(path)) == 2000 * 10_000


@pytest.mark.parametrize(
    ("part", "times", "variable"),
    [('"' + "a" * 100, 200_000, "ZOTUNE_MAX_ROW_LENGTH"), ("[{},", 500_000, "ZOTUNE_MAX_ROW_VALUES")],
)
def test_a_row_of_a_list_is_bounded(tmp_path, little_memory, monkeypatch, part, times, variable):
    monkeypatch.setenv("ZOTUNE_MAX_ROW_VALUES", "100000")
    path = tmp_path / "a.json"
    path.write_text('[{"a": ' + part[0] + part[1:] * times, "ascii")
    with little_memory(100 * MIB), pytest.raises(UsageError, match=rf"line 1 \(row 1\): .*{variable}"):
        list(read_located_rows(path))
