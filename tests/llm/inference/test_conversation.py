"""A chat is what was said in it: each answer is that to the whole chat so far, until the model can read no more."""

import pytest

from zotune.errors import UsageError
from zotune.llm.config.generate import ChatConfig
from zotune.llm.inference.conversation import Conversation
from zotune.llm.scoring.streaming import Stream

TURNS = (
    "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }};{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


@pytest.fixture
def chat(tiny):
    """A function: options to a chat with a tiny model."""

    def make(**options):
        lm = tiny("llama")
        lm.tokenizer.chat_template = TURNS
        return Conversation(lm, ChatConfig(max_new_tokens=6, **options))

    return make


def answer(chat, text):
    pieces = []
    said = chat.answer(text, Stream(pieces.append))
    assert "".join(pieces).strip() == said
    return said


def plain_answer(lm, text, number=6):
    """What transformers generates after a text, greedily."""
    ids = lm.tokenizer(text, return_tensors="pt", add_special_tokens=False)
    out = lm.module.generate(**ids, max_new_tokens=number, do_sample=False)[0, ids.input_ids.shape[1] :]
    return lm.tokenizer.decode(out, skip_special_tokens=True).strip()


def test_an_answer_is_that_to_the_whole_chat(chat):
    talk = chat(system_prompt="S")
    one = answer(talk, "Hi")
    assert one == plain_answer(talk.lm, "[s]S;[u]Hi;[a]")
    two = answer(talk, "Ho")
    assert two == plain_answer(talk.lm, f"[s]S;[u]Hi;[a]{one};[u]Ho;[a]")
    assert [m["content"] for m in talk.messages] == ["Hi", one, "Ho", two]
    talk.reset()
    assert answer(talk, "Hi") == one


def test_a_stopped_answer_belongs_to_the_chat_as_far_as_it_goes(chat):
    talk = chat()
    whole = answer(chat(), "Hi")
    part = talk.answer("Hi", Stream(lambda text: None, lambda: True))
    assert part and whole.startswith(part) and whole != part
    assert talk.messages[-1] == {"role": "assistant", "content": part}


def test_the_oldest_messages_leave_a_chat_that_is_too_long(chat, capsys):
    talk = chat(max_length=None)
    long = "x" * (talk.lm.context // 2)
    one = answer(talk, "first")
    assert talk.messages[0]["content"] == "first"
    answer(talk, long)
    answer(talk, long)
    assert talk.messages[0]["content"] == long
    assert one not in [m["content"] for m in talk.messages]
    assert "its oldest messages (2 of yours) are left out" in capsys.readouterr().err
    before = list(talk.messages)
    with pytest.raises(UsageError, match="the model reads at most"):
        answer(talk, 2 * long + "x")
    assert talk.messages == before


def test_a_chat_that_the_template_rejects_keeps_its_messages(chat, capsys):
    talk = chat()
    answer(talk, "Hi")
    before = list(talk.messages)
    reject = "{% if messages | length > 1 %}{{ raise_exception('one message only') }}{% endif %}"
    talk.lm.tokenizer.chat_template = reject + TURNS
    with pytest.raises(UsageError, match="one message only"):
        answer(talk, "Ho")
    assert talk.messages == before
    assert "too long" not in capsys.readouterr().err


def test_sampled_answers_depend_on_the_seed_and_the_place_in_the_chat(chat):
    said = [answer(chat(temperature=3.0, seed=seed), "Hi") for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


@pytest.mark.parametrize(("family", "message"), [("llama", "no chat template"), ("roberta", "does not continue text")])
def test_a_model_that_cannot_chat_says_why(tiny, family, message):
    with pytest.raises(UsageError, match=message):
        Conversation(tiny(family), ChatConfig())
