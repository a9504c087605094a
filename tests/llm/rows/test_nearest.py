"""Rows that fit no shape are answered with their columns, the nearest shape, and options with which they fit."""

import re
import shlex

import pytest

from zotune.errors import UsageError
from zotune.llm.config.data import DataOptions
from zotune.llm.config.schema import validate
from zotune.llm.data.readers import LocatedRow
from zotune.llm.rows.infer import resolve_shape
from zotune.llm.rows.shapes import PROMPT_ALONE, SHAPES


def resolved(*names, **options):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    value = {"messages": chat, "dialogue": chat, "choices": ["a", "b"], "options": ["a", "b"]}
    rows = [LocatedRow(f"a.jsonl, line {i}", {name: value.get(name, str(i)) for name in names}) for i in (1, 2)]
    return resolve_shape(validate(DataOptions, {"eval_file": "a.jsonl", **options}, "options"), rows, "a.jsonl")


@pytest.mark.parametrize(
    ("names", "shape"),
    [
        (("question", "answer"), "completion"),
        (("prompt", "chosen", "rejected"), "completion"),
        (("article", "highlights", "id"), "completion"),
        (("review", "stars"), "classification"),
        (("text", "sentiment"), "classification"),
        (("instruction", "context", "response"), "alpaca"),
        (("dialogue",), "chat"),
        (("question", "options", "label"), "choice"),
    ],
)
def test_the_options_that_are_said_make_the_rows_fit(names, shape):
    with pytest.raises(UsageError) as caught:
        resolved(*names)
    said = str(caught.value)
    assert said.startswith("a.jsonl: there is no column ") and f"the nearest one is {shape}, " in said
    assert ", ".join(map(repr, names)) in said
    given = shlex.split(re.search(r" Give (--.*?)\. ", said)[1])
    options = {}
    for word in given:
        if word.startswith("--"):
            last = options.setdefault(word.removeprefix("--").replace("-", "_"), [])
        else:
            last.append(word)
    columns = dict(zip(*[iter(options.pop("columns", []))] * 2, strict=True))
    found = resolved(*names, columns=columns, **{name: value[0] for name, value in options.items()})
    assert found.data_format == shape


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("prompt", "completions"), "no column 'completion'. Did you mean 'completions'? The columns 'prompt', 'compl"),
        (("a", "b"), "The columns 'a', 'b' fit no shape of rows; the nearest one is classification"),
        (tuple(f"c{i}" for i in range(30)), "'c19', … fit no shape of rows"),
    ],
)
def test_columns_that_nobody_knows_are_named(names, message):
    with pytest.raises(UsageError) as caught:
        resolved(*names)
    assert message in str(caught.value)
    assert all(f"{name} (" in str(caught.value) for name in SHAPES if name not in (PROMPT_ALONE, "text"))


def test_an_object_around_the_rows_is_told():
    rows = [LocatedRow("a.json, line 1 (row 1)", {"version": "1", "data": [{"text": "a", "label": "b"}]})]
    with pytest.raises(UsageError, match=r"If the list 'data' holds the rows, write this list alone into the file\.$"):
        resolve_shape(DataOptions(eval_file="a.json"), rows, "a.json")


def test_a_column_that_is_named_for_one_role_is_not_read_in_another():
    assert resolved("instruction", "output").data_format == "alpaca"
    own = {"columns": {"completion": "output"}, "template": "{instruction}"}
    assert resolved("instruction", "output", **own).data_format == "completion"
    assert resolved("conversations", columns={"messages": "conversations"}).data_format == "chat"
    assert resolved("dialogue", columns={"conversations": "dialogue"}).data_format == "sharegpt"
