"""Messages in each form that files have are the same messages; what is no message is refused by its number."""

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from zotune.errors import UsageError
from zotune.llm.api.rows import rows_of
from zotune.llm.config.data import DataOptions
from zotune.llm.data.readers import LocatedRow
from zotune.llm.rows.shapes import SHAPES
from zotune.llm.rows.sources import UserRows
from zotune.llm.tasks.user_data import load_user_data

ROOT = Path(__file__).parents[3]
TOOLS = (ROOT / "examples" / "chatml-tools.jinja").read_text("utf-8")
NO_TOOLS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALL = {"type": "function", "function": {"name": "get", "arguments": {"city": "Lima"}}}
TOOL = {"type": "function", "function": {"name": "get", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture
def tokenizer(tiny):
    found = tiny("llama").tokenizer
    found.chat_template = TOOLS
    return found


def record(columns, shape="chat", **options):
    made = DataOptions(eval_file="a.jsonl", **options)
    made = made.model_copy(update={"template": made.template or SHAPES[shape].template})
    return SHAPES[shape].to_record(LocatedRow("a.jsonl, line 1", columns), made)


def turns(*said):
    roles = ("user", "assistant") * len(said)
    return tuple({"role": role, "content": text} for role, text in zip(roles, said, strict=False))


def user(*parts):
    return [{"role": "user", "content": list(parts)}, *turns("", "b")[1:]]


def text(value):
    return {"type": "text", "text": value}


@pytest.mark.parametrize(
    "columns",
    [
        {"messages": list(turns("a c", "b"))},
        {"messages": json.dumps(turns("a c", "b"))},
        {"messages": user(text("a "), text("c"))},
        {"messages": user("a c")},
        {"messages": user({"text": "a c", "type": None})},
        {"messages": [{"from": "human", "value": "a c"}, {"from": "gpt", "value": "b"}]},
        {"messages": [{"role": "user", "content": "a c", "tool_calls": None}, {"role": "assistant", "content": "b"}]},
    ],
)
def test_each_form_of_messages_means_the_same(columns):
    assert record(columns).messages == turns("a c", "b")


def test_a_conversation_of_sharegpt_is_the_chat_that_it_writes_down():
    said = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "more?"}]
    assert record({"conversations": said}, "sharegpt").messages == turns("a", "b")
    assert record({"conversations": list(turns("a", "b"))}, "sharegpt").messages == turns("a", "b")
    # A reward function judges the answer to all of it.
    asked = record({"conversations": said}, "sharegpt", objective="rewards:f")
    assert [m["content"] for m in asked.messages] == ["a", "b", "more?"]
    found = record({"conversations": said, "system": "Be brief."}, "sharegpt").messages
    assert found == ({"role": "system", "content": "Be brief."}, *turns("a", "b"))
    called = [
        {"from": "user", "value": "a"},
        {"from": "function_call", "value": '{"name": "get", "arguments": {"city": "Lima"}}'},
        {"from": "observation", "value": "sun"},
        {"from": "assistant", "value": "b"},
    ]
    assert record({"conversations": called}, "sharegpt").messages == (
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "sun"},
        {"role": "assistant", "content": "b"},
    )


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        CALL["function"],
        {**CALL, "function": {"name": "get", "arguments": '{"city": "Lima"}'}},
        {"name": "get", "arguments": '{"city": "Lima"}'},
    ],
)
def test_each_form_of_a_call_means_the_same(call):
    found = record(
        {"messages": [*turns("a"), {"role": "assistant", "tool_calls": [call]}], "tools": json.dumps([TOOL])}
    )
    assert found.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert found.tools == (TOOL,)


def test_prompt_and_completion_of_messages_are_one_chat_whose_end_is_learnt(tokenizer, tmp_path):
    """The scored characters are what transformers writes of the whole chat behind what it writes of the prompt."""
    system, prompt = {"role": "system", "content": "S"}, [*turns("a", "b", "c")]
    completion = [
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "sun"},
        {"role": "assistant", "content": "fine"},
    ]
    row = {"prompt": [system, *prompt], "completion": completion, "tools": [TOOL]}
    assert record(row, "completion").first == 4
    given = UserRows(eval=rows_of([row], "rows"))
    found = load_user_data(DataOptions(data_source="memory"), tokenizer, given=given)
    (example,) = found.splits.test
    whole, before = (
        tokenizer.apply_chat_template(messages, tools=[TOOL], tokenize=False, add_generation_prompt=opens)
        for messages, opens in ((row["prompt"] + completion, False), (row["prompt"], True))
    )
    assert example.prompt == whole and whole.startswith(before)
    assert example.spans[0][0] == len(before)
    assert found.options.template is None
    assert [whole[lo:hi] for lo, hi in example.spans] == [
        '<tool_call>{"name": "get", "arguments": {"city": "Lima"}}</tool_call><|im_end|>\n',
        "fine<|im_end|>\n",
    ]
    # A completion may be a text too, and in CSV messages are JSON.
    assert record({"prompt": prompt, "completion": "fine"}, "completion").messages[-1]["content"] == "fine"
    assert record({"prompt": json.dumps(prompt), "completion": "fine"}, "completion").messages[:3] == tuple(prompt)
    assert record({"prompt": '[{"a": 1}]', "completion": "fine"}, "completion").prompt.text == '[{"a": 1}]'


def test_a_prompt_of_messages_is_opened_for_a_reward_function(tokenizer):
    for more, answers in (({}, ()), ({"label": "b"}, ("b",)), ({"completion": list(turns("", "b")[1:])}, ("b",))):
        row = {"prompt": list(turns("a")), **more}
        given = UserRows(eval=rows_of([row], "rows"))
        options = DataOptions(data_source="memory", objective="rewards:f")
        (example,) = load_user_data(options, tokenizer, given=given).splits.test
        opened = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        assert (example.prompt, example.candidates, example.answers) == (opened, (), answers)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"messages": [*turns("a"), 7]}, "message 2 must be an object with a role and a content; got 7"),
        ({"messages": [*turns("a"), {"role": "assistant", "content": []}]}, "message 2 must have a role and a content"),
        ({"messages": [*turns("a"), {"content": "b"}]}, "message 2 must have a role and a content"),
        (
            {"messages": user({"type": "image_url", "image_url": {"url": "x"}})},
            "message 1 holds a part of type 'image_ur",
        ),
        ({"messages": user({"type": "text"})}, "message 1 holds the part {'type': 'text'}; a part must be"),
        ({"messages": user(["a"])}, r"message 1 holds the part \['a'\]"),
        ({"messages": [*turns("a"), {"role": "assistant", "content": 3}]}, "message 2 .* its content is 3"),
        (
            {"messages": [*turns("a"), {"role": "assistant", "tool_calls": {"name": "x"}}]},
            "must have a list of tool_ca",
        ),
        (
            {"messages": [*turns("a"), {"role": "assistant", "tool_calls": [{"name": 1}]}]},
            "message 2 holds the tool call",
        ),
        (
            {"messages": [*turns("a"), {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{city"}]}]},
            "message 2: the arguments of the tool call of 'f' are '{city'; they must be an object",
        ),
        ({"messages": [*turns("a", "b")], "tools": "no"}, "the column 'tools' must hold a list of tools"),
        ({"messages": [*turns("a", "b")], "tools": [{"a": 1}]}, "the column 'tools' holds the tool {'a': 1}"),
        ({"messages": [*turns("a", "\ud800")]}, "half a character"),
        # A cell of CSV: its reader has not looked into it.
        ({"messages": "[" * 400 + "]" * 400}, "values are nested more than 64 deep"),
        ({"messages": "[" * 40_000}, "must hold a list of messages"),
    ],
)
def test_what_is_no_message_is_refused_by_its_number(columns, message):
    with pytest.raises(UsageError, match=r"^a\.jsonl, line 1: .*" + message):
        record(columns)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"conversations": [{"from": "human", "value": "a"}]}, "holds no turn of the assistant"),
        ({"conversations": []}, "holds no turn of the assistant"),
        (
            {"conversations": [{"from": "alien", "value": "a"}]},
            "message 1 is from 'alien'; it must be from one of human",
        ),
        ({"conversations": [{"from": "function_call", "value": "no JSON"}]}, "message 1 holds the tool call 'no JSON'"),
    ],
)
def test_what_is_no_conversation_is_refused(columns, message):
    with pytest.raises(UsageError, match=r"^a\.jsonl, line 1: .*" + message):
        record(columns, "sharegpt")


def test_calls_that_a_template_does_not_write_are_refused_and_tools_are_remarked_on(tokenizer):
    chat = [*turns("a"), {"role": "assistant", "tool_calls": [CALL]}]
    tokenizer.chat_template = NO_TOOLS

    def load(row):
        return load_user_data(DataOptions(data_source="memory"), tokenizer, given=UserRows(eval=rows_of([row], "rows")))

    with pytest.raises(
        UsageError, match=r"rows\[0\]: the assistant calls a tool, and the model's chat template writes no"
    ):
        load({"messages": chat})
    notes = load({"messages": list(turns("a", "b")), "tools": [TOOL]}).notes
    assert "1 of 1 rows name tools, which the model's chat template does not write" in notes
    tokenizer.chat_template = TOOLS
    assert not any("tools" in note for note in load({"messages": chat, "tools": [TOOL]}).notes)


def test_what_a_conversation_ends_with_after_the_last_turn_is_counted(tokenizer):
    rows = [{"conversations": [*turns("a", "b", "c")]}, {"conversations": [*turns("a", "b")]}]
    found = load_user_data(DataOptions(data_source="memory"), tokenizer, given=UserRows(eval=rows_of(rows, "rows")))
    assert any(n.startswith("1 of 2 conversations go on after the assistant's last turn") for n in found.notes)


def test_rows_in_memory_and_in_tables_are_read_as_those_of_files(tokenizer, tmp_path):
    sys.path.insert(0, str(ROOT / "docs" / "_ext"))
    try:
        from rendered_rows import DATA, RENDERED, examples
    finally:
        sys.path.pop(0)
    for one in RENDERED.values():
        one = replace(one, template=TOOLS if one.template is None else one.template)
        located, found, _ = examples(one, tokenizer)
        rows = [row.columns for row in located]
        options = DataOptions(data_source="memory", **one.options)
        assert len(found) >= 10 and str(DATA) in located[0].place
        tokenizer.chat_template = one.template or None
        given = UserRows(eval=rows_of(rows, "rows"))
        assert load_user_data(options, tokenizer, given=given).splits.test == found
        path = tmp_path / "a.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(rows[0])
            for row in rows:
                writer.writerow([v if isinstance(v, str) else json.dumps(v) for v in row.values()])
        table = load_user_data(DataOptions(eval_file=path, **one.options), tokenizer).splits.test
        assert table == found, one.file


def test_instructions_are_the_chat_of_transformers_or_the_prompt_that_alpaca_was_trained_with(tokenizer):
    rows = json.loads((ROOT / "examples" / "data" / "instructions.json").read_text("utf-8"))

    def load():
        given = UserRows(eval=rows_of(rows, "rows"))
        return load_user_data(DataOptions(data_source="memory"), tokenizer, given=given).splits.test

    for row, example in zip(rows, load(), strict=True):
        said = f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"]
        chat = tokenizer.apply_chat_template(list(turns(said, row["output"])), tokenize=False)
        assert example.prompt == chat
        ((start, end),) = example.spans
        assert chat[start:end] == f"{row['output']}<|im_end|>\n"
    tokenizer.chat_template = None
    for row, example in zip(rows, load(), strict=True):
        given = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
        given = f"### Instruction:\n{row['instruction']}\n\n{given}"
        assert example.prompt.endswith(f" the request.\n\n{given}### Response:\n")
        assert example.prompt.startswith("Below is an instruction that describes a task")
        assert example.candidates == (f"{row['output']}</s>",)
