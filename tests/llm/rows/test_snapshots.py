"""The files of `examples/data` are read as snapshots and pages say; a broken row in each is refused by its place."""

import json
import re
import shlex
import sys
from copy import copy
from pathlib import Path
from types import SimpleNamespace

import pytest

from zotune.errors import UsageError
from zotune.llm.config.data import DataOptions
from zotune.llm.rows.shapes import SHAPES
from zotune.llm.rows.sources import read_checked_files
from zotune.llm.tasks.load_data import with_chat_template
from zotune.llm.tasks.user_data import load_user_data

ROOT = Path(__file__).parents[3]
DATA = ROOT / "examples" / "data"


@pytest.fixture(scope="module")
def pages():
    sys.path.insert(0, str(ROOT / "docs" / "_ext"))
    try:
        import rendered_rows
    finally:
        sys.path.pop(0)
    return rendered_rows


@pytest.fixture(scope="module")
def tokenizer(pages):
    return pages.tokenizer()


def test_the_rows_of_the_examples_are_read_as_their_snapshots_say(pages, tokenizer):
    assert {path.stem for path in pages.SNAPSHOTS.glob("*.txt")} == set(pages.RENDERED)
    for name, one in pages.RENDERED.items():
        assert pages.snapshot(one, tokenizer) == (pages.SNAPSHOTS / f"{name}.txt").read_text("utf-8"), name


def test_each_shape_has_a_file_of_ten_rows_and_a_page_that_shows_one(pages, tokenizer):
    found = [pages.examples(one, tokenizer) for one in pages.RENDERED.values()]
    assert min(len(rows) for rows, _, _ in found) >= 10
    for shape in SHAPES:
        assert any(f"data_format: {shape})" in notes[0] for _, _, notes in found), shape
    for path, text in pages.pages():
        assert path.read_text("utf-8") == text, (
            f"{path} is not as the code renders it: python docs/_ext/rendered_rows.py"
        )
    shown = "".join(path.read_text("utf-8") for path in pages.PAGES.glob("*.md"))
    assert [name for name in pages.RENDERED if f"<!-- rendered: {name} -->" not in shown] == []


def commands():
    """The commands of the pages, as words behind `zotune`."""
    for path in sorted((ROOT / "docs" / "data").glob("*.md")):
        for block in re.findall(r"^```sh\n(.*?)^```", path.read_text("utf-8"), re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                yield shlex.split(line)[1:]


def test_the_commands_of_the_pages_read_their_rows(zotune, tokenizer, monkeypatch):
    """As a dry run does, but for the model."""
    read = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("zotune.plan.dry_run.dry_run", lambda config, given: read.append((config, given)) or Nothing())
    for arguments in commands():
        said = zotune(*arguments, "--dry-run")
        assert said.code == 0, said.err
        config, given = read[-1]
        lm = SimpleNamespace(tokenizer=copy(tokenizer))
        config = with_chat_template(lm, config)
        assert len(load_user_data(config, lm.tokenizer, given=given).splits.train) >= 8, arguments
    assert len(read) >= 9


class Nothing:
    """A dry run that found nothing."""

    refused = ()


# The column of each file that is broken in its last row, what it is set to, and what is said.
BROKEN = {
    "answers": ("completion", [{"role": "user", "content": "?"}], "the last of them must have the role 'assistant'"),
    "capitals": ("completion", "", "the column 'completion' is empty"),
    "consequences": ("label", 7, "is 7, but must be the right choice itself"),
    "conversations": ("conversations", [{"from": "robot", "value": "Hi"}], "message 1 is from 'robot'"),
    "instructions": ("output", None, "the column 'output' is null"),
    "parts": ("messages", [{"role": "user", "content": [{"type": "image"}]}], "zotune reads text alone: no images"),
    "stories": ("text", "", "the column 'text' is empty"),
    "sums": ("prompt", " ", "the text is empty"),
    "support": ("messages", [{"role": "user", "content": "Hi"}], "but its role is 'user'"),
    "tools": ("messages", [{"role": "assistant", "tool_calls": [{"x": 1}]}], "message 1 holds the tool call"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_is_refused_with_file_and_line_before_there_is_a_model(pages, tmp_path, name):
    one, (column, value, said) = pages.RENDERED[name], BROKEN[name]
    text = (DATA / one.file).read_text("utf-8")
    is_list = text.startswith("[")
    rows = json.loads(text) if is_list else [json.loads(line) for line in text.splitlines()]
    rows[-1][column] = value
    path = tmp_path / one.file
    written = json.dumps(rows, indent=2) if is_list else "\n".join(map(json.dumps, rows))
    path.write_text(written, "utf-8")
    line = written[: written.rindex("\n  {")].count("\n") + 2 if is_list else len(rows)
    place = f"{path}, line {line}" + (f" (row {len(rows)})" if is_list else "")
    with pytest.raises(UsageError) as caught:
        read_checked_files(DataOptions(eval_file=path, **one.options))
    assert str(caught.value).startswith(f"{place}: ") and said in str(caught.value)


@pytest.mark.parametrize("name", ["reviews.csv", "reviews-excel.csv"])
def test_a_broken_row_of_a_table_is_refused_with_file_and_line(pages, tmp_path, name):
    path, options = tmp_path / name, pages.RENDERED[Path(name).stem].options
    content = (DATA / name).read_bytes()
    number = content.count(b"\n") + 1
    path.write_bytes(content + b"one cell\n")
    with pytest.raises(UsageError, match=rf"{name}, line {number}: 1 cells, but the header names 2 columns"):
        read_checked_files(DataOptions(eval_file=path, **options))
    path.write_bytes(content + (b"Fine;7\n" if "excel" in name else b"Fine,7\n"))
    with pytest.raises(UsageError, match=rf"{name}, line {number}: the label '7' is not in the verbalizer"):
        read_checked_files(DataOptions(eval_file=path, **options))


@pytest.mark.parametrize("verb", ["train", "tune", "eval"])
def test_a_command_refuses_a_broken_row_before_torch_is_imported(tmp_path, capsys, monkeypatch, verb):
    """What the command imports after its rows were read is taken away: only they can be the reason."""
    from zotune.cli.main import run

    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', "utf-8")
    later = (
        "zotune.llm.training.train",
        "zotune.llm.tune.sweep",
        "zotune.llm.training.evaluation",
        "zotune.plan.dry_run",
    )
    for module in later:
        monkeypatch.setitem(sys.modules, module, None)
    more = {"tune": ["--mu", "1e-3", "1e-2"], "train": [], "eval": []}[verb]
    file = "--eval-file" if verb == "eval" else "--train-file"
    assert run([verb, "--model", "no/model", file, str(path), *more]) == 2
    assert "rows.jsonl, line 2: there is no column 'completion'" in capsys.readouterr().err


def test_reading_and_checking_rows_needs_neither_torch_nor_transformers(start, tmp_path):
    code = (
        "import sys; from zotune.llm.config.data import DataOptions; from zotune.llm.rows.sources import "
        f"read_checked_files; read_checked_files(DataOptions(eval_file={str(DATA / 'capitals.jsonl')!r})); "
        "print([name for name in ('torch', 'transformers', 'datasets', 'pyarrow', 'peft') if name in sys.modules])"
    )
    process = start("-c", code)
    assert process.communicate(timeout=60)[0].strip() == "[]"
