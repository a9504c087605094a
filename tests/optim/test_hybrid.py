"""Both halves of a hybrid step take their gradient at the same x, and back-propagation ends at the cut."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import zotune as zo
from problems import Problem, Transformer, assert_same_bits, problem
from zotune import reference
from zotune.model.parameters import ParameterSet

IDS = torch.tensor([[1, 5, 7, 9, 2, 4], [3, 0, 7, 3, 4, 11]])
MU = 0.01


def hugging_face(kind, tie):
    import transformers as hf

    torch.manual_seed(0)
    small = {"vocab_size": 20, "num_hidden_layers": 3, "hidden_size": 8, "num_attention_heads": 2}
    if kind == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(intermediate_size=12, tie_word_embeddings=tie, **small))
    sizes = {"ffn_dim": 12, "word_embed_proj_dim": 8, "max_position_embeddings": 16, "dropout": 0.0, **small}
    return hf.OPTForCausalLM(hf.OPTConfig(tie_word_embeddings=tie, **sizes))


def closure_of(model):
    def closure():
        logits = model(input_ids=IDS).logits[:, :-1].float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())

    return closure


def split(model, k, closure, method=zo.zo_sgd, lr=0.02, first_order=torch.optim.SGD, **options):
    """A hybrid of the first k layers."""
    shallow, deep = zo.split_at_layer(model, k, closure, tied="zeroth_order")
    return zo.Hybrid(method(model, lr, mu=MU, params=shallow, **options), first_order(deep, lr=0.05)), shallow, deep


@pytest.mark.parametrize("name", ["quadratic", "rosenbrock"])
@pytest.mark.parametrize("q", [1, 3])
def test_the_path_is_that_of_the_reference(name, q):
    p = problem(name)
    f, gradient = p.plain()
    start = p.position()
    opt = zo.Hybrid(
        zo.zo_sgd(p.model, 0.02, mu=MU, params=[p.model.first], num_queries=q, sampler=zo.gaussian),
        torch.optim.SGD([p.model.second], lr=0.05),
    )
    path, directions, losses, expected_losses = [], [], [], []
    for _ in range(10):
        parts = [
            u.of(opt.zeroth_order.tuned, "first").double().flatten().numpy() for u in opt.zeroth_order.directions()
        ]
        directions.append([np.concatenate([part, np.zeros(3)]) for part in parts])
        expected_losses.append(f(p.position()))
        losses.append(opt.step(p.closure))
        path.append(p.position())
    expected = reference.hybrid(f, gradient, start, (0.02, 0.05), MU, directions, p.vector(first=1.0))
    np.testing.assert_allclose(path, expected, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-12)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_the_first_order_part_is_autograds_of_the_whole_model_restricted(k, kind):
    model = hugging_face(kind, tie=False)
    twin = copy.deepcopy(model)
    closure_of(twin)().backward()
    opt, shallow, deep = split(model, k, closure_of(model))
    gradients = {}
    opt.first_order.step = lambda: gradients.update({id(p): p.grad.clone() for p in deep})
    opt.step(closure_of(model))
    for p, original in zip(model.parameters(), twin.parameters(), strict=True):
        if id(p) in gradients:
            torch.testing.assert_close(gradients[id(p)], original.grad, rtol=0, atol=0)
    assert len(gradients) == len(deep)
    assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in shallow)


@pytest.mark.parametrize("first_order", [torch.optim.SGD, torch.optim.AdamW])
def test_each_half_moves_as_it_does_alone(first_order):
    """With the other's rate zero, a hybrid is the first-order or the zeroth-order optimizer to the bit."""
    runs = {}
    for name, (zo_lr, fo_lr) in {"zeroth": (0.02, 0.0), "first": (0.0, 0.05)}.items():
        model = Transformer(3)
        shallow, deep = zo.split_at_layer(model, 1, model, tied="zeroth_order")
        opts = [zo.zo_adam(model, zo_lr, params=shallow), first_order(deep, lr=fo_lr, weight_decay=0.0)]
        hybrid = zo.Hybrid(*opts)
        for _ in range(4):
            hybrid.step(model)
        alone = Transformer(3)
        shallow, deep = zo.split_at_layer(alone, 1, alone, tied="zeroth_order")
        if name == "zeroth":
            opt = zo.zo_adam(alone, zo_lr, params=shallow)
            for _ in range(4):
                opt.step(alone)
        else:
            opt = first_order(deep, lr=fo_lr, weight_decay=0.0)
            for _ in range(4):
                alone.zero_grad()
                alone().backward()
                opt.step()
        runs[name] = model, alone
    for model, alone in runs.values():
        assert_same_bits(model, alone)


@pytest.mark.parametrize("kind", ["llama", "opt"])
@pytest.mark.parametrize("tie", [False, True])
def test_every_parameter_is_on_the_side_of_the_layer_that_reads_it(kind, tie):
    model = hugging_face(kind, tie)
    names = {id(p): name for name, p in model.named_parameters()}
    for k in range(4):
        if tie and k in (1, 2):
            with pytest.raises(zo.UsageError, match=r"read both below and above the cut.*Choose"):
                zo.split_at_layer(model, k, closure_of(model))
        shallow, deep = zo.split_at_layer(model, k, closure_of(model), tied="zeroth_order" if tie else None)
        below, above = ([names[id(p)] for p in side] for side in (shallow, deep))
        assert sorted(below + above) == sorted(names.values())
        number = {n: int(n.split("layers.")[1].split(".")[0]) for n in names.values() if "layers." in n}
        for name in names.values():
            embedding = "embed" in name
            is_below = number[name] < k if name in number else k == 3 or (embedding and k > 0)
            assert (name in below) == is_below, (k, name)


def test_a_tied_tensor_may_be_frozen():
    model = hugging_face("llama", tie=True)
    shallow, deep = zo.split_at_layer(model, 1, closure_of(model), tied="frozen")
    embedding = model.get_input_embeddings().weight
    assert not embedding.requires_grad
    assert all(p is not embedding for p in (*shallow, *deep))
    zo.Hybrid(zo.zo_sgd(model, 0.1, params=shallow), torch.optim.SGD(deep, lr=0.1)).step(closure_of(model))


def saved_bytes(opt, closure, below):
    """Bytes that autograd saves during a step, and whether any function ran below the cut with a graph."""
    sizes, graphs = [], []
    hooks = [m.register_forward_hook(lambda m, a, out: graphs.append(torch.is_tensor(out) and out.requires_grad))
             for m in below]  # fmt: skip

    def pack(t):
        sizes.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        opt.step(closure)
    for hook in hooks:
        hook.remove()
    return sum(sizes), any(graphs)


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_the_graph_ends_at_the_cut_and_saves_the_less_the_higher_it_is(kind):
    found = []
    for k in (1, 2):
        model = hugging_face(kind, tie=False)
        layers = (model.model if kind == "llama" else model.model.decoder).layers
        opt, *_ = split(model, k, closure_of(model))
        size, graph_below = saved_bytes(opt, closure_of(model), layers[:k])
        assert not graph_below
        found.append(size)
    whole = hugging_face(kind, tie=False)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel() * t.element_size()) or t, lambda t: t
    ):
        closure_of(whole)().backward()
    assert 0 < found[1] < found[0] < sum(sizes)


@pytest.mark.parametrize("bad_call", [0, 1, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_in_either_part_moves_nothing(bad_call, bad):
    model = Transformer(2)
    shallow, deep = zo.split_at_layer(model, 1, model, tied="zeroth_order")
    opt = zo.Hybrid(zo.zo_adam(model, 0.02, params=shallow), torch.optim.Adam(deep, lr=0.05))
    opt.step(model)
    before, state, calls = copy.deepcopy(model), copy.deepcopy(opt.state_dict()), iter(range(3))
    opt.step(lambda: model() * (bad if next(calls) == bad_call else 1.0))
    assert_same_bits(before, model)
    assert (opt.zeroth_order.num_steps, opt.zeroth_order.num_skipped) == (2, 1)
    for key, saved in state["first_order"]["state"].items():
        assert all(torch.equal(v, opt.first_order.state_dict()["state"][key][n]) for n, v in saved.items())
    assert all(p.grad is None for p in model.parameters())


def test_a_first_order_gradient_that_is_not_finite_moves_nothing():
    model = nn.ParameterDict({"a": torch.ones(2), "b": torch.zeros(2)})
    opt = zo.Hybrid(zo.zo_sgd(model, 0.1, params=[model["a"]]), torch.optim.SGD([model["b"]], lr=0.1))
    before = copy.deepcopy(model)
    opt.step(lambda: model["a"].sum() + model["b"].sqrt().sum())  # the slope of √ at 0 is infinite
    assert_same_bits(before, model)
    assert opt.zeroth_order.num_skipped == 1


@pytest.mark.parametrize("method", [zo.zo_sgd_cons, zo.zo_adam, partial(zo.zo_sgd_mmt, window=3)])
def test_a_hybrid_goes_on_from_a_state_dict_to_the_bit(method, tmp_path):
    def start():
        model = Transformer(2).eval()
        shallow, deep = zo.split_at_layer(model, 1, model, tied="zeroth_order")
        return model, zo.Hybrid(method(model, 0.02, params=shallow), torch.optim.AdamW(deep, lr=0.01))

    model, opt = start()
    for _ in range(4):
        opt.step(model)
    torch.save((model.state_dict(), opt.state_dict()), tmp_path / "saved.pt")
    straight = [opt.step(model) for _ in range(3)]
    again, resumed = start()
    weights, state = torch.load(tmp_path / "saved.pt", weights_only=True)
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert [resumed.step(again) for _ in range(3)] == straight
    assert_same_bits(model, again)


def test_what_cannot_be_split_is_refused_with_a_reason():
    p = Problem(Transformer(2))
    with pytest.raises(zo.UsageError, match="'final_norm' is tuned by both"):
        zo.Hybrid(zo.zo_sgd(p.model, 0.1), torch.optim.SGD([p.model.final_norm], lr=0.1))
    blocks = zo.blocks_by_linear(p.model, [p.model.embed, *p.model.layers.parameters()])
    in_turn = zo.zo_sgd(
        p.model,
        0.1,
        params=[p.model.embed, *p.model.layers.parameters()],
        blocks=blocks,
        block_order="sequential",
    )
    with pytest.raises(zo.UsageError, match="sequential blocks"):
        zo.Hybrid(in_turn, torch.optim.SGD([p.model.final_norm], lr=0.1))
    with pytest.raises(zo.UsageError, match=r"2 layers; the first 3 of them"):
        zo.split_at_layer(p.model, 3, p.closure)
    p.model.unread = nn.Parameter(torch.ones(2))
    with pytest.raises(zo.UsageError, match="does not read 'unread'"):
        zo.split_at_layer(p.model, 1, p.closure, tied="zeroth_order")
    with pytest.raises(ValueError, match="above"):
        zo.split_at_layer(p.model, 1, p.closure, tied="above")
    opt = zo.Hybrid(zo.zo_sgd(p.model, 0.1, params=[p.model.embed]), torch.optim.SGD([p.model.final_norm], lr=0.1))
    with pytest.raises(zo.UsageError, match=r"does not depend.*without .item\(\)"):
        opt.step(p.value)
    assert len(ParameterSet(p.model)) > 2
