"""A model is asked as it was tuned: the tokens of a text typed at the command line are those of its training rows."""

import json

import pytest

from zotune.errors import UsageError
from zotune.llm.config.generate import ChatConfig, GenerateConfig
from zotune.llm.config.run import TrainConfig, read_recipe, write_yaml
from zotune.llm.inference.answers import encode_prompts
from zotune.llm.inference.prompts import prompt_rows, style_of, told_columns
from zotune.llm.tasks.load_data import load_rows

TURNS = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
ROWS = {
    "completion": [{"prompt": f"Q{i}", "completion": f" A{i}"} for i in range(4)],
    "template": [{"question": f"Q{i}", "completion": f" A{i}"} for i in range(4)],
    "two": [{"question": f"Q{i}", "context": "C", "completion": f" A{i}"} for i in range(4)],
    "classification": [{"text": f"Q{i}", "label": "yes" if i % 2 else "no"} for i in range(4)],
    "text": [{"text": f"Q{i} and what comes after it"} for i in range(4)],
    "alpaca": [{"instruction": f"Q{i}", "input": "", "output": "A"} for i in range(4)],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": f"Q{i}"}, {"from": "gpt", "value": "A"}]} for i in range(4)
    ],
    "messages": [
        {"prompt": [{"role": "user", "content": f"Q{i}"}], "completion": [{"role": "assistant", "content": "A"}]}
        for i in range(4)
    ],
    "chat": [
        {"messages": [{"role": "user", "content": f"Q{i}"}, {"role": "assistant", "content": "A"}]} for i in range(4)
    ],
}
TEMPLATES = {"template": "Question: {question}\nAnswer:", "two": "{context}: {question}"}


@pytest.fixture
def ask(tiny):
    """A function: options and a tokenizer's template to the tokens of the prompts."""

    def make(turns=TURNS, stdin=None, **options):
        lm = tiny("llama")
        lm.tokenizer.chat_template = turns
        config = GenerateConfig.model_validate({"max_new_tokens": 4, "device": "cpu", **options})
        style = style_of(config, lm.tokenizer, config.prompt_format)
        found = encode_prompts(lm, *prompt_rows(config, style, stdin))
        return [p.text for p in found], [p.prompt for p in found], lm

    return make


@pytest.fixture
def run(tmp_path, config, tiny):
    """A function: a form of rows to the folder of a run on them, without its weights, and the prompts of its rows."""

    def make(form):
        rows = tmp_path / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[form]))
        options = {"template": TEMPLATES[form]} if form in TEMPLATES else {}
        lm = tiny("llama")
        lm.tokenizer.chat_template = TURNS
        plain = config(model="random:llama-tiny", train_file=str(rows), num_dev=0, **options)
        data = load_rows(lm, plain)
        folder = tmp_path / "run"
        folder.mkdir()
        chosen = plain.model_copy(update={"data_format": data.options.data_format, "template": data.options.template})
        write_yaml(folder / "config.yaml", chosen)
        return folder, data.train

    return make


def test_a_text_is_the_users_message_where_there_is_a_chat_template(ask):
    assert ask(prompt=["Hi"])[0] == ["[user] Hi\n[assistant] "]
    assert ask(prompt=["Hi"], system_prompt="Be brief.")[0] == ["[system] Be brief.\n[user] Hi\n[assistant] "]
    assert ask(prompt=["Hi"], prompt_format="plain")[0] == ["Hi"]
    assert ask(turns=None, prompt=["Hi", "Ho"])[0] == ["Hi", "Ho"]


@pytest.mark.parametrize(
    "form", ["completion", "template", "classification", "alpaca", "sharegpt", "messages", "text", "chat"]
)
def test_a_tuned_model_reads_a_text_as_it_read_its_rows(ask, run, form):
    folder, rows = run(form)
    _, prompts, _ = ask(model=str(folder), prompt=[f"Q{i}" for i in range(4)])
    # Each training row begins with the prompt of its text; what follows is the answer.
    begun = {tuple(s[: len(p)]) for row in rows for s in row.sequences for p in prompts}
    assert len(set(prompts)) == 4
    assert set(prompts) <= begun


def test_the_user_may_ask_a_tuned_model_otherwise(ask, run, capsys):
    folder, _ = run("template")
    assert ask(model=str(folder), prompt=["Q"])[0] == ["Question: Q\nAnswer:"]
    assert ask(model=str(folder), prompt=["Q"], prompt_format="plain")[0] == ["Q"]
    assert ask(model=str(folder), prompt=["Q"], prompt_format="chat")[0] == ["[user] Q\n[assistant] "]
    assert "was tuned on other prompts than chats" in capsys.readouterr().err


def test_rows_of_the_training_are_read_as_in_the_training(ask, run, tmp_path):
    folder, rows = run("two")
    _, prompts, _ = ask(model=str(folder), prompt_file=tmp_path / "rows.jsonl")
    assert all(any(s[: len(p)] == p for row in rows for s in row.sequences) for p in prompts)
    with pytest.raises(UsageError, match=r"several columns.*--prompt-file rows.jsonl.*--prompt-format plain"):
        ask(model=str(folder), prompt=["Q"])


def test_rows_of_a_file_are_chats_prompts_or_columns_of_a_template(ask, tmp_path):
    def texts(name, *rows, **options):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return ask(prompt_file=tmp_path / name, **options)[0]

    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    assert texts("a.jsonl", {"prompt": "Hi"}, {"text": "Ho"}) == ["[user] Hi\n[assistant] ", "[user] Ho\n[assistant] "]
    assert texts("b.jsonl", chat, system_prompt="S") == ["[system] S\n[user] Hi\n[assistant] "]
    told = {"instruction": "Add", "input": "1 2", "output": "3"}
    assert texts("e.jsonl", told) == ["[user] Add\n1 2\n[assistant] "]
    said = {"conversations": [{"from": "human", "value": "Hi"}]}
    assert texts("f.jsonl", said, {"prompt": chat["messages"]}) == ["[user] Hi\n[assistant] "] * 2
    assert texts("c.jsonl", {"q": "Hi", "n": 2}, template="{n}: {q}", prompt_format="plain") == ["2: Hi"]
    with pytest.raises(UsageError, match=r"c.jsonl, line 1: there is no column 'prompt'; the row has q, n"):
        ask(prompt_file=tmp_path / "c.jsonl")
    with pytest.raises(UsageError, match=r"line 2: the rows of the file are of several forms"):
        texts("d.jsonl", chat, {"prompt": "Hi"}, prompt_format="plain")


def test_a_text_file_has_a_prompt_a_line_and_standard_input_is_one(ask, tmp_path):
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    assert ask(turns=None, prompt_file=tmp_path / "p.txt")[0] == ["one", "two"]
    assert ask(turns=None, prompt_file="-", stdin="one\ntwo\n")[0] == ["one", "two"]
    assert ask(turns=None, stdin="one\ntwo\n")[0] == ["one\ntwo"]
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xff")
    for name, message in (("bad.txt", "not UTF-8"), ("none.txt", "cannot be read: No such file")):
        with pytest.raises(UsageError, match=message):
            ask(prompt_file=tmp_path / name)
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UsageError, match=r"contains no prompt"):
        ask(prompt_file=tmp_path / "empty.txt")


def test_control_tokens_in_a_text_are_text_unless_asked(ask):
    _, (plain,), lm = ask(turns=None, prompt=["a</s>b"])
    _, (read,), _ = ask(turns=None, prompt=["a</s>b"], read_control_tokens=True)
    assert lm.tokenizer.eos_token_id not in plain
    assert lm.tokenizer.eos_token_id in read


@pytest.mark.parametrize(
    ("options", "samples"),
    [
        ({}, False),
        ({"temperature": 0}, False),
        ({"temperature": 0.7}, True),
        ({"top_p": 0.9}, True),
        ({"generation": "sample"}, True),
        ({"generation": "greedy"}, False),
    ],
)
def test_a_temperature_or_top_p_asks_for_sampling(options, samples):
    assert ChatConfig.model_validate(options).samples is samples
    config = style_of(ChatConfig.model_validate(options), None).config
    assert config.generation == ("sample" if samples else "greedy")
    assert config.temperature == (options.get("temperature") or 1.0)


def test_a_prompt_longer_than_the_rows_of_the_training_is_read_whole_and_one_that_is_cut_says_so(ask, run, capsys):
    folder, _ = run("completion")
    options = read_recipe(folder / "config.yaml")
    write_yaml(folder / "config.yaml", TrainConfig.model_validate({**options, "max_length": 16}))
    long = "What is it? " * 5
    texts, (tokens,), lm = ask(model=str(folder), prompt=[long], max_new_tokens=100)
    assert len(tokens) > 16
    assert lm.tokenizer.decode(tokens[1:]) == texts[0] == long
    assert "cut" not in capsys.readouterr().err
    assert len(ask(model=str(folder), prompt=[long], max_length=20)[1][0]) == 16
    assert "1 of 1 rows are longer than 20 tokens and were cut to it" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"beside an answer of 60 tokens; raise it, or lower --max-new-tokens"):
        ask(model=str(folder), prompt=[long], max_length=60, max_new_tokens=60)
    with pytest.raises(
        UsageError,
        match=r"with an answer of 1000 tokens \(--max-new-tokens\), has 10\d\d tokens.* Lower --max-new-tokens, or",
    ):
        ask(model=str(folder), prompt=[long], max_new_tokens=1000)


def test_the_stand_in_for_an_output_is_no_column_of_the_prompt(tiny, run, tmp_path):
    folder, _ = run("alpaca")
    config = GenerateConfig(model=str(folder), prompt_file=tmp_path / "rows.jsonl")
    rows, options = prompt_rows(config, style_of(config, tiny("llama").tokenizer), None)
    assert told_columns(rows.rows[0], options) == {"instruction": "Q0", "input": ""}
