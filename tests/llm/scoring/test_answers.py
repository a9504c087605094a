"""Generated answers are greedy decoding up to a newline, and F1 and exact match are SQuAD's."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zotune.llm.data.examples import Example
from zotune.llm.data.tokenization import Encoder
from zotune.llm.scoring.generated_answers import evaluate_answers, exact_match, f1, normalised
from zotune.llm.scoring.generation import generate
from zotune.llm.scoring.intervals import mean_interval, wilson

EXAMPLES = (
    Example("Question: who?\nAnswer:", (" abc\n",), 0, answers=("abc", "the abc")),
    Example("Answer:", (" x\n",), 0, answers=("x",)),
    Example("A longer prompt.\nQuestion: what is it, then?\nAnswer:", (" a b\n",), 0, answers=("a b",)),
)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected_f1", "expected_match"),
    [
        ("Denver Broncos", ["Denver Broncos"], 1, 1),
        ("the denver broncos!", ["Denver Broncos"], 1, 1),
        ("Broncos", ["Denver Broncos"], 2 / 3, 0),
        ("the the a", ["an"], 0, 0),
        ("A.", ["a"], 1, 1),
        ("", ["A"], 0, 0),
        ("the", ["A", "B"], 0, 0),
        ("b", ["A", "B"], 1, 1),
        ("?", ["!"], 0, 0),
        ("?", [" ? "], 1, 1),
        ("", [""], 1, 1),
        ("", ["x"], 0, 0),
        ("x", ["the"], 0, 0),
        ("10,000 people", ["over 10,000"], 0.5, 0),
        ("b b a c", ["b c", "q"], 0.8, 0),
        ("b b c", ["b c c"], 2 / 3, 0),
        ("no", ["yes", "No."], 1, 1),
        ("another", ["other"], 0, 0),
    ],
)
def test_f1_and_exact_match_by_hand(prediction, answers, expected_f1, expected_match):
    assert f1(prediction, answers) == pytest.approx(expected_f1)
    assert exact_match(prediction, answers) == expected_match


WORDS = st.lists(st.sampled_from(["b", "c", "d", "The", "x.", "An", "!"]), max_size=6).map(" ".join)


@given(WORDS, WORDS, WORDS)
def test_f1_has_the_properties_of_an_overlap(a, b, c):
    assert f1(a, [b]) == f1(b, [a])
    assert 0 <= f1(a, [b]) <= 1
    assert f1(a, [b, c]) == max(f1(a, [b]), f1(a, [c])) >= exact_match(a, [b, c])
    same_bag = Counter(normalised(a).split()) == Counter(normalised(b).split())
    assert (f1(a, [b]) == 1) == same_bag
    assert normalised(normalised(a)) == normalised(a)
    # Precision and recall, as written.
    x, y = normalised(a).split(), normalised(b).split()
    common = sum((Counter(x) & Counter(y)).values())
    if common:
        precision, recall = common / len(x), common / len(y)
        assert f1(a, [b]) == pytest.approx(2 * precision * recall / (precision + recall))


def test_the_interval_of_a_mean_covers_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(1000):
        values = torch.rand(200, generator=generator).square().tolist()
        low, high = mean_interval(values)
        covered += low <= 1 / 3 <= high
    assert abs(covered / 1000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 1000)
    assert mean_interval([0.3]) == (0.0, 1.0)


@pytest.mark.parametrize("n", [2, 5, 20])
def test_the_interval_of_equal_values_is_that_of_as_many_right_or_wrong_answers(n):
    """Of so few rows that all agree the truth is still open, so an interval without a width would be false."""
    for value in (0, 1):
        assert mean_interval([float(value)] * n) == wilson(value * n, n)
    rate = 0.9
    intervals = [mean_interval([1.0] * hits + [0.0] * (n - hits)) for hits in range(n + 1)]
    chances = [math.comb(n, hits) * rate**hits * (1 - rate) ** (n - hits) for hits in range(n + 1)]
    if n > 2:
        assert sum(p for p, (low, high) in zip(chances, intervals, strict=True) if low <= rate <= high) > 0.85
    low, high = mean_interval([0.1] * n)
    assert low < 0.1 < high
    assert mean_interval([0.1] * n, -math.inf, math.inf) == pytest.approx((0.1, 0.1))


def encode(lm):
    encoder = Encoder(lm.tokenizer, masked=False, context=lm.context, max_length=None)
    return [encoder(example) for example in EXAMPLES]


@torch.no_grad()
def greedy(lm, ids, n):
    """Without a cache, one sequence, the best token at a time."""
    ids = list(ids)
    for _ in range(n):
        ids.append(int(lm.module(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == lm.tokenizer.eos_token_id or "\n" in lm.tokenizer.decode([ids[-1]]):
            break
    return ids


@pytest.mark.parametrize("n", [1, 12])
def test_generation_in_a_batch_is_the_best_token_at_a_time(tiny, causal_family, n):
    lm = tiny(causal_family)
    prompts = [e.prompt for e in encode(lm)]
    expected = [lm.tokenizer.decode(greedy(lm, p, n)[len(p) :], skip_special_tokens=True) for p in prompts]
    assert generate(lm, prompts, n) == [text.split("\n")[0].strip() for text in expected]


def test_the_prompt_of_an_answer_is_the_prompts_own_tokens(tiny):
    lm = tiny("llama")
    for e, example in zip(encode(lm), EXAMPLES, strict=True):
        assert list(e.prompt) == lm.tokenizer(example.prompt)["input_ids"]


@pytest.mark.parametrize("stop", ["\n", "</s>"])
def test_generation_stops_at_a_newline_or_the_end_of_text(tiny, stop):
    """The head is made to prefer x, and at the third new token of the batch what stops it."""
    lm = tiny("llama")
    (x,), (end,) = (lm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("x", stop))
    calls = []

    def prefer(module, args, logits):
        calls.append(1)
        logits[..., end if len(calls) == 3 else x] += 1e6
        return logits

    lm.module.get_output_embeddings().register_forward_hook(prefer)
    lm.module.generation_config.eos_token_id = None
    assert generate(lm, [e.prompt for e in encode(lm)]) == ["xx"] * 3
    assert len(calls) == lm.num_forwards == 3


def test_at_most_fifty_tokens_are_generated(tiny):
    lm = tiny("llama")
    (x,) = lm.tokenizer("x", add_special_tokens=False)["input_ids"]

    def prefer(module, args, logits):
        logits[..., x] += 1e6
        return logits

    lm.module.get_output_embeddings().register_forward_hook(prefer)
    assert generate(lm, [encode(lm)[0].prompt]) == ["x" * 50]


def test_a_checkpoints_own_sampling_does_not_enter(tiny):
    lm = tiny("llama")
    prompts = [e.prompt for e in encode(lm)]
    before = generate(lm, prompts, 8)
    for name, value in {
        "do_sample": True,
        "temperature": 5.0,
        "repetition_penalty": 3.0,
        "no_repeat_ngram_size": 1,
    }.items():
        setattr(lm.module.generation_config, name, value)
    assert generate(lm, prompts, 8) == before


def test_prompts_are_cut_to_leave_room_for_the_answer(tiny):
    lm = tiny("llama")
    example = Example("y" * 300, (" x\n",), 0, answers=("x",))
    encoded = Encoder(lm.tokenizer, masked=False, context=lm.context, max_length=100)(example)
    assert len(encoded.prompt) == 50 and encoded.prompt[0] == lm.tokenizer.bos_token_id
    assert encoded.length == 100


@pytest.mark.sample(2)
@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_evaluations_are_means_over_examples_in_their_order(tiny, batch_size):
    lm = tiny("opt")
    encoded = encode(lm)
    found = evaluate_answers(lm, encoded, batch_size)
    texts = [generate(lm, [e.prompt])[0] for e in encoded]
    assert found.predictions == tuple(texts)
    scores = [f1(text, e.answers) for text, e in zip(texts, EXAMPLES, strict=True)]
    assert found.f1 == found.value == pytest.approx(sum(scores) / 3)
    assert found.exact_match == pytest.approx(
        sum(exact_match(t, e.answers) for t, e in zip(texts, EXAMPLES, strict=True)) / 3
    )
    assert next(iter(found.summary())) == "f1" and "predictions" not in found.summary()
