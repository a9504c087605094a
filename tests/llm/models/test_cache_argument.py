"""A model's cache goes by the name that the model has for it, and text behind virtual tokens is that of full passes."""

import copy
import gc
import inspect

import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache

from zotune.llm.config.run import TrainConfig
from zotune.llm.models.activation_storage.tiers import ActivationStore, MemoryTier
from zotune.llm.models.adapters import virtual_tokens
from zotune.llm.models.cache_argument import accept_old_name, cache_argument, cache_in_call
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.models.load import quiet_libraries
from zotune.llm.models.prompt_cache import PromptCache
from zotune.llm.models.random_models import byte_tokenizer
from zotune.llm.models.tuned_parameters import prepare_tuning
from zotune.llm.scoring.generation import Sampling, generate, uniform
from zotune.model.layers import stack_of

FAMILIES = ["llama", "opt", "qwen3", "gpt2"]
each_family = pytest.mark.parametrize("kind", FAMILIES)
PROMPTS = ["It was a film", "So", "A film, it"]
NEW_TOKENS = 7


class Old(nn.Module):
    def forward(self, input_ids, past_key_values=None, **kwargs):
        return past_key_values, kwargs


class New(nn.Module):
    def forward(self, input_ids, cache=None, attention_mask=None, **kwargs):
        return cache, kwargs


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.base_model = New()

    def forward(self, input_ids, **kwargs):
        return self.base_model(input_ids, **kwargs)


@pytest.fixture
def small(tiny):
    """A function: a family to a tiny random model; of GPT-2 too, whose layers get the cache by position."""

    def make(kind):
        if kind != "gpt2":
            return tiny(kind)
        quiet_libraries()
        sizes = {"vocab_size": 384, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4}
        config = transformers.GPT2Config(bos_token_id=0, eos_token_id=2, pad_token_id=1, **sizes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = transformers.AutoModelForCausalLM.from_config(config).eval()
        return LanguageModel(module, byte_tokenizer(config), "gpt2", masked=False)

    return make


def prepared(lm, **options):
    prepare_tuning(lm, TrainConfig.model_validate({"task": "sst2", **options}))
    return lm


def moved(lm, scale=0.3):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in lm.module.parameters():
            if p.requires_grad:
                p += scale * torch.randn(p.shape, generator=generator).to(p.dtype)
    return lm


def prompts_of(lm):
    return [tuple(lm.tokenizer(text)["input_ids"]) for text in PROMPTS]


@torch.no_grad()
def continued(lm, prompt, logits_of, seed=None):
    """The text that follows a prompt, from the logits of a full pass for each token; drawn where there is a seed."""
    ids = list(prompt)
    for position in range(NEW_TOKENS):
        scores = logits_of(torch.tensor([ids]))[0, -1]
        if seed is None:
            ids.append(int(scores.argmax()))
        else:
            cumulative = scores.double().softmax(0).cumsum(0)
            ids.append(int((cumulative <= uniform(seed, position) * cumulative[-1]).sum()))
        if ids[-1] == lm.tokenizer.eos_token_id or "\n" in lm.tokenizer.decode([ids[-1]]):
            break
    text = lm.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
    return text.split("\n")[0].strip()


def behind_a_prompt(lm):
    """A full pass behind tuned embeddings, by the plain model and without any cache."""
    rows = next(p for p in lm.module.parameters() if p.requires_grad)

    def logits_of(ids):
        embedded = torch.cat([rows[None], lm.base.get_input_embeddings()(ids)], 1)
        return lm.base(inputs_embeds=embedded, use_cache=False).logits

    return logits_of


def behind_a_prefix(lm):
    """A full pass behind tuned keys and values, which are put into a cache of their own each time."""
    rows = next(p for p in lm.module.parameters() if p.requires_grad)
    size = getattr(lm.config, "head_dim", None) or lm.config.hidden_size // lm.config.num_attention_heads
    tuned = rows.reshape(len(rows), lm.config.num_hidden_layers, 2, -1, size)

    def logits_of(ids):
        cache = DynamicCache()
        for i in range(lm.config.num_hidden_layers):
            # (virtual tokens, heads, size) → (1, heads, virtual tokens, size)
            keys, values = (tuned[:, i, j].transpose(0, 1)[None] for j in (0, 1))
            cache.update(keys, values, i)
        mask = torch.ones(1, len(rows) + ids.shape[1], dtype=torch.long)
        return lm.base(input_ids=ids, attention_mask=mask, **{cache_argument(lm.base): cache}).logits

    return logits_of


# The name --------------------------------------------------------------------------------------------------


def test_a_model_says_by_its_signature_which_name_it_takes():
    assert cache_argument(Old()) == "past_key_values"
    assert cache_argument(New()) == cache_argument(Classifier()) == "cache"
    wrapped = New()
    wrapped.forward = lambda *args, **kwargs: None
    assert cache_argument(wrapped) == "cache"
    with pytest.raises(TypeError, match=r"Linear.forward takes no cache: none of cache, past_key_values"):
        cache_argument(nn.Linear(1, 1))


@each_family
def test_models_and_layers_of_transformers_have_one_of_the_names(small, kind):
    lm = small(kind)
    for module in (lm.base, stack_of(lm.base)[1][0]):
        assert cache_argument(module) in ("cache", "past_key_values")


@pytest.mark.parametrize(("args", "kwargs"), [((1, 2), {}), ((1,), {"cache": 2}), ((1, 2, 3), {"output_x": 4})])
def test_the_cache_of_a_call_is_found_by_position_and_by_name(args, kwargs):
    assert cache_in_call(New(), args, kwargs) == 2
    assert cache_in_call(New(), (1,), {"output_x": 4}) is None


def test_a_model_that_takes_either_name_computes_the_same_and_says_so():
    for model in (New(), Classifier()):
        accept_old_name(model)
        accept_old_name(model)
        assert model(0, past_key_values=1) == model(0, cache=1) == (1, {})
        assert model(0) == (None, {})
    names = list(inspect.signature(model.base_model.forward).parameters)
    assert names == ["input_ids", "cache", "attention_mask", "past_key_values", "kwargs"]
    old = Old()
    accept_old_name(old)
    assert "forward" not in vars(old) and old(0, past_key_values=1) == (1, {})


def test_a_copy_of_a_model_that_takes_either_name_runs_on_its_own_weights():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(2.0))

        def forward(self, x, cache=None):
            return (self.weight * x + cache).item()

    model = Scaled()
    accept_old_name(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.weight.fill_(10.0)
    del model
    gc.collect()
    assert other(1.0, past_key_values=1.0) == 11.0


# Text behind virtual tokens --------------------------------------------------------------------------------


@pytest.mark.sample(3)
@each_family
@pytest.mark.parametrize("tuning", ["prompt", "prefix"])
@pytest.mark.parametrize("seed", [None, 5], ids=["greedy", "drawn"])
def test_text_behind_virtual_tokens_is_that_of_a_full_pass_for_each_token(small, kind, tuning, seed):
    lm = moved(prepared(small(kind), tuning=tuning, num_virtual_tokens=4))
    prompts = prompts_of(lm)
    logits_of = (behind_a_prompt if tuning == "prompt" else behind_a_prefix)(lm)
    expected = [continued(lm, p, logits_of, seed) for p in prompts]
    sampling = None if seed is None else Sampling(temperature=1.0, top_p=1.0, seeds=(seed,) * len(prompts))
    assert generate(lm, prompts, NEW_TOKENS, sampling=sampling) == expected
    # The virtual tokens are read: without them the text is another.
    assert expected != [continued(lm, p, lambda ids: lm.base(ids, use_cache=False).logits, seed) for p in prompts]


@pytest.mark.sample(2)
@each_family
def test_text_behind_a_fresh_prefix_is_that_behind_the_tokens_it_was_made_of(small, kind):
    """Here no cache takes part in what is expected."""
    lm = prepared(small(kind), tuning="prefix", num_virtual_tokens=4, seed=3)
    tokens = virtual_tokens.real_tokens(lm, 4, seed=3)[None]
    prompts = prompts_of(lm)

    def logits_of(ids):
        return lm.base(torch.cat([tokens, ids], 1), use_cache=False).logits

    assert generate(lm, prompts, NEW_TOKENS) == [continued(lm, p, logits_of) for p in prompts]


@each_family
@pytest.mark.parametrize("tuning", ["prompt", "prefix"])
@torch.no_grad()
def test_scores_behind_virtual_tokens_are_those_of_the_same_full_pass(small, kind, tuning):
    lm = moved(prepared(small(kind), tuning=tuning, num_virtual_tokens=4))
    ids = torch.tensor(prompts_of(lm)[:1])
    expected = (behind_a_prompt if tuning == "prompt" else behind_a_prefix)(lm)(ids)
    found = lm.read(ids, torch.ones_like(ids))
    torch.testing.assert_close(found[:, -ids.shape[1] :], expected[:, -ids.shape[1] :], rtol=0, atol=1e-5)


@each_family
def test_generation_counts_a_pass_for_each_new_token_of_each_length(small, kind):
    lm = prepared(small(kind), tuning="prompt", num_virtual_tokens=4)
    lm.tokenizer.eos_token = None
    lm.num_forwards = 0
    generate(lm, prompts_of(lm), 3, stops_at_newline=False)
    assert lm.num_forwards == 3 * len({len(p) for p in prompts_of(lm)})


# Prompts that are computed once ----------------------------------------------------------------------------


@pytest.mark.sample(2)
@each_family
@pytest.mark.parametrize("seed", [None, 5], ids=["greedy", "drawn"])
def test_text_behind_reused_prompts_is_that_of_a_full_pass_for_each_token(small, kind, seed):
    lm = moved(prepared(small(kind), tuning="full", tuned_layers=1), scale=0.1)
    reused, prompts = PromptCache(lm, ActivationStore([MemoryTier(1 << 20)])), prompts_of(lm)
    assert reused.depth == 1
    sampling = None if seed is None else Sampling(temperature=1.0, top_p=1.0, seeds=(seed,) * len(prompts))
    expected = [continued(lm, p, lambda ids: lm.base(ids, use_cache=False).logits, seed) for p in prompts]
    for _ in range(2):  # computed, then from what was kept
        assert generate(lm, prompts, NEW_TOKENS, sampling=sampling, prefill=reused.prefill) == expected
