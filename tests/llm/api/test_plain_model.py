"""A cell of a notebook can be run again: what an earlier train() put into the model is left out, and stays as it is."""

import pytest
import torch

from zotune.errors import UsageError
from zotune.llm import evaluate, generate, load, train

ROWS = [{"text": text, "label": "yes" if i % 2 else "no"} for i, text in enumerate("abcdefgh")]
OPTIONS = {"learning_rate": 1.0, "max_steps": 2, "per_device_train_batch_size": 4}


@pytest.fixture
def loaded():
    return load("random:llama-tiny", device="cpu")


@pytest.mark.parametrize("options", [{}, {"tuning": "peft", "peft_type": "ia3"}], ids=["lora", "ia3"])
def test_a_second_call_gives_the_bits_of_the_first_and_leaves_its_result_alone(loaded, options, capsys):
    before = evaluate(*loaded, ROWS)
    text = generate(*loaded, "a", max_new_tokens=3)
    first = train(*loaded, ROWS, ROWS, **OPTIONS, **options)
    tuned = [p.clone() for p in first.model.parameters()]
    capsys.readouterr()
    # The plain model, though its modules hold the adapter.
    assert evaluate(*loaded, ROWS).scores == before.scores != first.test.scores
    assert generate(*loaded, "a", max_new_tokens=3) == text
    assert "holds the adapter of an earlier train(), and is read without it" in capsys.readouterr().err
    second = train(*loaded, ROWS, ROWS, **OPTIONS, **options)
    assert second.test.scores == first.test.scores
    other = train(*loaded, ROWS, ROWS, **{**OPTIONS, "learning_rate": 3.0}, **options)
    assert all(map(torch.equal, first.model.parameters(), tuned))
    for result in (first, second, other):
        assert evaluate(result.model, loaded[1], ROWS).scores == result.test.scores
    assert other.test.scores != first.test.scores


def test_the_weights_are_shared_with_the_callers_model(loaded):
    model, tokenizer = loaded
    train(model, tokenizer, ROWS, **OPTIONS)
    again = train(model, tokenizer, ROWS, **OPTIONS)
    ours = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for n, p in again.model.named_parameters() if "lora_" not in n} <= ours


def test_the_result_is_tuned_on_and_the_plain_model_is_not_named(loaded, capsys):
    first = train(*loaded, ROWS, **OPTIONS)
    more = train(first.model, loaded[1], ROWS, **OPTIONS)
    assert more.model is first.model
    train(first.model.unload(), loaded[1], ROWS, **OPTIONS)
    assert "earlier train()" not in capsys.readouterr().err


@pytest.mark.parametrize("tuning", ["full", "head"])
def test_weights_under_an_adapter_are_not_tuned(loaded, tuning):
    train(*loaded, ROWS, **OPTIONS)
    with pytest.raises(UsageError, match=r"an earlier train\(\) put an adapter on them.*merge_and_unload"):
        train(*loaded, ROWS, tuning=tuning, max_steps=1)


def test_an_adapter_of_somebody_else_and_a_bound_model_are_refused_as_before(loaded):
    from peft import LoraConfig, get_peft_model

    model, tokenizer = loaded
    with pytest.raises(UsageError, match="has layers of an adapter in it"):
        get_peft_model(model, LoraConfig(r=2))
        train(model, tokenizer, ROWS, max_steps=1)
    model, tokenizer = load("random:llama-tiny", device="cpu")
    train(model, tokenizer, ROWS, **OPTIONS)
    model.model.forward = model.model.forward  # as accelerate's hooks do
    with pytest.raises(UsageError, match="has layers of an adapter in it"):
        train(model, tokenizer, ROWS, max_steps=1)


def test_a_short_max_length_is_told_apart_from_that_of_transformers(loaded):
    with pytest.raises(UsageError, match="give max_new_tokens=5"):
        generate(*loaded, "a", max_length=5)


def test_messages_on_a_loaded_model_name_arguments(loaded, capsys):
    train(*loaded, ROWS, max_steps=1, learning_rate=100.0)
    said = capsys.readouterr().err
    assert "learning_rate auto" in said
    assert "--" not in said
