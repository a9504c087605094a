"""What is read of a file is bounded before anything of its size is made; a refusal says how to raise the bound."""

import json
import re
import resource
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zotune.errors import UsageError
from zotune.system import bounds
from zotune.system.bounds import BOUNDS, JSON_BYTES, Bound, address_space, count_values, memory_below, parse_json

VALUES = st.recursive(
    st.none() | st.integers() | st.text(max_size=3),
    lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=2), v, max_size=4),
)


def nodes(value):
    """The number of values in a value, keys left out."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(nodes, inner))


@settings(max_examples=50, deadline=None)
@given(VALUES)
def test_no_more_values_come_of_a_text_than_were_counted(value):
    text = json.dumps(value)
    assert count_values(text) >= nodes(value)
    assert count_values(text) == count_values(text.encode())


def test_a_text_of_many_values_is_refused_before_it_is_parsed(little_memory):
    text = "[" + "{}," * 5_000_000 + "{}]"  # 15 MB, which would take half a gigabyte
    with little_memory(100 << 20), pytest.raises(UsageError, match="ZOTUNE_MAX_JSON_VALUES"):
        parse_json(text, "a.json")


def test_a_file_above_its_bound_is_not_read(tmp_path, little_memory):
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(1 << 40)  # a hole, which takes no space
    for path in (tmp_path / "a.json", "/dev/zero"):
        with little_memory(300 << 20), pytest.raises(UsageError, match="ZOTUNE_MAX_JSON_BYTES"):
            bounds.read_json(type(tmp_path)(path))


@pytest.mark.parametrize("bound", BOUNDS, ids=lambda bound: bound.variable)
def test_a_refusal_names_the_bound_and_the_variable_that_raises_it(bound, monkeypatch):
    with pytest.raises(UsageError) as caught:
        bound.check(bound.default + 1, "a file")
    said = str(caught.value)
    assert f"{bound.default:,}" in said
    (name,) = re.findall(r"ZOTUNE_\w+", said)
    monkeypatch.setenv(name, str(bound.default + 1))
    bound.check(bound.default + 1, "a file")
    with pytest.raises(UsageError):
        bound.check(bound.default + 2, "a file")


@pytest.mark.parametrize("text", ["-1", "1e6", "0", "many", "1" * 30])
def test_a_bound_that_is_no_number_is_refused(monkeypatch, text):
    monkeypatch.setenv("ZOTUNE_MAX_ROWS", text)
    with pytest.raises(UsageError, match="whole number of rows"):
        Bound("ZOTUNE_MAX_ROWS", 1, "rows").check(0, "a file")


def test_memory_is_limited_within_the_context_alone():
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(MemoryError), memory_below(address_space() + (64 << 20)):
        bytes(256 << 20)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert JSON_BYTES.value == JSON_BYTES.default


def test_the_documented_bounds_are_those_of_the_code():
    text = (Path(__file__).parents[2] / "SECURITY.md").read_text(encoding="utf-8")
    documented = dict(re.findall(r"^\| `(ZOTUNE_MAX_\w+)` \| .* \| ([\d,]+) \|$", text, re.MULTILINE))
    assert documented == {bound.variable: f"{bound.default:,}" for bound in BOUNDS}
