"""Blocks are a partition; estimating by them is the plain computation restricted to each, joint or in turn."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import zotune as zo
from problems import Problem, Transformer, Vector, assert_same_bits, problem
from zotune import reference
from zotune.model.parameters import ParameterSet

MU, ETA = 0.01, 0.02
each_q = pytest.mark.parametrize("q", [1, 3])
each_difference = pytest.mark.parametrize("difference", [zo.central_difference, zo.forward_difference])
# peft asks transformers by a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
WAYS = {**zo.BLOCKS, "size": partial(zo.blocks_by_size, max_elements=200)}


def hugging_face(kind):
    import transformers as hf

    torch.manual_seed(0)
    small = {"vocab_size": 50, "num_hidden_layers": 3, "hidden_size": 8, "num_attention_heads": 2}
    if kind == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(intermediate_size=12, **small))
    if kind == "opt":
        return hf.OPTForCausalLM(hf.OPTConfig(ffn_dim=12, word_embed_proj_dim=8, max_position_embeddings=16, **small))
    if kind == "gpt2":
        return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=50, n_embd=8, n_layer=3, n_head=2, n_positions=16))
    sizes = {"intermediate_size": 12, "max_position_embeddings": 16, **small}
    return hf.RobertaForSequenceClassification(hf.RobertaConfig(**sizes))


def with_lora(kind):
    import peft

    names = {"opt": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}[kind]
    config = peft.LoraConfig(r=2, target_modules=names, fan_in_fan_out=kind == "gpt2")
    return peft.get_peft_model(hugging_face(kind), config)


class Heap(nn.Module):
    """No stack of layers; a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.w = nn.Linear(3, 3), nn.Bilinear(2, 2, 2), nn.Parameter(torch.ones(4))


MODELS = {
    **{kind: partial(hugging_face, kind) for kind in ("llama", "opt", "gpt2", "roberta")},
    "lora on opt": partial(with_lora, "opt"),
    "lora on gpt2": partial(with_lora, "gpt2"),
    "sequential": lambda: nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 3), nn.ReLU()), nn.LayerNorm(3)),
    "no stack": Heap,
    "one parameter": lambda: nn.ParameterDict({"w": torch.ones(3)}),
    "compiled name": lambda: nn.ModuleDict({"_orig_mod": Transformer()}),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_blocks_hold_every_tuned_tensor_once(kind, way):
    model = MODELS[kind]()
    blocks = WAYS[way](model)
    names = [name for block in blocks for name in block.tensors]
    assert sorted(names) == sorted(t.name for t in ParameterSet(model))
    assert len(names) == len(set(names))
    assert all(block.tensors for block in blocks)
    assert len({block.name for block in blocks}) == len(blocks)
    zo.zo_sgd(model, lr=0.1, blocks=blocks)


@pytest.mark.parametrize(
    ("kind", "layer", "part"),
    [("llama", 3, 6), ("opt", 3, 6), ("gpt2", 3, 6), ("roberta", 3, 6), ("lora on opt", 3, 3)],
)
def test_each_layer_is_one_block_and_two_parts(kind, layer, part):
    model = MODELS[kind]()
    stack = ("layers.", ".h.", "encoder.layer.")
    inside = [[b for b in WAYS[way](model) if any(s in b.name for s in stack)] for way in ("layer", "part")]
    assert [len(found) for found in inside] == [layer, part]
    for block in inside[0]:
        number = {name.split(s)[1].split(".")[0] for name in block.tensors for s in stack if s in name}
        assert len(number) == 1
    attention = [name for b in inside[1] if b.name.endswith("attention") for name in b.tensors]
    assert attention
    assert all("attn" in name or "attention" in name for name in attention)


def test_neighbours_fill_blocks_up_to_the_given_size():
    model = nn.ParameterDict({str(i): torch.zeros(n) for i, n in enumerate([3, 3, 3, 20, 1, 6])})
    assert [b.tensors for b in zo.blocks_by_size(model, 7)] == [("0", "1"), ("2",), ("3",), ("4", "5")]
    with pytest.raises(ValueError, match="max_elements=0"):
        zo.blocks_by_size(model, 0)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([("a", ("first",))], "1 tuned tensors are in no block.*second"),
        ([("a", ("first", "second")), ("b", ("second",))], "'second' is in two blocks: 'a', 'b'"),
        ([("a", ("first", "second", "third"))], "'third', which is not among the 2 tuned"),
        ([("a", ("first",)), ("a", ("second",))], "two blocks are called 'a'"),
        ([], "2 tuned tensors are in no block"),
    ],
)
def test_what_is_no_partition_is_refused_by_name(blocks, message):
    p = problem("quadratic")
    with pytest.raises(zo.UsageError, match=message):
        zo.zo_sgd(p.model, 0.1, blocks=[zo.Block(*block) for block in blocks])


@pytest.mark.sample(3)
@each_q
@each_difference
@pytest.mark.parametrize("order", ["joint", "sequential"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_one_block_is_the_plain_method_to_the_bit(q, difference, order, dtype):
    ends = []
    for cut in (False, True):
        p = problem("transformer", dtype)
        names = tuple(t.name for t in ParameterSet(p.model))
        blocks = {"blocks": [zo.Block("all", names)], "block_order": order} if cut else {}
        opt = zo.zo_adam(p.model, ETA, mu=0.05, difference=difference, num_queries=q, sampler=zo.gaussian, **blocks)
        ends.append(([opt.step(p.closure) for _ in range(5)], p.model))
    assert ends[0][0] == ends[1][0]
    assert_same_bits(ends[0][1], ends[1][1])


def by_tensor(p):
    """One block a tensor, and the vectors of 0 and 1 of the reference."""
    names = [t.name for t in ParameterSet(p.model)]
    return [zo.Block(name, (name,)) for name in names], [p.vector(**{name: 1.0}) for name in names]


def whole_direction(p, opt):
    """The directions of a step, each put together from its parts in all blocks."""
    us = opt.directions()
    q = opt.num_queries
    return [sum(p.whole(u.of) for u in us[i::q]) for i in range(q)]


@each_q
@pytest.mark.parametrize("name", ["quadratic", "rosenbrock"])
@pytest.mark.parametrize("order", ["joint", "sequential"])
def test_the_path_is_that_of_the_reference(q, name, order):
    p = problem(name)
    f, _ = p.plain()
    start = p.position()
    blocks, indicators = by_tensor(p)
    opt = zo.zo_sgd(p.model, ETA, mu=MU, blocks=blocks, block_order=order, num_queries=q, sampler=zo.gaussian)
    path, directions = [], []
    for _ in range(10):
        directions.append(whole_direction(p, opt))
        opt.step(p.closure)
        path.append(p.position())
    if order == "joint":
        expected = reference.zo_sgd(lambda x, u: reference.block_rge(f, x, MU, u, indicators), start, ETA, directions)
    else:
        expected = reference.sequential_zo_sgd(f, start, ETA, MU, directions, indicators)
    np.testing.assert_allclose(path, expected, rtol=1e-9, atol=1e-10)


def test_joint_and_sequential_agree_where_blocks_do_not_interact_and_differ_where_they_do():
    def separable(x):
        return (x**4 + x).sum()

    for function, agree in ((separable, True), (lambda x: (x**2).sum() ** 2, False)):
        ends = []
        for order in ("joint", "sequential"):
            p = Problem(Vector(function))
            opt = zo.zo_sgd(p.model, ETA, mu=MU, blocks=by_tensor(p)[0], block_order=order)
            for _ in range(5):
                opt.step(p.closure)
            ends.append(p.position())
        assert np.allclose(*ends, rtol=0, atol=1e-12) == agree


def test_blocks_of_equal_shape_have_directions_of_their_own():
    model = nn.Sequential(*[nn.Linear(50, 50, bias=False) for _ in range(3)])
    for sampler in (zo.rademacher, zo.gaussian):
        us = zo.zo_sgd(model, 0.1, sampler=sampler, blocks=zo.blocks_by_layer(model)).directions()
        parts = [u.of(model, f"{i}.weight").flatten() for i, u in enumerate(us)]
        correlation = torch.corrcoef(torch.stack(parts))
        assert (correlation - torch.eye(3)).abs().max() < 5 / 50
        for i, u in enumerate(us):
            assert all(not u.of(model, f"{j}.weight").any() for j in range(3) if j != i)


@each_q
def test_queries_of_a_block_are_averaged_within_it(q):
    p = problem("quadratic")
    blocks, indicators = by_tensor(p)
    f, _ = p.plain()
    opt = zo.zo_sgd(p.model, ETA, mu=MU, blocks=blocks, num_queries=q)
    expected = reference.block_rge(f, p.position(), MU, whole_direction(p, opt), indicators)
    estimate = opt.estimate(p.closure)
    assert len(estimate.terms) == q * len(blocks)
    np.testing.assert_allclose(p.whole(estimate.of), expected, rtol=1e-9)


@each_q
@each_difference
@pytest.mark.parametrize("order", ["joint", "sequential"])
@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("method", [zo.zo_sgd, zo.zo_sgd_cons])
def test_forward_passes_are_counted_as_they_are_made(q, difference, order, reuse, method):
    p, made = problem("transformer"), []
    blocks = zo.blocks_by_layer(p.model)
    opt = method(
        p.model, ETA, blocks=blocks, block_order=order, reuse_prefix=reuse, difference=difference, num_queries=q
    )
    opt.step(lambda: made.append(0) or p.closure())
    assert opt.num_forwards == len(made)
    if not reuse and order == "joint" and method is zo.zo_sgd:
        two_sided = difference is zo.central_difference
        assert len(made) == len(blocks) * q * (2 if two_sided else 1) + (not two_sided)


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_sequential_step_leaves_out_the_block_whose_loss_is_no_number_and_its_record_says_which(bad):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    before, again = copy.deepcopy(model), copy.deepcopy(model)
    options = {"lr": 0.5, "mu": MU, "blocks": zo.blocks_by_layer(model), "block_order": "sequential"}
    opt, records = zo.zo_sgd(model, reuse_prefix=False, **options), []
    opt.on_step = records.append
    (u, *_), slopes = opt.directions(), [3.0, -2.0, 1.0]
    probes = [[MU * c, -MU * c] for c in slopes]
    probes[bad][1] = math.nan
    values = iter([value for pair in probes for value in pair])

    def closure():
        model(torch.ones(1, 2))  # whatever is read
        return next(values)

    loss = opt.step(closure)
    assert not math.isfinite(loss)
    assert opt.num_skipped == 1
    (record,) = records
    assert record.is_skipped
    assert [math.isnan(scale) for scale in record.scales] == [k == bad for k in range(3)]
    for name, p in model.named_parameters():
        k, old = int(name[0]), before.get_parameter(name)
        expected = old if k == bad else old - 0.5 * slopes[k] * u.within(None).of(before, name)
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(p, old) == (k == bad)
    zo.zo_sgd(again, **options).replay_step(record)
    assert_same_bits(model, again)
