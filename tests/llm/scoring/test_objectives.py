"""The objective is what its definition says, however it is batched, padded, shared or cut short.

Each score is held against a plain loop: tokenise prompt and candidate, run one unpadded sequence, take the
float64 log-softmax, average over the candidate's tokens.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from zotune.errors import UsageError
from zotune.llm.data.collator import collate
from zotune.llm.data.examples import Example
from zotune.llm.data.tokenization import Encoder
from zotune.llm.models.candidate_scores import RowsAlone, losses, scores
from zotune.llm.models.random_models import ARCHITECTURES, byte_tokenizer

SINGLE = (
    Example("a gorgeous film It was", (" terrible", " great"), 1),
    Example("dull It was", (" terrible", " great"), 0),
    Example("can a whale fly, or is it no bird at all?", (" No", " Yes", " Maybe"), 0),
)
MANY = (
    Example("The man broke his toe because", (" he got a hole in his sock", " he dropped a hammer"), 1),
    Example("It is", (" abc", " abd", " x", " a much longer answer"), 2),
    Example("one of two", (" terrible", " no good"), 0),
)
# The candidates of one example share all tokens but the last.
SHARED = (
    Example("It is", (" abc", " abd", " abe"), 1),
    Example("on a scale from ten to twenty:", (" 11", " 15"), 0),
)


def encode(lm, examples, max_length=None):
    encoder = Encoder(lm.tokenizer, masked=lm.masked, context=lm.context, max_length=max_length)
    return [encoder(example) for example in examples]


def batch_of(lm, examples, **options):
    return collate(encode(lm, examples, **options), lm.pad_token_id, torch.device("cpu"))


@torch.no_grad()
def scored(lm, examples):
    return lm.score(batch_of(lm, examples))


def one_point(compute, inputs, owners):
    """The rows alone, at the weights as they are."""
    (rows,) = inputs
    return torch.stack([compute(row) for row in rows.split(1)])[None]


def cross_entropy(values, label):
    return math.log(sum(math.exp(v) for v in values)) - values[label]


@pytest.mark.parametrize("examples", [MANY, SINGLE + MANY], ids=["several tokens", "mixed"])
def test_scores_are_mean_log_probabilities_of_the_candidates_tokens(tiny, causal_family, examples, plain_score):
    lm = tiny(causal_family)
    got = scored(lm, examples)
    for example, row in zip(examples, got.tolist(), strict=True):
        expected = [plain_score(lm, example.prompt, c) for c in example.candidates]
        assert row[: len(expected)] == pytest.approx(expected, abs=2e-6)
        assert row[len(expected) :] == [-math.inf] * (got.shape[1] - len(expected))


def test_single_tokens_need_no_vocabulary(tiny, causal_family, plain_score):
    """Scores differ from log-probabilities by a constant an example, so losses and predictions are the same."""
    lm = tiny(causal_family)
    batch = batch_of(lm, SINGLE)
    assert batch.only_single_tokens
    with torch.no_grad():
        short, full = lm.score(batch), scores(lm.logits(batch), batch)
    for example, few, all_of_them in zip(SINGLE, short.tolist(), full.tolist(), strict=True):
        expected = [plain_score(lm, example.prompt, c) for c in example.candidates]
        n = len(expected)
        assert all_of_them[:n] == pytest.approx(expected, abs=2e-6)
        assert [x - few[0] for x in few[:n]] == pytest.approx([x - expected[0] for x in expected], abs=2e-6)
    expected = [cross_entropy([plain_score(lm, e.prompt, c) for c in e.candidates], e.label) for e in SINGLE]
    assert losses(short, batch).tolist() == pytest.approx(expected, abs=2e-6)
    assert losses(full, batch).tolist() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("alone", [False, True], ids=["one batch", "rows alone"])
@pytest.mark.parametrize("examples", [SHARED, SHARED + SINGLE, SHARED + MANY], ids=["shared", "single", "several"])
def test_tokens_that_all_candidates_share_cancel(tiny, causal_family, examples, alone, plain_score):
    """Labels such as ` 1` and ` 5` are a space and a digit to many tokenizers: only the digits are told apart."""
    lm = tiny(causal_family)
    batch = batch_of(lm, examples)
    assert batch.needs_only_candidates == (examples != SHARED + MANY)
    assert len(batch.tokens) < sum(len(c.tokens) for e in encode(lm, examples) for c in e.candidates)
    if alone:
        lm.rows_alone = RowsAlone(one_point, [i for i, e in enumerate(encode(lm, examples)) for _ in e.sequences])
    with torch.no_grad():
        got = lm.score(batch).reshape(len(examples), -1)
    expected = [[plain_score(lm, e.prompt, c) for c in e.candidates] for e in examples]
    for want, few in zip(expected, got.tolist(), strict=True):
        assert [x - few[0] for x in few[: len(want)]] == pytest.approx([x - want[0] for x in want], abs=3e-6)
    of_each = [cross_entropy(want, e.label) for want, e in zip(expected, examples, strict=True)]
    assert losses(got, batch).tolist() == pytest.approx(of_each, abs=3e-6)


def test_shared_tokens_count_where_scores_are_exact(tiny, plain_score):
    lm = tiny("llama")
    batch = collate(encode(lm, SHARED), lm.pad_token_id, torch.device("cpu"), exact=True)
    assert len(batch.tokens) == int(batch.lengths.sum())
    with torch.no_grad():
        got = lm.score(batch)
    for e, row in zip(SHARED, got.tolist(), strict=True):
        assert row[: len(e.candidates)] == pytest.approx([plain_score(lm, e.prompt, c) for c in e.candidates], abs=2e-6)


@pytest.mark.parametrize("examples", [SINGLE, MANY], ids=["single tokens", "several tokens"])
def test_a_batch_is_its_examples_one_by_one(tiny, family, examples):
    lm = tiny(family)
    if lm.masked:
        examples = SINGLE
    together = scored(lm, examples)
    for i, example in enumerate(examples):
        n = len(example.candidates)
        torch.testing.assert_close(together[i, :n], scored(lm, [example])[0], rtol=0, atol=1e-6)


def test_candidates_that_differ_in_their_last_token_share_one_sequence_and_one_pass(tiny, causal_family):
    lm = tiny(causal_family)
    seen = []
    handle = lm.module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    scored(lm, SINGLE)
    scored(lm, [Example("It is", (" abc", " abd", " abe"), 0)])
    handle.remove()
    assert [shape[0] for shape in seen] == [len(SINGLE), 1]
    assert lm.num_forwards == 2


def test_the_last_token_of_a_candidate_is_predicted_and_never_read(tiny):
    lm = tiny("llama")
    (encoded,) = encode(lm, [Example("It is", (" abc",), 0)])
    ids = lm.tokenizer("It is abc")["input_ids"]
    assert encoded.sequences == (tuple(ids[:-1]),)
    assert encoded.candidates[0].tokens == tuple(ids[-4:])
    assert encoded.candidates[0].positions == tuple(range(len(ids) - 5, len(ids) - 1))


# Text that means itself: no surrogates or special tokens, and no characters whose bytes a vocabulary may lack.
TEXT = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Cn", "Co"], exclude_characters="<>|"), min_size=1, max_size=20
)


def assert_option_is_what_follows_the_prompt(tokenizer, prompt, candidate):
    encoder = Encoder(tokenizer, masked=False, context=10_000, max_length=None)
    encoded = encoder(Example(prompt, (candidate,), 0))
    (found,), (read,) = encoded.candidates, encoded.sequences
    assert [*read, found.tokens[-1]] == tokenizer(prompt + candidate)["input_ids"]
    assert [*read, found.tokens[-1]][-len(found.tokens) :] == list(found.tokens)
    assert list(found.positions) == list(range(len(read) - len(found.tokens), len(read)))
    decoded = tokenizer.decode(found.tokens, clean_up_tokenization_spaces=False)
    assert decoded.endswith(candidate)
    # Only the first token may begin in the prompt, where its end merges with the candidate.
    offsets = tokenizer(prompt + candidate, return_offsets_mapping=True)["offset_mapping"]
    starts = [start for start, _ in offsets[-len(found.tokens) :]]
    assert all(start >= len(prompt) for start in starts[1:])
    assert starts[0] >= len(prompt) or decoded != candidate


@given(prompt=TEXT, candidate=TEXT.map(lambda t: f" {t}"))
@settings(max_examples=100, deadline=None)
def test_option_tokens_decode_to_the_candidate(prompt, candidate):
    assert_option_is_what_follows_the_prompt(byte_tokenizer(ARCHITECTURES["llama-tiny"]()), prompt, candidate)


@given(prompt=TEXT, candidate=TEXT)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_option_tokens_decode_to_the_candidate_where_tokens_merge(smollm2, prompt, candidate):
    """With a real vocabulary, also where the candidate has no leading space and merges with the prompt's end."""
    try:
        assert_option_is_what_follows_the_prompt(smollm2.tokenizer, prompt, candidate)
    except UsageError:  # their first token is in both: there is nothing to predict it from
        first_token_ends = smollm2.tokenizer(prompt + candidate, return_offsets_mapping=True)["offset_mapping"][0][1]
        assert first_token_ends > len(prompt)


@pytest.mark.parametrize("examples", [SINGLE, MANY], ids=["single tokens", "several tokens"])
def test_half_precision_models_are_scored_in_single_precision_or_better(tiny, causal_family, examples):
    lm = tiny(causal_family, "bfloat16")
    batch = batch_of(lm, examples)
    with torch.no_grad():
        logits, loss = lm.logits(batch), lm.losses(batch)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float64
    table, owner, expected = torch.log_softmax(logits.double(), dim=1), 0, []
    for count, label in zip(batch.counts, batch.labels.tolist(), strict=True):
        values = []
        for candidate in range(owner, owner + count):
            mine = batch.owners == candidate
            values.append(float(table[batch.rows[mine], batch.tokens[mine]].mean()))
        expected.append(cross_entropy(values, label))
        owner += count
    # bfloat16 has three digits; these are seven.
    assert loss.tolist() == pytest.approx(expected, rel=2e-7 if examples is SINGLE else 2e-6)


def test_the_head_sees_only_scored_positions(tiny, family):
    lm = tiny(family)
    shapes = []
    handle = lm.module.get_output_embeddings().register_forward_hook(lambda *call: shapes.append(call[2].shape))
    scored(lm, SINGLE)
    words = len({word for example in SINGLE for word in example.candidates})
    assert shapes.pop() == (len(SINGLE), words)
    if not lm.masked:
        scored(lm, MANY)
        positions = len(batch_of(lm, MANY).positions)
        assert shapes.pop() == (positions, lm.config.vocab_size)
        assert positions < sum(len(s) for e in encode(lm, MANY) for s in e.sequences)
    handle.remove()


def state_of(module):
    """Every hook and every replaced `forward` of a module and those within."""
    return [
        (name, vars(m).get("forward"), *(tuple(v) for k, v in vars(m).items() if k.endswith("_hooks")))
        for name, m in module.named_modules()
    ]


def test_a_call_leaves_no_hook_behind_even_when_it_fails(tiny, family):
    lm = tiny(family)
    batches = [batch_of(lm, SINGLE)] if lm.masked else [batch_of(lm, SINGLE), batch_of(lm, MANY)]
    before = state_of(lm.module)
    for batch in batches:
        with torch.no_grad():
            lm.score(batch)
        assert state_of(lm.module) == before

    def fail(*_):
        raise RuntimeError("no")

    deepest = [m for _, m in lm.module.named_modules() if isinstance(m, torch.nn.LayerNorm | torch.nn.Linear)][-1]
    for batch in batches:
        handle = deepest.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="no"):
            lm.score(batch)
        handle.remove()
        assert state_of(lm.module) == before


def test_no_cache_of_keys_and_values_is_built(tiny, causal_family, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a cache was built")

    lm = tiny(causal_family)
    monkeypatch.setattr(DynamicCache, "__init__", refuse)
    with pytest.raises(AssertionError, match="a cache was built"):
        lm.module(torch.tensor([[1, 2]]), use_cache=True)
    assert scored(lm, SINGLE).shape == (3, 3)


@torch.no_grad()
def test_masked_models_are_scored_at_the_mask(tiny):
    lm = tiny("roberta")
    examples = [
        Example("a gorgeous film It was", (" terrible", " great"), 1, "."),
        Example("dull It was", (" terrible", " great"), 0, "."),
    ]
    got = scored(lm, examples)
    for example, row in zip(examples, got, strict=True):
        ids = lm.tokenizer(f"{example.prompt}<mask>{example.suffix}")["input_ids"]
        logits = lm.module(torch.tensor([ids])).logits[0, ids.index(lm.tokenizer.mask_token_id)]
        words = [lm.tokenizer.convert_tokens_to_ids(word) for word in example.candidates]
        expected = logits.double().log_softmax(0)[words]
        torch.testing.assert_close(row - row[0], expected - expected[0], rtol=0, atol=1e-6)


def test_a_mask_in_the_text_is_not_the_one_that_is_filled_in(tiny):
    lm = tiny("roberta")
    (encoded,) = encode(lm, [Example("a <mask> film It was", (" great",), 0, ".")])
    mask = lm.tokenizer.mask_token_id
    last = max(i for i, token in enumerate(encoded.sequences[0]) if token == mask)
    assert encoded.candidates[0].positions == (last,)


def test_masked_models_take_words_of_one_token(tiny):
    with pytest.raises(UsageError, match=r"' awful' has 6 tokens"):
        encode(tiny("roberta"), [Example("It was", (" awful",), 0)])


@pytest.mark.parametrize("candidates", [(" great",), (" abcd", " abc")])
def test_long_prompts_are_cut_from_the_left_and_keep_their_first_token(tiny, candidates):
    lm = tiny("llama")
    example = Example("a very long prompt that does not fit", candidates, 0)
    (whole,), (cut,) = encode(lm, [example]), encode(lm, [example], max_length=12)
    assert {len(s) for s in cut.sequences} == {12}
    for before, after in zip(whole.candidates, cut.candidates, strict=True):
        full, short = whole.sequences[before.sequence], cut.sequences[after.sequence]
        assert short == (lm.tokenizer.bos_token_id, *full[-11:])
        assert after.tokens == before.tokens
        assert [short[p] for p in after.positions] == [full[p] for p in before.positions]


def test_masked_prompts_are_cut_from_the_left_and_keep_their_mask(tiny):
    lm = tiny("roberta")
    example = Example("a very long prompt that does not fit It was", (" great",), 0, ".")
    (whole,), (cut,) = encode(lm, [example]), encode(lm, [example], max_length=12)
    assert cut.sequences[0] == (whole.sequences[0][0], *whole.sequences[0][-11:])
    assert cut.sequences[0][cut.candidates[0].positions[0]] == lm.tokenizer.mask_token_id


def test_prompts_longer_than_the_model_reads_are_refused_with_the_remedy(tiny, family):
    lm = tiny(family)
    limit = lm.config.max_position_embeddings - (2 if family == "roberta" else 0)
    special = 4 if family == "roberta" else 2  # its <s>, <mask>, "." and </s>; <s> and " " alone in the others
    words = (" great",)
    fits = Example("x" * (limit - special + (family != "roberta")), words, 0, "." if lm.masked else "")
    assert len(encode(lm, [fits])[0].sequences[0]) == limit
    assert torch.isfinite(scored(lm, [fits])).all()
    long = Example("x" + fits.prompt, words, 0, fits.suffix)
    with pytest.raises(UsageError, match=f"an example has {limit + 1} tokens.*at most {limit}.*--max-length {limit}"):
        encode(lm, [long])
    with pytest.raises(UsageError, match="--max-length 8 leaves no token of the prompt"):
        encode(tiny("llama"), [Example("It", (" a far too long answer",), 0)], max_length=8)
