"""The model's chat template on rows of any shape gives the tokens of transformers; templates come by any name."""

import json

import pytest
import torch

from zotune.errors import UsageError
from zotune.llm.config.data import DataOptions
from zotune.llm.data.in_chat import system_message
from zotune.llm.data.template_sources import CHATML, NAMED, template_source, with_template
from zotune.llm.rows.rendering import chat_template_of
from zotune.llm.tasks.load_data import load_rows

ROLES = (
    "<s>{% for m in messages %}<{{ m.role }}>{{ ' ' if m.role == 'assistant' else '' }}{{ m.content }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
THINKS = (
    "<s>{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}<think>\n</think>\n{% endif %}"
    "{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
DEAF = ROLES.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + ROLES


@pytest.fixture
def read(tiny, tmp_path):
    """A function: rows and options to the encoded rows, and the tokenizer."""
    lm = tiny("llama")

    def make(rows, template=ROLES, **options):
        lm.tokenizer.chat_template = template
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return load_rows(lm, DataOptions(eval_file=path, **options)), lm

    return make


def ids_of(lm, messages, **options):
    return lm.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize(
    "template", [ROLES, THINKS, CHATML, NAMED["plain"]], ids=["roles", "thinks", "chatml", "plain"]
)
def test_a_completion_is_the_assistants_turn_and_its_tokens_are_those_of_transformers(read, template, system):
    rows, lm = read(
        [{"prompt": "Say 1:\n", "completion": " one </s>"}], template, apply_chat_template=True, system_prompt=system
    )
    chat = [{"role": "system", "content": system}] * (system is not None)
    chat += [{"role": "user", "content": "Say 1:"}, {"role": "assistant", "content": "one"}]
    (encoded,) = rows.test
    whole, before = ids_of(lm, chat), ids_of(lm, chat[:-1], add_generation_prompt=True)
    (scored,) = encoded.candidates
    read_and_last = [*encoded.sequences[0], scored.tokens[-1]]
    assert read_and_last == whole[: len(read_and_last)]
    assert scored.positions[0] == len(before) - 1
    # What follows the end of the turn is a line break at most.
    assert lm.tokenizer.decode(whole[len(read_and_last) :]).strip() == ""


@pytest.mark.parametrize("template", [ROLES, THINKS], ids=["roles", "thinks"])
@pytest.mark.parametrize(
    "row",
    [
        {"text": "fine film", "label": "good"},
        {"prompt": "It rains", "choices": ["good wet", "good dry"], "label": 1},
    ],
    ids=["label", "choice"],
)
def test_words_and_choices_begin_the_assistants_answer(read, row, template):
    rows, lm = read([row, {**row, "label": "bad"} if "text" in row else row], template, apply_chat_template=True)
    asked = [{"role": "user", "content": "fine film\nLabel:" if "text" in row else "It rains"}]
    for encoded, words in zip(rows.test, [["bad", "good"] if "text" in row else row["choices"]] * 2, strict=True):
        for candidate, word in zip(encoded.candidates, words, strict=True):
            whole = ids_of(lm, [*asked, {"role": "assistant", "content": word}])
            ids = [*encoded.sequences[candidate.sequence], candidate.tokens[-1]]
            end = whole[len(ids) :]
            assert ids == whole[: len(ids)] and lm.tokenizer.decode(end).strip() == "</s>"
            assert lm.tokenizer.decode(list(candidate.tokens)).strip() == word


def test_a_prompt_alone_opens_the_answer(read, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judge_in_chat.py").write_text("def f(batch): return [0.0] * len(batch)\n", encoding="utf-8")
    rows, lm = read([{"prompt": "Hi </s>"}], apply_chat_template=True, objective="judge_in_chat:f")
    prompt = list(rows.test[0].prompt)
    assert lm.tokenizer.decode(prompt) == "<s><user>Hi </s></s>\n<assistant>"
    assert prompt.count(lm.tokenizer.eos_token_id) == 1  # that of the row stays plain text


def test_without_the_option_nothing_changes(read):
    row = [{"prompt": "a", "completion": " b"}]
    assert read(row, None)[0].test == read(row, ROLES)[0].test


def test_the_message_of_the_system_is_added_where_there_is_none(read):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": turns}, {"messages": [{"role": "system", "content": "Own."}, *turns]}]
    found, lm = read(rows, ROLES, system_prompt="Ours.")
    texts = [lm.tokenizer.decode(list(e.sequences[0])) for e in found.test]
    assert ["<system>Ours.</s>" in texts[0], "Ours." in texts[1], "<system>Own.</s>" in texts[1]] == [True, False, True]


def test_templates_that_swallow_the_system_are_told(read, tiny):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(UsageError, match="--system-prompt has no effect: the chat template leaves out"):
        read([{"messages": turns}], DEAF, system_prompt="Be brief.")
    with pytest.raises(UsageError, match="no system here"):
        read([{"messages": turns}], STRICT, system_prompt="Be brief.")
    rows, _ = read([{"messages": [{"role": "system", "content": "x"}, *turns]}, {"messages": turns}], DEAF)
    assert "the chat template leaves out the messages of the system, which 1 of 2 chats have" in rows.notes
    lm = tiny("llama")
    for template, outcome in ((ROLES, "written"), (DEAF, "left out")):
        lm.tokenizer.chat_template = template
        assert system_message(chat_template_of(DataOptions.model_construct(), lm.tokenizer)) == outcome


def test_options_of_chats_without_a_chat_are_refused(read):
    row = [{"prompt": "a", "completion": " b"}]
    for options in ({"chat_template": "plain"}, {"system_prompt": "x"}):
        with pytest.raises(UsageError, match=r"which no chat template writes.*--apply-chat-template"):
            read(row, None, **options)
    with pytest.raises(UsageError, match=r"line 1: the model's tokenizer has no chat template.*--chat-template"):
        read(row, None, apply_chat_template=True)
    with pytest.raises(UsageError, match="apply_chat_template has no effect on rows of plain text"):
        read([{"text": "a"}], ROLES, apply_chat_template=True)


def test_a_template_is_a_file_a_folder_a_name_or_a_text(tiny, tmp_path):
    tokenizer = tiny("llama").tokenizer
    (tmp_path / "mine.jinja").write_text(ROLES, encoding="utf-8")
    saved = with_template(tokenizer, ROLES)
    assert (saved.chat_template, tokenizer.chat_template) == (ROLES, None)
    saved.save_pretrained(tmp_path / "folder")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "tokenizer_config.json").write_text(json.dumps({"chat_template": ROLES}), encoding="utf-8")
    for given in (ROLES, tmp_path / "mine.jinja", tmp_path / "folder", tmp_path / "old"):
        assert template_source(str(given), tokenizer) == ROLES
    assert template_source("chatml", tokenizer) == "{{ bos_token }}" + CHATML  # it begins texts with <s>
    tokenizer.chat_template = {"default": CHATML, "short": ROLES}
    assert template_source("short", tokenizer) == ROLES


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("chatlm", r"no name of a template. Did you mean 'chatml'\?.*--template"),
        ("{% for m in messages %}", "no valid template of Jinja"),
        ("{{ text }}", "does not read the messages"),
        ("EMPTY", "has no chat template"),
        ("BROKEN", "tokenizer_config.json is not valid JSON"),
        ("LATIN", "is not UTF-8 text"),
    ],
)
def test_what_is_no_template_is_refused(tiny, tmp_path, given, message):
    for name in ("EMPTY", "BROKEN"):
        (tmp_path / name).mkdir()
    (tmp_path / "BROKEN" / "tokenizer_config.json").write_text("{", encoding="utf-8")
    (tmp_path / "LATIN").write_bytes(b"\xe9")
    with pytest.raises(UsageError, match=message):
        template_source(str(tmp_path / given) if given.isupper() else given, tiny("llama").tokenizer)


def test_the_saved_tokenizer_has_the_template_and_the_callers_has_not(tiny):
    from zotune.llm import evaluate, train

    lm = tiny("llama")
    chat = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 4
    options = {"max_steps": 1, "per_device_train_batch_size": 2, "chat_template": "plain"}
    result = train(lm.module, lm.tokenizer, chat, **options)
    assert lm.tokenizer.chat_template is None and NAMED["plain"] in result.tokenizer.chat_template
    with torch.no_grad():
        found = evaluate(result.model, result.tokenizer, chat)
    assert found.num_examples == 4
