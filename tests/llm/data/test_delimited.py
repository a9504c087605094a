"""What separates the cells is found where a header tells it, and a plain CSV file is never read as something else."""

import csv
import io

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zotune.errors import UsageError
from zotune.llm.api.rows import rows_of
from zotune.llm.config.data import DataOptions
from zotune.llm.data.readers import read_located_rows, read_rows
from zotune.llm.data.readers.delimited import DELIMITERS, find_delimiter
from zotune.llm.rows.sources import read_files
from zotune.llm.tasks.user_data import load_user_data

CELL = st.text(st.sampled_from('ab;,|\t"\n 1'), max_size=6)
NAME = st.text(st.sampled_from("abc_ ;|"), min_size=1, max_size=5)
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def tables(draw, delimiter=",", cell=CELL, name=NAME):
    columns = draw(st.integers(2, 4))
    row = st.lists(cell, min_size=columns, max_size=columns)
    header = draw(st.lists(name, min_size=columns, max_size=columns, unique=True))
    out = io.StringIO(newline="")
    rows = draw(st.lists(row, max_size=6))
    csv.writer(out, delimiter=delimiter).writerows([header, *rows])
    return out.getvalue(), [dict(zip(header, row, strict=True)) for row in rows]


@QUICK
@given(table=tables())
def test_a_plain_csv_file_is_read_as_one(tmp_path, table):
    (tmp_path / "a.csv").write_bytes(table[0].encode())
    assert list(read_rows(tmp_path / "a.csv")) == table[1]


PLAIN_NAME = st.text(st.sampled_from("abc_ "), min_size=1, max_size=5)
WORD = st.text(st.sampled_from("ab;| \t"), max_size=8)


@QUICK
@given(name=PLAIN_NAME, cells=st.lists(WORD, max_size=6))
def test_a_csv_file_of_one_column_is_read_as_one_whatever_its_cells_hold(name, cells):
    out = io.StringIO(newline="")
    csv.writer(out, quoting=csv.QUOTE_MINIMAL).writerows([[name], *([cell] for cell in cells)])
    assert find_delimiter(out.getvalue(), is_whole=True) == ","


@pytest.mark.parametrize("delimiter", [d for d in DELIMITERS if d != ","])
def test_another_delimiter_is_found_in_any_table_whose_header_has_no_comma(tmp_path, delimiter):
    path = tmp_path / "a.csv"

    @QUICK
    @given(table=tables(delimiter, name=PLAIN_NAME))
    def check(table):
        path.write_bytes(("\ufeff" + table[0]).encode())
        assert list(read_rows(path)) == table[1]

    check()


@pytest.mark.parametrize(
    ("name", "content", "delimiter", "rows"),
    [
        ("a.csv", '"text";"label"\r\n"good; very";1\r\n', None, [{"text": "good; very", "label": "1"}]),
        ("a.csv", "sep=;\r\ntext;label\r\na,b;1\r\n", None, [{"text": "a,b", "label": "1"}]),
        ("a.tsv", "text\tlabel\na, b; c\t1\n", None, [{"text": "a, b; c", "label": "1"}]),
        ("a.tsv", "text\na, b\n", None, [{"text": "a, b"}]),
        ("a.csv", "text, long;label\na;1\n", ";", [{"text, long": "a", "label": "1"}]),
        ("a.csv", "text^label\na^1\n", "^", [{"text": "a", "label": "1"}]),
        # A header of one column that has a semicolon, and rows that have none.
        ("a.csv", "good;bad\nfine\n", None, [{"good;bad": "fine"}]),
        ("a.csv", "a;a\n1;2\n", None, [{"a;a": "1;2"}]),
    ],
)
def test_what_separates_the_cells_is_told_or_found(tmp_path, name, content, delimiter, rows):
    (tmp_path / name).write_text(content, "utf-8", newline="")
    assert [row.columns for row in read_located_rows(tmp_path / name, delimiter=delimiter)] == rows


def test_a_file_that_is_cut_into_parts_is_found_by_its_beginning(tmp_path, monkeypatch):
    """The part ends within quotes, and within a row."""
    text = "text;label\n" + '"one; two\nthree";1\n' * 40
    for stop in range(12, 120):
        assert find_delimiter(text[:stop], is_whole=False) == ";", text[:stop]


def test_a_row_with_another_number_of_cells_is_told_what_may_separate_them(tmp_path):
    (tmp_path / "a.csv").write_text("text, long;label\na;1\n", "utf-8")
    with pytest.raises(UsageError, match=r"a\.csv, line 2: 1 cells.* If semicolons separate the cells"):
        list(read_rows(tmp_path / "a.csv"))


def test_the_delimiter_is_an_option_of_the_commands(zotune, short, tmp_path):
    rows = "".join(f"{text}^{label}\n" for text, label in [("good", 1), ("bad", 0)] * 4)
    (tmp_path / "a.csv").write_text(f"text^label\n{rows}", "utf-8")
    options = DataOptions(train_file=tmp_path / "a.csv", num_dev=0, delimiter="^")
    note = load_user_data(options, None).notes[0]
    assert "(data_format: classification), separated by '^'; labels '0' → '0'" in note
    for wrong in ("ab", '"', ""):
        said = zotune(*short("--train-file", tmp_path / "a.csv", "--delimiter", wrong))
        assert said.code == 2 and "one character" in said.err
    with pytest.raises(UsageError, match=r"delimiter has no effect on a\.jsonl; it is for \.csv and \.tsv files"):
        read_files(DataOptions(train_file="a.jsonl", delimiter=";"))
    assert len(rows_of(tmp_path / "a.csv", "train_dataset", delimiter="^").rows) == 8
    assert DataOptions(train_file="a.csv", delimiter="tab").delimiter == "\t"
