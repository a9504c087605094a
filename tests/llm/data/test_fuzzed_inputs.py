"""Recipes and rows of any content: taken as they are meant, or refused with a message that names them; no crash."""

import json
import math
import os

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from zotune.errors import UsageError
from zotune.llm.config.data import DataOptions
from zotune.llm.config.run import RECIPES, TrainConfig, read_recipe, write_yaml
from zotune.llm.config.schema import validate
from zotune.llm.models.random_models import ARCHITECTURES, byte_tokenizer
from zotune.llm.tasks.user_data import load_user_data

NUM_EXAMPLES = int(os.environ.get("ZOTUNE_FUZZ", "60"))


def fuzz(share=1.0):
    return settings(
        max_examples=max(10, int(NUM_EXAMPLES * share)),
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


TEXT = st.text(max_size=12)
NUMBERS = st.one_of(
    st.integers(-3, 3), st.integers(), st.floats(), st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**400, 1e-320])
)
WORDS = st.sampled_from(
    ["auto", "float32", "zo_sgd", "zo_adam", "fo_adam", "none", "layer", "size", "true", "1e-3", "~", "a\0b", "é", ""]
)
ATOMS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXT, WORDS)
VALUES = st.recursive(ATOMS, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXT, v, max_size=3), max_leaves=5)
KEYS = st.sampled_from(sorted(TrainConfig.model_fields))
ODD_KEYS = st.one_of(TEXT, st.integers(), st.booleans(), st.none(), st.sampled_from(["lr", "zo_eps", "learningrate"]))


def read(path, content):
    """The config of a recipe, as `zotune train` makes it; None where it is refused, with a message that names it."""
    path.write_bytes(content)
    try:
        values = validate(TrainConfig, read_recipe(path), str(path), partial=True).model_dump()
        return validate(TrainConfig, values, str(path))
    except UsageError as error:
        assert str(path) in str(error)
        assert len(str(error)) < 5000
        return None


WORDS_OF = {True: ("true", "yes", "on", "y", "t", "1"), False: ("false", "no", "off", "n", "f", "0"), None: ()}


def assert_as_meant(config, values):
    """Each number, word and list of the recipe is in the config."""
    for key, value in values.items():
        found = getattr(config, "mu" if key == "zo_eps" else key)
        if isinstance(found, bool) or isinstance(value, bool) or found is None or value is None:
            words = {
                True: ("true", "yes", "on", "y", "t", "1", "1.0"),
                False: ("false", "no", "off", "n", "f", "0", "0.0"),
            }
            assert found == value or str(value).lower() in words[found], key
        elif isinstance(found, int | float):
            assert math.isfinite(found) and found == float(value), key
        elif isinstance(value, str) and key != "peft_config":
            assert str(found) == value or str(found) == os.path.normpath(value) or not value, key
        elif isinstance(value, list):
            assert list(found) == value, key


@fuzz()
@given(values=st.dictionaries(st.one_of(KEYS, KEYS, KEYS, ODD_KEYS), VALUES, max_size=5), plain=st.booleans())
@example(values={"task": "sst2", "learning_rate": float("nan")}, plain=True)
@example(values={"task": "sst2", "learning_rate": float("inf")}, plain=True)
@example(values={"task": "sst2", "seed": 2**64}, plain=True)
@example(values={"task": "sst2", "max_steps": 10**400}, plain=True)
@example(values={"task": "sst2", "output_dir": "a\0b"}, plain=True)
@example(values={1: 2, None: 3}, plain=True)
def test_a_recipe_is_taken_as_it_is_meant_or_refused(tmp_path, values, plain):
    if plain:
        values = {"task": "sst2", **values}
    try:
        content = yaml.safe_dump(values, allow_unicode=True).encode()
    except UnicodeEncodeError:  # half a character is none of any file
        return
    config = read(tmp_path / "recipe.yaml", content)
    if config is not None:
        assert_as_meant(config, values)
        write_yaml(tmp_path / "again.yaml", config)
        assert read(tmp_path / "again.yaml", (tmp_path / "again.yaml").read_bytes()) == config


SOUND = [path.read_bytes() for path in sorted(RECIPES.glob("*.yaml"))]
# What is known to upset readers of YAML: text in another encoding, depth, dates, long numbers, anchors within anchors.
HARD = [
    b"\xff\xfe\x00task",
    b"task: \x80",
    b"[" * 5000,
    b"task: " + b"{a: " * 3000,
    b"task: 2001-13-45",
    b"max_steps: " + b"9" * 5000,
    b"a: &a [x, x]\n" + b"".join(b"b%d: &b%d [*a, *a]\n" % (i, i) for i in range(9)),
    b"".join([b"task: &a0 [x, x]\n", *(b"k%d: &a%d [*a%d, *a%d]\n" % (i, i, i - 1, i - 1) for i in range(1, 30))]),
    b"task: &a [*a]",
    b"a: &a0 [x]\n" + b"".join(b"b%d: &a%d [*a%d, *a%d]\n" % (i, i, i - 1, i - 1) for i in range(1, 60)),
    b"columns: {a: &a0 [x], "
    + b"".join(b"b%d: &a%d [*a%d, *a%d], " % (i, i, i - 1, i - 1) for i in range(1, 9))
    + b"}",
    b"? [a]\n: b",
    b"task: sst2\ntuning: peft\npeft_type: ia3\npeft_config: {a: &a0 [x, x]"
    + b"".join(b", b%d: &a%d [*a%d, *a%d]" % (i, i, i - 1, i - 1) for i in range(1, 18))
    + b"}",
    b"task: !!python/object/apply:os.system [ls]",
    b"task: !!binary x",
    b"task: !!float x",
    b"task: !!int ''",
    b"task: !!timestamp x",
    b"<<: 1",
    b"--- a\n--- b",
    b"",
    b"task",
    b"\x00",
]


MARKS = [b": ", b"\n", b"[", b"{", b"&a ", b"*a", b"'", b"- ", b"\t", b"!!"]


@st.composite
def damaged(draw, sources):
    """A sound file with some bytes changed, put in, taken out or cut off."""
    content = bytearray(draw(st.sampled_from(sources)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(content)))
        kind = draw(st.sampled_from(["put in", "take out", "overwrite", "cut", "repeat"]))
        if kind == "put in":
            content[at:at] = draw(
                st.one_of(
                    st.binary(max_size=4),
                    st.sampled_from([b": ", b"\n", b"[", b"{", b"&a ", b"*a", b"'", b"- ", b"\t", b"!!"]),
                )
            )
        elif kind == "take out":
            del content[at : at + draw(st.integers(1, 9))]
        elif kind == "overwrite" and at < len(content):
            content[at] = draw(st.integers(0, 255))
        elif kind == "repeat":
            content[at:at] = content[at : at + draw(st.integers(1, 40))]
        elif kind == "cut":
            del content[at:]
    return bytes(content)


@fuzz()
@given(content=st.one_of(damaged(SOUND), damaged(SOUND), st.binary(max_size=60), st.sampled_from(HARD)))
def test_any_bytes_are_a_recipe_or_refused_by_name(tmp_path, content):
    config = read(tmp_path / "recipe.yaml", content)
    if config is not None:
        assert_as_meant(config, yaml.safe_load(content.decode()))


@pytest.mark.sample(12)
@pytest.mark.parametrize("content", HARD, ids=range(len(HARD)))
def test_what_upsets_readers_of_yaml_is_refused_by_name(tmp_path, content):
    assert read(tmp_path / "recipe.yaml", content) is None


def test_a_key_that_is_given_twice_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text("task: sst2\nmu: 1e-3\nmu: 1e-2\n", encoding="utf-8")
    with pytest.raises(UsageError, match="the key 'mu' appears twice"):
        read_recipe(tmp_path / "recipe.yaml")


@fuzz(0.03)
@given(changes=st.dictionaries(KEYS, VALUES, max_size=3))
@example(changes={"output_dir": ""})
@example(changes={"tuning": "peft", "peft_type": "ia3", "peft_config": "[]"})
def test_a_recipe_for_the_command_line_is_planned_or_refused(tmp_path, zotune, rows_file, changes):
    plain = {
        "model": "random:llama-tiny",
        "train_file": str(rows_file),
        "output_dir": str(tmp_path / "out"),
        "device": "cpu",
    }
    changes.pop("model", None)
    changes.pop("data_source", None)
    try:
        text = yaml.safe_dump({**plain, **changes}, allow_unicode=True)
        (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    except UnicodeEncodeError:
        return
    said = zotune("train", tmp_path / "recipe.yaml", "--dry-run")
    assert said.code in (0, 2)
    assert said.out or said.err.startswith("zotune: ")


CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
FILES = {
    "classification": '{"text": "good", "label": "yes"}\n{"text": "bad", "label": "no"}\n',
    "completion": '{"prompt": "one", "completion": " two"}\n{"prompt": "b", "completion": "c"}\n',
    "chat": f"{CHAT}\n{CHAT}\n",
    "alpaca": '{"instruction": "a", "input": "b", "output": "c"}\n{"instruction": "a", "output": "c"}\n',
    "sharegpt": (
        '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}\n'
        '{"conversations": [{"from": "gpt", "value": "b"}], "system": "s"}\n'
    ),
    "choice": '{"prompt": "p", "choices": ["a", "b"], "label": 1}\n{"prompt": "q", "choices": ["c", "d"], "label": 0}',
}
KEYS_OF_MESSAGES = ["role", "content", "type", "text", "from", "value", "tool_calls", "function", "name", "arguments"]
CELLS = st.recursive(
    ATOMS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(KEYS_OF_MESSAGES), v), max_leaves=6
)
ROLES = (
    *("text", "label", "prompt", "completion", "choices", "messages", "tools"),
    *("instruction", "input", "output", "system", "conversations"),
)
ROWS = st.lists(st.dictionaries(st.sampled_from(ROLES), CELLS, max_size=4), max_size=4)


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    found = byte_tokenizer(ARCHITECTURES["llama-tiny"]())
    found.chat_template = TEMPLATE
    return found


def examples_of(path, content, shape, tokenizer):
    """The examples of a file of rows; None where they are refused, with a message that names it."""
    path.write_bytes(content)
    options = validate(DataOptions, {"train_file": path, "data_format": shape, "num_dev": 0}, "options")
    try:
        return load_user_data(options, tokenizer).splits.train
    except UsageError as error:
        assert path.name in str(error) or "label" in str(error) or "option" in str(error), str(error)
        assert len(str(error)) < 5000
        return None


def assert_sound(examples):
    """What any objective can learn from."""
    for e in examples:
        assert e.prompt.strip()
        assert 0 <= e.label < len(e.candidates)
        assert e.spans or all(c.strip() for c in e.candidates)
        for text in (e.prompt, *e.candidates):
            text.encode("utf-8")


@pytest.mark.parametrize("shape", [*FILES, None])
@fuzz(0.5)
@given(content=st.one_of(damaged([text.encode() for text in FILES.values()]), ROWS))
def test_any_rows_become_examples_or_are_refused_by_name(tmp_path, tokenizer, shape, content):
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content).encode()
    found = examples_of(tmp_path / "rows.jsonl", content, shape, tokenizer)
    if found is not None:
        assert_sound(found)
        assert len(found) == sum(bool(line.strip()) for line in content.decode("utf-8-sig").split("\n"))


@pytest.mark.parametrize("shape", FILES)
def test_the_sound_files_are_taken(tmp_path, tokenizer, shape):
    found = examples_of(tmp_path / "rows.jsonl", FILES[shape].encode(), None, tokenizer)
    assert_sound(found)
    assert len(found) == 2
