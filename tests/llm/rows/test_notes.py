"""What the user is told about rows that could be meant in another way than they were read."""

import json
from collections import Counter

import pytest

from zotune.errors import UsageError
from zotune.llm.config.data import DataOptions
from zotune.llm.data.readers import read_located_rows
from zotune.llm.models.random_models import ARCHITECTURES, byte_tokenizer
from zotune.llm.rows.notes import near_equal
from zotune.llm.tasks.user_data import load_user_data


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def notes(tmp_path):
    """A function: rows and options to the notes on them."""
    tokenizer = byte_tokenizer(ARCHITECTURES["llama-tiny"]())

    def make(rows, **options):
        path = write(tmp_path / "rows.jsonl", rows)
        return load_user_data(DataOptions(train_file=path, num_dev=0, **options), tokenizer).notes

    return make


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("good", "GOOD "),
        ("1", "1.0"),
        ("true", "True"),
        ("Straße", "STRASSE"),
        ("caf\u00e9", "cafe\u0301"),
        ("no", "n\u200bo"),
        ("a b", "a\u00a0 b"),
        ("\uff11", "1"),
    ],
)
def test_labels_that_look_equal_are_named(notes, one, other):
    rows = [{"text": "x", "label": label} for label in (one, other, "else")]
    (note,) = [n for n in notes(rows) if "look alike" in n]
    assert repr(one) in note and repr(other) in note and "else" not in note
    words = {one: "first", other: "first", "else": "second"}
    assert not any("look alike" in n for n in notes(rows, verbalizer=words))


def test_labels_that_differ_have_no_note(notes):
    labels = ["good", "goods", "1", "-1", "10", "1.5", "nan", "yes", "no", "+", "a b", "ab"]
    assert near_equal(labels) == []
    assert len(notes([{"text": "x", "label": label} for label in labels])) == 1  # the format


@pytest.mark.parametrize("empty", ["", "  ", "\u200b"])
def test_an_empty_label_is_refused_with_file_and_line(notes, empty):
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}, {"text": "c", "label": empty}]
    with pytest.raises(UsageError, match=r"rows.jsonl, line 3: the column 'label' is empty"):
        notes(rows)
    assert notes(rows, verbalizer={"x": "x", "y": "y", empty: "none"})


def test_texts_of_control_tokens_are_counted_as_they_are_read(notes):
    rows = [
        {"prompt": "<s>[Q] ping [/Q]", "completion": " pong</s>"},
        {"prompt": "Q", "completion": " a </s> b"},
        {"prompt": "Q <mask>", "completion": " c"},
    ]
    found = " | ".join(notes(rows))
    assert "1 of 3 completions end in '</s>' already" in found
    assert "1 of 3 prompts start with '<s>', which the tokenizer adds too" in found
    assert "2 of 3 rows contain the text of control tokens ('</s>', '<mask>'), which is read as plain text" in found
    assert "plain text" not in " | ".join(notes(rows, read_control_tokens=True))
    assert len(notes([{"prompt": "a", "completion": "b"}])) == 1


def test_a_tokenizer_without_an_end_is_noted(tmp_path):
    tokenizer = byte_tokenizer(ARCHITECTURES["llama-tiny"]())
    tokenizer.eos_token = None
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    found = load_user_data(DataOptions(train_file=path, num_dev=0), tokenizer).notes
    assert any("no end-of-text token" in note for note in found)


@pytest.mark.parametrize("where", ["eval_file", "held out"])
def test_some_evaluation_rows_are_drawn_from_all_of_them(tmp_path, where):
    """A file sorted by label: the rows are no run of it, the same each time, in order, and stated."""
    labels = ["a"] * 300 + ["b"] * 100
    path = write(tmp_path / "sorted.jsonl", [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)])
    source = {"eval_file": path} if where == "eval_file" else {"train_file": path, "num_dev": 399}
    found = [load_user_data(DataOptions(num_eval=80, data_seed=seed, **source), None) for seed in (0, 0, 1)]
    first, again, other = (data.splits.test for data in found)
    assert first == again != other and len(first) == len(other) == 80
    counts = Counter(e.label for e in first)
    # 60 and 20 are expected; the standard deviation is 3.5.
    assert abs(counts[1] - 20) < 4 * 3.5
    num_rows = 400 if where == "eval_file" else 399
    assert f"80 of {num_rows} evaluation rows, drawn at random with data_seed 0" in found[0].notes
    if where == "eval_file":
        numbers = [int(e.prompt.split("\n")[0][1:]) for e in first]
        assert numbers == sorted(numbers)
    every = load_user_data(DataOptions(num_eval=400, **source), None)
    assert len(every.splits.test) == num_rows and len(every.notes) == len(found[0].notes) - 1


def test_the_same_chats_in_a_table_and_in_lines_are_the_same_text(tmp_path):
    import pyarrow
    from pyarrow import parquet

    tokenizer = byte_tokenizer(ARCHITECTURES["llama-tiny"]())
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}{% if m.name is defined %} ({{ m.name }}){% endif %}] {{ m.content }}"
        "{% if m.tool_calls is defined %}{% for c in m.tool_calls %}{{ c.function }}{% endfor %}{% endif %}</s>"
        "{% endfor %}"
    )
    call = {"function": {"name": "get", "arguments": {"city": "Rome"}}}
    rows = [
        {"messages": [{"role": "user", "content": "hi", "name": "Bo"}, {"role": "assistant", "content": "yo"}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "tool_calls": [call]}]},
        {"messages": [{"role": "user", "content": "x", "name": None}, {"role": "assistant", "content": "z"}]},
    ]
    lines = write(tmp_path / "rows.jsonl", rows)
    table = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    assert any(m.get("name") is None for r in read_located_rows(table) for m in r.columns["messages"])
    one, other = (load_user_data(DataOptions(eval_file=path), tokenizer).splits.test for path in (lines, table))
    assert [e.prompt for e in one] == [e.prompt for e in other] and "None" not in one[1].prompt
    assert one[0].prompt == "[user (Bo)] hi</s>[assistant] yo</s>"


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    for ending in ("jsonl", "csv", "parquet"):
        path = tmp_path / f"rows.{ending}"
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", encoding="utf-8")
        with pytest.raises(UsageError, match=rf"rows.{ending} is a pointer of git-lfs"):
            list(read_located_rows(path))
