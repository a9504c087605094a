"""A borrowed model comes back in the state that it had, whatever happened to the run."""

import pytest
import torch

from zotune.errors import RunError, UsageError
from zotune.llm import evaluate, generate, load, train

ROWS = [{"prompt": text, "label": "x"} for text in "abcdefgh"]
LABELLED = [{"text": text, "label": "yes" if i % 2 else "no"} for i, text in enumerate("abcdefgh")]
IDS = torch.arange(6)[None]


def state(model):
    """Whatever of a model's modules a run might leave behind, by name; values of parameters apart."""
    found = {}
    for name, module in model.named_modules():
        hooks = {k: list(v) for k, v in vars(module).items() if "hook" in k and isinstance(v, dict)}
        plain = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | str | float)}
        found[name] = (type(module), sorted(vars(module)), hooks, plain, list(module._modules))
    return found, {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}


@pytest.fixture
def odd():
    """A model in a state of its owner's: train mode but for one module, one tensor frozen, a hook on one module."""
    model, tokenizer = load("random:llama-tiny", device="cpu")
    model.train()
    model.model.layers[0].mlp.eval()
    model.model.norm.weight.requires_grad_(False)
    model.model.layers[1].register_forward_hook(lambda module, args, output: None)
    return model, tokenizer


CALLS, STOPS = [], {"error": ValueError("no reward"), "interrupt": KeyboardInterrupt()}
ENDS = {}


def stopping(completions):
    """A reward that ends the run in its second step."""
    CALLS.append(1)
    if len(CALLS) > 3:
        raise ENDS["with"]
    return [float(len(CALLS) % 2)] * len(completions)


@pytest.mark.parametrize("end", STOPS)
@pytest.mark.parametrize("tuning", ["lora", "prefix", "full"])
def test_after_an_error_or_an_interrupt_the_model_is_as_before(odd, end, tuning):
    model, tokenizer = odd
    model.eval()
    with torch.no_grad():
        logits = model(IDS).logits
    model.train()
    model.model.layers[0].mlp.eval()
    before = state(model)
    CALLS.clear()
    ENDS["with"] = STOPS[end]
    with pytest.raises((RunError, KeyboardInterrupt)):
        train(model, tokenizer, ROWS, objective=stopping, tuning=tuning, max_steps=9, max_new_tokens=2)
    assert len(CALLS) == 4
    assert state(model) == before
    if tuning != "full":
        model.eval()
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, logits)
        # Nothing is in the way of another try.
        CALLS.clear()
        assert train(model, tokenizer, LABELLED, tuning=tuning, max_steps=1).num_steps == 1


def test_after_tuning_its_own_weights_the_model_is_as_before_but_for_their_values(odd):
    model, tokenizer = odd
    before, frozen = state(model), model.model.norm.weight.clone()
    weight = model.lm_head.weight.clone()
    result = train(model, tokenizer, LABELLED, LABELLED, tuning="full", max_steps=2, learning_rate=1e-2)
    assert result.model is model
    assert state(model) == before
    assert torch.equal(model.model.norm.weight, frozen)
    assert not torch.equal(model.lm_head.weight, weight)


def test_an_adapter_stays_and_leaves_modes_and_hooks_alone(odd):
    model, tokenizer = odd
    modes = {name: module.training for name, module in model.named_modules()}
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    result = train(model, tokenizer, LABELLED, max_steps=1)
    inner = dict(result.model.get_base_model().named_modules())
    renamed = {name: module for name, module in inner.items() if name in modes}
    assert {name: module.training for name, module in renamed.items()} == modes
    assert {name: len(module._forward_hooks) for name, module in renamed.items()} == hooks
    assert result.model.training
    # peft's own convention: the adapter alone requires a gradient.
    assert {n for n, p in result.model.named_parameters() if p.requires_grad} == {
        n for n, p in result.model.named_parameters() if "lora_" in n
    }
    plain = result.model.unload()
    assert list(dict(plain.named_modules())) == list(modes)
    assert train(plain, tokenizer, LABELLED, max_steps=1).num_tuned == result.num_tuned


def test_evaluation_and_generation_leave_the_model_alone(odd):
    model, tokenizer = odd
    before = state(model)
    evaluate(model, tokenizer, LABELLED)
    generate(model, tokenizer, ["a", "bc"], max_new_tokens=2)
    with pytest.raises(ValueError, match="Did you mean 'template'"):
        evaluate(model, tokenizer, LABELLED, tempalte="{text}")
    assert state(model) == before


def test_no_random_state_and_no_tokenizer_changes(odd):
    model, tokenizer = odd
    before = torch.get_rng_state(), {k: repr(v) for k, v in vars(tokenizer).items()}, repr(model.generation_config)
    result = train(model, tokenizer, LABELLED, max_steps=1)
    generate(result.model, tokenizer, "a", max_new_tokens=2, generation="sample")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert {k: repr(v) for k, v in vars(tokenizer).items()} == before[1]
    assert repr(model.generation_config) == before[2]


class DeepSpeedEngine(torch.nn.Module):
    """What DeepSpeed puts around a model has this name."""

    def __init__(self, module):
        super().__init__()
        self.module = module


class FullySharded(torch.nn.Module):
    """A model in FSDP1 has a handle of its flat tensors."""

    def __init__(self, module):
        super().__init__()
        self.module, self._handle = module, type("Handle", (), {"uses_sharded_strategy": True})()


@pytest.mark.parametrize(
    ("wrapper", "says"),
    [
        (DeepSpeedEngine, "Make the optimizer of the model without DeepSpeed"),
        (FullySharded, "Shard the model by FSDP2 instead"),
        (torch.nn.DataParallel, r"pass the model itself, model\.module"),
    ],
)
def test_a_wrapped_model_is_refused_with_what_to_pass(odd, wrapper, says):
    model, tokenizer = odd
    with pytest.raises(UsageError, match=says):
        train(wrapper(model), tokenizer, ROWS)
