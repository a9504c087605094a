"""Rows that a small file makes large are refused before the memory is taken; the message says which bound and how."""

import gzip
import json
import tracemalloc

import pyarrow as pa
import pytest
from pyarrow import parquet

from zotune.errors import UsageError
from zotune.llm.config.data import DataOptions
from zotune.llm.data.chat_template import ChatTemplate
from zotune.llm.data.readers import LocatedRow, read_located_rows, read_rows
from zotune.llm.data.row_bounds import one_row_at_a_time
from zotune.llm.rows.shapes import SHAPES
from zotune.llm.rows.templates import template_columns

MIB = 1 << 20


def refused(path, num_bytes=200 * MIB, *, limit, variable):
    """The refusal of a file's rows, within so many bytes more memory than the process has."""
    with limit(num_bytes), pytest.raises(UsageError, match=f"set the environment variable {variable} to") as caught:
        for _ in read_located_rows(path):
            pass
    return str(caught.value)


def packed(path, *parts):
    """A gzip file of parts, each so many times, written without holding them all."""
    with gzip.open(path, "wb", compresslevel=1) as file:
        for part, times in parts:
            for _ in range(times):
                file.write(part)
    return path


def test_a_line_of_many_values_is_refused(tmp_path, little_memory):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": [' + "{}," * 5_000_000 + "{}]}")  # would take half a gigabyte
    said = refused(path, limit=little_memory, variable="ZOTUNE_MAX_ROW_VALUES")
    assert "a.jsonl, line 1" in said


@pytest.mark.parametrize(
    ("kind", "part"), [("jsonl", b" "), ("jsonl", b'{"text":"'), ("csv", b'"a\n",'), ("csv", b"a,")]
)
def test_a_row_without_end_is_read_no_further_than_its_bound(tmp_path, little_memory, monkeypatch, kind, part):
    monkeypatch.setenv("ZOTUNE_MAX_ROW_LENGTH", "100000")
    path = packed(tmp_path / f"a.{kind}.gz", (b'{"text": "' if kind == "jsonl" else b"", 1), (part * 20_000, 500))
    assert path.stat().st_size < 2 * MIB
    tracemalloc.start()
    try:
        refused(path, limit=little_memory, variable="ZOTUNE_MAX_ROW_LENGTH")
        assert tracemalloc.get_traced_memory()[1] < 20 * MIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("variable", "bound"), [("ZOTUNE_MAX_ROWS", 30), ("ZOTUNE_MAX_DATA_BYTES", 400), ("ZOTUNE_MAX_DATA_VALUES", 60)]
)
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_all_rows_together_are_bounded_and_the_bound_can_be_raised(tmp_path, monkeypatch, variable, bound, kind):
    path, rows = tmp_path / f"a.{kind}", [{"a": i, "b": "word word"} for i in range(50)]
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "csv":
        path.write_text("a,b\n" + "".join(f"{row['a']},{row['b']}\n" for row in rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(list(read_rows(path))) == 50
    monkeypatch.setenv(variable, str(bound))
    with pytest.raises(UsageError, match=f"{bound} .*{variable}"):
        list(read_rows(path))
    monkeypatch.setenv(variable, "100000000")
    assert len(list(read_rows(path))) == 50


def test_a_parquet_file_of_endless_rows_is_refused_by_what_it_states(tmp_path, little_memory, monkeypatch):
    monkeypatch.setattr("zotune.llm.data.readers.parquet._parquet_batches", lambda *args: pytest.fail("rows were read"))
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": pa.nulls(5_000_000, pa.string())}), path)
    assert path.stat().st_size < 20_000
    refused(path, limit=little_memory, variable="ZOTUNE_MAX_ROWS")


@pytest.mark.parametrize("variable", ["ZOTUNE_MAX_ROWS", "ZOTUNE_MAX_DATA_VALUES"])
def test_a_parquet_file_of_more_rows_than_are_held_is_read_a_row_at_a_time(tmp_path, monkeypatch, variable):
    parquet.write_table(pa.table({"text": ["word"] * 600}), tmp_path / "a.parquet")
    monkeypatch.setenv(variable, "500")
    with one_row_at_a_time():
        assert len(list(read_rows(tmp_path / "a.parquet"))) == 600
    with pytest.raises(UsageError, match=variable):
        next(read_rows(tmp_path / "a.parquet"))


def varint(number):
    """A number as Parquet's footer (Thrift's compact protocol) writes it."""
    number, out = number << 1, b""
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


@pytest.mark.parametrize("is_honest", [True, False])
def test_a_parquet_row_of_endless_values_is_refused_whatever_it_states(tmp_path, monkeypatch, is_honest):
    """One row, a list of two million zeros, in 600 bytes; the other file says that they are ten."""
    path, count = tmp_path / "a.parquet", 2_000_000
    parquet.write_table(pa.table({"text": pa.array([[0] * count], pa.list_(pa.int8()))}), path, compression="zstd")
    content = path.read_bytes()
    assert len(content) < 1000
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    footer = content[start:-8]
    if not is_honest:
        footer = footer.replace(varint(count), varint(10))
        path.write_bytes(content[:start] + footer + len(footer).to_bytes(4, "little") + b"PAR1")
        stated = parquet.ParquetFile(path).metadata.row_group(0).column(0).num_values
        assert stated == 10
    monkeypatch.setenv("ZOTUNE_MAX_DATA_VALUES", "1000000")
    with pytest.raises(UsageError, match="ZOTUNE_MAX_DATA_VALUES"):
        list(read_rows(path))


def test_a_text_that_stands_for_many_is_refused(tmp_path, monkeypatch):
    """A dictionary of arrow: the rows name one long text, which would be copied for each."""
    path, text = tmp_path / "a.parquet", "x" * MIB
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 4000, pa.int32()), pa.array([text]))
    parquet.write_table(pa.table({"text": column}), path, compression="zstd")
    assert path.stat().st_size < MIB // 8
    monkeypatch.setenv("ZOTUNE_MAX_DATA_BYTES", str(100 * MIB))
    with pytest.raises(UsageError, match="ZOTUNE_MAX_DATA_BYTES"):
        list(read_rows(path))


@pytest.mark.parametrize("template", ["{t:99999999999}", "{t:>99999999999}", "{t:.99999999999}", "{t:0999999}"])
def test_a_template_of_endless_width_is_refused(template, little_memory):
    with little_memory(100 * MIB), pytest.raises(UsageError, match="ZOTUNE_MAX_WIDTH"):
        template_columns(template)


def test_a_row_chooses_no_width():
    with pytest.raises(UsageError, match="names a column"):
        template_columns("{text:{width}} {width}")
    assert template_columns("{text:>8}{n:.3}") == ("text", "n")


def test_a_template_that_repeats_a_column_is_bounded(little_memory):
    options = DataOptions(eval_file="a", template="{prompt}" * 10_000, data_format="completion")
    row = LocatedRow("a.jsonl, line 1", {"prompt": "x" * 100_000, "completion": "y"})
    with little_memory(100 * MIB), pytest.raises(UsageError, match=r"line 1: the prompt.*ZOTUNE_MAX_ROW_LENGTH"):
        SHAPES["completion"].to_record(row, options)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 300000000 }}",
        "{{ '%09999999999d' % 7 }}",
        "{{ 'x'.ljust(9999999999) }}",
        "{% set n = namespace(s='x' * 999) %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    ],
)
def test_a_chat_template_of_endless_text_is_refused(tiny, monkeypatch, template):
    monkeypatch.setenv("ZOTUNE_MAX_CHAT_MEMORY", str(100 * MIB))
    tokenizer = tiny("llama").tokenizer
    tokenizer.chat_template = template
    with pytest.raises(UsageError, match=r"ZOTUNE_MAX_CHAT_MEMORY|chat template rejects"):
        ChatTemplate(tokenizer).opening_answer([{"role": "user", "content": "hi"}])
