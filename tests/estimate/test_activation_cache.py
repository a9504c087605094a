"""Reusing what lies before the perturbed block changes no bit, and saves the work it claims to save."""

from functools import partial

import pytest
import torch
from torch import nn

import zotune as zo
from problems import Transformer, assert_same_bits
from zotune.llm.models.cache_argument import cache_argument

IDS = torch.tensor([[1, 5, 7, 9, 2, 4], [3, 0, 7, 3, 4, 11]])
each_order = pytest.mark.parametrize("order", ["joint", "sequential"])


def hugging_face(kind, tie=False):
    import transformers as hf

    torch.manual_seed(0)
    small = {"vocab_size": 20, "num_hidden_layers": 3, "hidden_size": 8, "num_attention_heads": 2}
    if kind == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(intermediate_size=12, tie_word_embeddings=tie, **small))
    if kind == "opt":
        sizes = {"ffn_dim": 12, "word_embed_proj_dim": 8, "max_position_embeddings": 16, **small}
        return hf.OPTForCausalLM(hf.OPTConfig(tie_word_embeddings=tie, dropout=0.3, layerdrop=0.2, **sizes))
    sizes = {"intermediate_size": 12, "max_position_embeddings": 16, "pad_token_id": 0, **small}
    return hf.RobertaForSequenceClassification(hf.RobertaConfig(hidden_dropout_prob=0.3, **sizes))


def loss_of_logits(model, ids, **options):
    logits = model(input_ids=ids, **options).logits.double()
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class Chained(nn.Module):
    """Parameters read before, between and after two calls of the stack, the second of which follows from the first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.scale, self.between, self.after = (nn.Parameter(torch.tensor(v)) for v in (0.9, 1.1, 1.3))
        self.body = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Tanh()) for _ in range(4)])

    def loss(self):
        x = torch.linspace(-1, 1, 8).view(2, 4) * self.scale
        return (self.body(self.body(x) * self.between) * self.after).square().sum()


class Recurrent(nn.Module):
    """A model that runs its stack several times within one forward, as often as its output is small."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.between = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)]), nn.Parameter(torch.tensor(1.1))

    def forward(self):
        h = torch.linspace(-1, 1, 8).view(2, 4)
        for _ in range(3):
            for layer in self.layers:
                h = torch.tanh(layer(h))
            h = h * self.between
        return h.square().sum()


def generated(model, use_cache=True):
    """The score of what the model itself goes on to say: each call's tokens come from the last call's logits."""
    cache, ids, total = None, IDS[:, :3], 0.0
    for _ in range(4):
        name = cache_argument(model)
        out = model(
            input_ids=ids if cache is None or not use_cache else ids[:, -1:], use_cache=use_cache, **{name: cache}
        )
        cache = getattr(out, name)
        scores = out.logits[:, -1].double().log_softmax(-1)
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
        total = total - scores.max(-1).values.sum()
    return total


class InPlace(nn.Module):
    """Layers of which each writes into what it is given, as residual streams may."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def loss(self):
        h = torch.linspace(-1, 1, 8).view(2, 4)
        for layer in self.layers:
            out = layer(h)
            h = out.add_(h).tanh_()
        return h.square().sum()


class OutOfOrder(InPlace):
    """Layers that run in another order than they are in, one of them twice."""

    def loss(self):
        h = torch.linspace(-1, 1, 8).view(2, 4)
        for i in (0, 2, 1, 2):
            h = torch.tanh(self.layers[i](h))
        return h.square().sum()


class Shared(InPlace):
    """One layer that stands three times in the stack."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.layers = nn.ModuleList([self.layers[0]] * 3)

    def loss(self):
        h = self.first(torch.linspace(-1, 1, 8).view(2, 4))
        for layer in self.layers:
            h = torch.tanh(layer(h))
        return h.square().sum()


def micro_batches(model):
    return zo.accumulate([partial(loss_of_logits, model, part) for part in (IDS[:1], IDS[1:, :4], IDS)], [1, 2, 3])


def several_calls(model):
    return loss_of_logits(model, IDS) - 0.5 * loss_of_logits(model, IDS.flip(0)) + loss_of_logits(model, IDS[:, :3])


def with_mask(model):
    mask = torch.ones_like(IDS)
    mask[1, :2] = 0
    return loss_of_logits(model, IDS, attention_mask=mask, output_hidden_states=True)


# By name: a fresh model and its objective.
OBJECTIVES = {
    **{kind: (partial(hugging_face, kind), loss_of_logits) for kind in ("llama", "opt")},
    "roberta": (partial(hugging_face, "roberta"), lambda model, ids: model(input_ids=ids).logits.double().exp().sum()),
    **{f"tied {kind}": (partial(hugging_face, kind, tie=True), loss_of_logits) for kind in ("llama", "opt")},
    "several calls": (partial(hugging_face, "llama"), lambda model, ids: several_calls(model)),
    "hidden states": (partial(hugging_face, "opt"), lambda model, ids: with_mask(model)),
    "micro-batches": (partial(hugging_face, "llama"), lambda model, ids: micro_batches(model)()),
    "generation": (partial(hugging_face, "llama"), lambda model, ids: generated(model)),
    "generation without cache": (partial(hugging_face, "opt"), lambda model, ids: generated(model, use_cache=False)),
    "recurrent": (Recurrent, lambda model, ids: model()),
    "own transformer": (partial(Transformer, 3), lambda model, ids: model()),
    **{case.__name__: (case, lambda model, ids: model.loss()) for case in (Chained, InPlace, OutOfOrder, Shared)},
}


def closure_of(objective, model):
    return lambda: objective(model, IDS)


def run(make, objective, reuse, steps, way=zo.blocks_by_layer, method=zo.zo_sgd, dtype=torch.float32, **options):
    model = make().to(dtype)
    opt = method(model, 1e-2, mu=1e-2, blocks=way(model), reuse_prefix=reuse, sampler=zo.gaussian, **options)
    estimates = []
    for _ in range(steps):
        opt.step(closure_of(objective, model), inspect=estimates.append)
    return [e.terms for e in estimates], model


@pytest.mark.sample(6)
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(
    ("order", "difference"), [("joint", zo.forward_difference), ("sequential", zo.central_difference)]
)
@pytest.mark.parametrize("steps", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_reuse_changes_no_bit(name, order, difference, steps):
    options = {"block_order": order, "difference": difference, "num_queries": 2}
    (plain, without), (reused, using) = (run(*OBJECTIVES[name], reuse, steps, **options) for reuse in (False, True))
    assert plain == reused
    assert_same_bits(without, using)


@pytest.mark.sample(1)
@pytest.mark.parametrize("way", [zo.blocks_by_part, zo.blocks_by_linear, partial(zo.blocks_by_size, max_elements=150)])
@each_order
@pytest.mark.parametrize("steps", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_reuse_changes_no_bit_whatever_the_blocks(way, order, steps):
    results = [run(*OBJECTIVES["tied opt"], reuse, steps, way=way, block_order=order) for reuse in (False, True)]
    assert results[0][0] == results[1][0]
    assert_same_bits(results[0][1], results[1][1])


@pytest.mark.sample(2)
@pytest.mark.parametrize("method", [zo.zo_sgd_cons, zo.zo_adam, partial(zo.zo_sgd_mmt, window=2)])
@each_order
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reuse_changes_no_bit_whatever_the_method(method, order, dtype):
    results = [
        run(partial(Transformer, 3), lambda model, _: model().float(), reuse, 4, method=method, block_order=order,
            dtype=dtype)
        for reuse in (False, True)
    ]  # fmt: skip
    assert results[0][0] == results[1][0]
    assert_same_bits(results[0][1], results[1][1])


def test_the_model_is_as_it_was_even_if_the_objective_fails():
    model = hugging_face("llama")
    layers = model.model.layers
    own = layers[1].forward = layers[1].forward  # an instance attribute, as wrappers set them
    opt = zo.zo_sgd(model, 0.0, blocks=zo.blocks_by_layer(model))
    calls = []

    def failing():
        calls.append(0)
        if len(calls) == 8:
            assert any("forward" in vars(layer) for layer in (layers[0], layers[2]))
            raise RuntimeError("out of memory")
        return loss_of_logits(model, IDS)

    with pytest.raises(RuntimeError, match="out of memory"):
        opt.step(failing)
    assert layers[1].forward is own
    assert not any("forward" in vars(layer) for layer in (layers[0], layers[2]))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_another_objective_between_two_steps_is_not_answered_with_the_last_ones_activations():
    ends = []
    for reuse in (False, True):
        model = Transformer(3)
        opt = zo.zo_sgd(model, 1e-2, blocks=zo.blocks_by_layer(model), reuse_prefix=reuse)
        losses = []
        for step in range(4):
            ids = Transformer.IDS[:, step:] if step < 3 else Transformer.IDS
            losses.append(opt.step(lambda ids=ids, model=model: model(ids)))
            with torch.no_grad():  # whoever else moves the weights between two steps
                model.final_norm.mul_(1.01)
        ends.append((losses, model))
    assert ends[0][0] == ends[1][0]
    assert_same_bits(ends[0][1], ends[1][1])


def test_no_activation_is_kept_after_a_step_an_estimate_or_a_failure():
    model = Transformer(3)
    opt = zo.zo_sgd(model, 1e-2, blocks=zo.blocks_by_layer(model))
    calls = []

    def failing():
        calls.append(0)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return model()

    opt.step(model)
    assert not any(opt._prefix._outputs)
    opt.estimate(model)
    assert not any(opt._prefix._outputs)
    with pytest.raises(RuntimeError, match="out of memory"):
        opt.step(failing)
    assert not any(opt._prefix._outputs)
