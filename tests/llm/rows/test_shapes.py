"""Each shape of rows becomes the example that it means; what could mean two things is refused by file and line."""

import json

import pytest

from zotune.errors import UsageError
from zotune.llm.config.data import DataOptions
from zotune.llm.data.examples import Example
from zotune.llm.rows.shapes import PROMPT_ALONE, SHAPES
from zotune.llm.tasks.load_data import load_rows
from zotune.llm.tasks.user_data import load_user_data

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'].strip() }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}</s>"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}\n{% endfor %}"
)
# As templates of reasoning models do: thoughts of earlier turns are dropped.
FORGETFUL = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if loop.last %}{{ m['content'] }}{% else %}"
    "{{ m['content'].split('#')[-1] }}{% endif %}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def own(tmp_path, tiny):
    lm = tiny("llama")

    def make(rows, chat_template=None, **options):
        lm.tokenizer.chat_template = chat_template
        path = write(tmp_path / "rows.jsonl", rows)
        return load_user_data(DataOptions(train_file=path, num_dev=0, **options), lm.tokenizer)

    return make


def test_the_shape_is_told_from_the_columns(own):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = {
        "classification": [{"text": "a", "label": 1}, {"text": "b", "label": 0}],
        "completion": [{"prompt": "a", "completion": "b", "id": 7}],
        "chat": [{"prompt": "a", "messages": chat}],
        "choice": [{"prompt": "a", "choices": ["b", "c"], "label": 0, "messages": None}],
        "alpaca": [{"instruction": "a", "input": "", "output": "b"}],
        "sharegpt": [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}],
        "text": [{"text": "a", "url": "b"}],
    }
    assert {*rows, PROMPT_ALONE} == set(SHAPES)
    for name, some in rows.items():
        found = own(some, CHATML)
        assert found.options.data_format == name
        assert f"data_format: {name}" in found.notes[0]
    with pytest.raises(UsageError, match=r"several formats: completion, chat\. Choose one.*--data-format completion"):
        own([{"prompt": "a", "completion": "b", "messages": chat}], CHATML)
    assert own([{"prompt": "a", "completion": "b", "messages": chat}], CHATML, data_format="chat").splits.train[0].spans
    with pytest.raises(UsageError, match=r"no column 'completion'. Did you mean 'completions'\? .*choice \(prompt, "):
        own([{"prompt": "a", "completions": "b"}])


def test_a_completion_is_joined_as_it_is_written_and_ends_the_text(own):
    (example,) = own([{"prompt": "1 + 1 =", "completion": " 2 👋"}]).splits.train
    assert example == Example("1 + 1 =", (" 2 👋</s>",), 0)
    (example,) = own(
        [{"question": "1 + 1", "input": "", "completion": "2"}],
        template="{question}{input}? ",
        columns={"prompt": "question"},
        exact_match=True,
    ).splits.train
    assert example == Example("1 + 1? ", ("2</s>",), 0, answers=("2",))


def test_choices_are_texts_and_the_right_one_is_an_index_or_a_text(own):
    rows = [
        {"prompt": "It rained so", "choices": ["she got wet", " she slept "], "label": label}
        for label in (1, "1", "she slept", 1.0, " she slept ")
    ]
    examples = own(rows).splits.train
    assert set(examples) == {Example("It rained so", (" she got wet", " she slept"), 1)}
    (example,) = own([{"prompt": "2 + 2\n", "choices": ["4", "0"], "label": 0}]).splits.train
    assert example == Example("2 + 2\n", ("4", "0"), 0)  # no space behind a new line; a number among texts counts
    (example,) = own([{"prompt": "x", "choices": [4, 5], "label": 5}]).splits.train
    assert example.label == 1
    # The choices of a CSV cell are JSON.
    (example,) = own([{"prompt": "x", "choices": '["a", "b"]', "label": "b"}]).splits.train
    assert example.candidates == (" a", " b")


def test_labels_that_share_a_word_are_one_class(own):
    rows = [{"text": str(i), "label": i} for i in range(4)]
    words = {"0": "bad", "1": "bad", "2": " good", "3": "good "}
    found = {e.prompt[0]: (e.candidates, e.label) for e in own(rows, verbalizer=words).splits.train}
    assert found == {str(i): ((" bad", " good"), i // 2) for i in range(4)}


def test_numbers_and_truth_values_are_labels_as_people_write_them(own):
    rows = [{"text": i, "label": label} for i, label in enumerate([1, 1.0, "1", True, False, 2.5])]
    assert set(own(rows).options.verbalizer) == {"1", "2.5", "true", "false"}


CHAT = [
    {"role": "system", "content": "Be brief 👋"},
    {"role": "user", "content": "Hi </s>"},
    {"role": "assistant", "content": " #שלום "},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "four\n\n#4 "},
]


def scored(example):
    return [example.prompt[start:end] for start, end in example.spans]


@pytest.mark.parametrize(
    ("template", "turns", "expected"),
    [
        (CHATML, "last", ["four\n\n#4</s>"]),
        (CHATML, "all", ["#שלום</s>", "four\n\n#4</s>"]),
        (MARKED, "last", ["four\n\n#4 </s>"]),
        (MARKED, "all", [" #שלום </s>", "four\n\n#4 </s>"]),
        (FORGETFUL, "last", ["four\n\n#4 </s>"]),
    ],
)
def test_the_assistants_turns_are_found_to_the_character(own, template, turns, expected):
    (example,) = own([{"messages": CHAT}], template, scored_turns=turns).splits.train
    assert scored(example) == expected


def test_a_turn_that_the_template_writes_in_two_ways_is_refused(own):
    with pytest.raises(UsageError, match=r"rows.jsonl, line 1: .* message 3 differently.*--scored-turns last"):
        own([{"messages": CHAT}], FORGETFUL, scored_turns="all")


def test_a_chat_is_tokenised_as_transformers_does_and_scored_where_it_marks(tiny, causal_family, tmp_path):
    """The tokens of apply_chat_template; those of its own assistant mask are scored, and no others."""
    lm = tiny(causal_family)
    lm.tokenizer.chat_template = MARKED
    whole = lm.tokenizer.apply_chat_template(CHAT, return_assistant_tokens_mask=True, return_dict=True)
    marked = [i for i, m in enumerate(whole["assistant_masks"]) if m]
    path = write(tmp_path / "rows.jsonl", [{"messages": CHAT}])
    # One message holds the text of a control token, which transformers reads as the token.
    rows = load_rows(lm, DataOptions(train_file=path, num_dev=0, scored_turns="all", read_control_tokens=True))
    (candidate,) = rows.train[0].candidates
    assert [p + 1 for p in candidate.positions] == marked
    assert list(candidate.tokens) == [whole["input_ids"][i] for i in marked]
    assert list(rows.train[0].sequences[0]) == whole["input_ids"][: marked[-1]]


def test_the_built_in_models_chats_end_with_its_end_of_turn(smollm2, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"messages": CHAT}])
    for turns, ends in (("last", 1), ("all", 2)):
        rows = load_rows(smollm2, DataOptions(train_file=path, num_dev=0, scored_turns=turns))
        (candidate,) = rows.train[0].candidates
        assert candidate.tokens.count(smollm2.tokenizer.eos_token_id) == ends
        text = smollm2.tokenizer.decode(list(candidate.tokens))
        assert text == ("" if turns == "last" else " #שלום <|im_end|>") + "four\n\n#4 <|im_end|>"


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"text": " ", "label": 1}, {"text": "b", "label": 0}], {}, "line 1: the text is empty"),
        ([{"text": "a", "label": 1}, {"text": None, "label": 0}], {}, "line 2: the column 'text' is null"),
        ([{"text": "a", "label": 1}, {"text": "b", "label": None}], {}, "line 2: the column 'label' is null"),
        ([{"text": ["a"], "label": 1}, {"text": "b", "label": 0}], {}, r"line 1: the column 'text' holds \['a'\]"),
        ([{"text": "\ud800", "label": 1}, {"text": "b", "label": 0}], {}, "line 1: .*half a character"),
        ([{"text": "a", "label": ""}, {"text": "b", "label": 0}], {}, "line 1: .*the label '' has an empty word"),
        ([{"text": "a", "label": 1}], {"verbalizer": {"1": "x", "0": "x "}}, "same word for all labels"),
        ([{"text": "a", "label": 1}, {"text": "b", "label": 0}], {"exact_match": True}, "no effect on rows of a text"),
        ([{"text": "a", "label": 1}], {"scored_turns": "all"}, "scored_turns has no effect"),
        ([{"prompt": "a", "completion": "b"}], {"verbalizer": {"a": "b"}}, "verbalizer has no effect.*classification"),
        ([{"messages": CHAT}], {"template": "{messages}"}, "template has no effect on rows of messages"),
        ([{"prompt": "a", "completion": " "}], {}, "line 1: the column 'completion' is empty"),
        ([{"prompt": "", "completion": "x"}], {}, "line 1: the text is empty"),
        ([{"prompt": "a", "completion": "b\nc"}], {"exact_match": True}, "line 1: exact_match compares one generated"),
        ([{"prompt": "a", "completion": "b" * 51}], {"exact_match": True}, "51 tokens"),
        ([{"messages": []}], {}, "line 1: the last message must have the role 'assistant'"),
        ([{"messages": CHAT[:2]}], {}, "but its role is 'user'"),
        ([{"messages": "hello"}], {}, "line 1: the column 'messages' must hold a list of messages"),
        (
            [{"messages": [{"role": "assistant", "content": ""}]}],
            {},
            "line 1: message 1 must have a role and a content",
        ),
        ([{"messages": [["assistant", "x"]]}], {}, "line 1: message 1 must be an object with a role and a content"),
        (
            [{"messages": [{"role": "assistant", "content": [{"type": "image", "url": "x"}]}]}],
            {},
            "line 1: message 1 holds a part of type 'image', and zotune reads text alone",
        ),
        ([{"prompt": "a", "choices": ["x"], "label": 0}], {}, "line 1: .*at least two choices"),
        ([{"prompt": "a", "choices": ["x", " "], "label": 0}], {}, "line 1: .*none of them empty"),
        ([{"prompt": "a", "choices": ["x", "x "], "label": 0}], {}, "line 1: the choice 'x' appears twice"),
        ([{"prompt": "a", "choices": ["x", "y"], "label": 2}], {}, r"is 2, but must be .* 0 to 1"),
        ([{"prompt": "a", "choices": ["x", "y"], "label": -1}], {}, "is -1, but must be"),
        ([{"prompt": "a", "choices": ["x", "y"], "label": "z"}], {}, "is 'z', but must be"),
        ([{"prompt": "a", "choices": ["1", "2"], "label": "1"}], {}, "the text of one choice and the index of another"),
        ([{"prompt": "a", "choices": [1, 0], "label": 1}], {}, "the text of one choice and the index of another"),
        ([{"prompt": "a", "choices": {"text": ["x"]}, "label": 0}], {}, "must hold a list of choices"),
    ],
)
def test_rows_that_cannot_be_used_are_named(own, rows, options, message):
    with pytest.raises(UsageError, match=message):
        own(rows, CHATML, **options)


def test_chats_need_a_template_that_takes_them(own):
    with pytest.raises(UsageError, match=r"line 1: the model's tokenizer has no chat template"):
        own([{"messages": CHAT}])
    with pytest.raises(UsageError, match=r"line 1: the chat template rejects these messages: no system"):
        own([{"messages": CHAT}], "{{ raise_exception('no system') }}")


def test_columns_that_do_not_exist_cannot_be_named():
    with pytest.raises(ValueError, match=r"columns: there is no 'promt' to name. Did you mean 'prompt'\?"):
        DataOptions(train_file="x.jsonl", columns={"promt": "a"})


def test_masked_models_take_texts_with_labels_alone(tiny, tmp_path):
    lm = tiny("roberta")
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}] * 2)
    with pytest.raises(UsageError, match=r"a masked language model fills in one word.*completion"):
        load_rows(lm, DataOptions(train_file=path))


def test_rows_that_are_trained_and_measured_on_are_counted(own, tmp_path):
    rows = [{"text": "a", "label": i % 2} for i in range(10)]
    path = write(tmp_path / "rows2.jsonl", rows)
    found = load_user_data(DataOptions(train_file=path), None)
    assert found.notes[1] == "2 of 2 held-out rows are training rows too, so the result on them is biased"
    assert len(own([{"text": str(i), "label": i % 2} for i in range(10)]).notes) == 1


def test_candidates_that_are_the_same_tokens_are_refused(tiny, tmp_path):
    """A tokenizer may drop what tells two words apart: here, case."""
    from tokenizers import normalizers

    lm = tiny("llama")
    lm.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    path = write(tmp_path / "rows.jsonl", [{"text": "a", "label": "Maybe"}, {"text": "b", "label": "maybE"}])
    with pytest.raises(UsageError, match=r"rows.jsonl, line \d: the candidates ' Maybe' and ' maybE' have the same"):
        load_rows(lm, DataOptions(train_file=path, num_dev=0))


def test_a_candidate_that_is_no_token_is_refused(tiny, tmp_path):
    from tokenizers import normalizers

    lm = tiny("llama")
    lm.tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" yes", "")
    path = write(tmp_path / "rows.jsonl", [{"text": "a", "label": "yes"}, {"text": "b", "label": "no"}])
    with pytest.raises(UsageError, match=r"rows.jsonl, line \d: the tokenizer makes no token of the candidate ' yes'"):
        load_rows(lm, DataOptions(train_file=path, num_dev=0))
