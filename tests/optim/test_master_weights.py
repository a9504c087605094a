"""Half-precision weights take first-order steps by float32 copies: as a plain loop over float32 weights takes them."""

import copy

import pytest
import torch
from torch import nn

import zotune as zo
from zotune.errors import UsageError
from zotune.estimate.mesh import Mesh
from zotune.llm.config.method import MethodOptions
from zotune.llm.config.schema import validate
from zotune.llm.training.counters import Counters
from zotune.llm.training.optimizers import first_order, make_optimizer
from zotune.llm.training.step import FirstOrderStep
from zotune.optim.master_weights import MasterWeights, parameters_of, with_master_weights

HALVES = [torch.bfloat16, torch.float16]


def network(dtype, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3)).to(dtype)


def batches(dtype, count=4):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(5, 6, generator=generator).to(dtype), torch.randn(5, 3, generator=generator)) for _ in range(count)
    ]


def loss_of(model, batch):
    x, y = batch
    return (model(x).float() - y).square().mean()


class Lm:
    """What a first-order step asks of a language model."""

    def __init__(self, module):
        self.module, self.mesh = module, Mesh()


def by_hand(model, data, lr, steps, *, adam):
    """float32 weights beside the model; gradients of the rounded ones, summed in float32 over the batches."""
    weights = [p.detach().double().float() for p in model.parameters()]
    m, v = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for t in range(1, 1 + steps):
        total = [torch.zeros_like(w) for w in weights]
        for batch in data:
            gradients = torch.autograd.grad(loss_of(model, batch) / len(data), list(model.parameters()))
            total = [a + g.float() for a, g in zip(total, gradients, strict=True)]
        for i, g in enumerate(total):
            if adam:
                m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g * g
                g = (m[i] / (1 - 0.9**t)) / ((v[i] / (1 - 0.999**t)).sqrt() + 1e-8)
            weights[i] = weights[i] - lr * g
        with torch.no_grad():
            for p, w in zip(model.parameters(), weights, strict=True):
                p.copy_(w)
    return weights


def run(model, method, data, lr, steps):
    options = validate(MethodOptions, {"method": method, "learning_rate": lr}, "test")
    optimizer = make_optimizer(model, options, seed=0)
    step = FirstOrderStep(Lm(model), Counters(), checkpointing=False, seed=0)
    closures = [lambda b=b: loss_of(model, b) for b in data]
    for _ in range(steps):
        step(optimizer, closures, [1] * len(closures))
    return optimizer


@pytest.mark.sample(2)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("method", "lr"), [("fo_sgd", 1e-3), ("fo_adam", 1e-5)])
def test_steps_are_those_of_float32_weights(dtype, method, lr):
    ours, plain, data = network(dtype), network(dtype), batches(dtype)
    optimizer = run(ours, method, data, lr, steps=30)
    expected = by_hand(plain, data, lr, 30, adam=method == "fo_adam")
    masters = [p for group in optimizer.param_groups for p in group["params"]]
    by_id = dict(zip(map(id, parameters_of(optimizer)), masters, strict=True))
    start = network(dtype)
    for p, w, before in zip(ours.parameters(), expected, start.parameters(), strict=True):
        # float16's loss is scaled, so that its gradients round elsewhere.
        moved = (w - before.detach().float()).abs().max()
        assert torch.allclose(by_id[id(p)], w, rtol=0, atol=float(0.01 * moved if dtype == torch.float16 else 1e-6))
        assert torch.equal(p, by_id[id(p)].to(dtype))
        assert p.grad is None


def test_many_steps_below_half_a_unit_add_up():
    """What torch's optimizer loses entirely."""
    for make, moves in ((with_master_weights, True), (lambda optimizer: optimizer, False)):
        x = nn.Parameter(torch.full((3,), 2.0, dtype=torch.bfloat16))
        optimizer = make(torch.optim.SGD([x], lr=1e-3))
        for _ in range(100):
            optimizer.zero_grad()
            x.float().sum().backward()
            optimizer.step()
        assert x[0].item() == pytest.approx(1.9 if moves else 2.0, abs=0.004)


def test_gradients_below_float16_are_not_lost():
    """1e-9 is zero in float16, and a step of 1e3 times it is not."""
    model = nn.Linear(4, 1, bias=False).to(torch.float16)
    before = model.weight.detach().clone()
    x, lr = torch.ones(1, 4, dtype=torch.float16), 1e6
    options = validate(MethodOptions, {"method": "fo_sgd", "learning_rate": lr}, "test")
    optimizer = first_order("fo_sgd", model.parameters(), lr, options)
    step = FirstOrderStep(Lm(model), Counters(), checkpointing=False, seed=0)
    step(optimizer, [lambda: model(x).float().sum() * 1e-9], [1])
    assert torch.allclose(model.weight.float(), before.float() - 1e-3, atol=2e-4)


def test_overflowing_gradients_are_computed_again_with_a_smaller_scale():
    model = nn.Linear(4, 1, bias=False).to(torch.float16)
    nn.init.constant_(model.weight, 0.5)
    x = torch.ones(1, 4, dtype=torch.float16)
    optimizer = with_master_weights(torch.optim.SGD(model.parameters(), lr=1e-2))
    calls = []

    def loss():
        calls.append(optimizer.scale)
        return (model(x) * 10).float().sum()

    step = FirstOrderStep(Lm(model), Counters(), checkpointing=False, seed=0)
    assert step(optimizer, [loss], [1]) == 20
    assert calls == [2.0**16, 2.0**15, 2.0**14, 2.0**13, 2.0**12]  # 10 · 2¹² is in the range of float16
    assert torch.allclose(model.weight.float(), torch.full((1, 4), 0.4), atol=1e-3)


def test_a_gradient_that_is_not_finite_skips_the_step():
    """The derivative of √x at 0 is infinite, though its value is not."""
    for dtype in (torch.float32, *HALVES):
        x = nn.Parameter(torch.zeros(3, dtype=dtype))
        optimizer = with_master_weights(torch.optim.SGD([x], lr=0.1))
        step = FirstOrderStep(Lm(nn.Module()), Counters(), checkpointing=False, seed=0)
        assert torch.tensor(step(optimizer, [lambda x=x: x.float().sqrt().sum()], [1])).isnan()
        assert torch.equal(x, torch.zeros_like(x))


def test_weights_in_single_precision_keep_torch_s_optimizer():
    assert isinstance(with_master_weights(torch.optim.SGD(network(torch.float32).parameters(), lr=1)), torch.optim.SGD)


@pytest.mark.parametrize("method", ["fo_sgd", "fo_adam"])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_restored_state_takes_the_same_steps(dtype, method):
    data, model = batches(dtype), network(dtype)
    options = validate(MethodOptions, {"method": method, "learning_rate": 1e-3}, "test")
    optimizer = run(model, method, data, 1e-3, steps=3)
    other = copy.deepcopy(model)
    for p in other.parameters():
        p._backward_hooks = p._post_accumulate_grad_hooks = None
    again = first_order(method, other.parameters(), 1e-3, options)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        for one, at in ((model, optimizer), (other, again)):
            step = FirstOrderStep(Lm(one), Counters(), checkpointing=False, seed=0)
            step(at, [lambda one=one: loss_of(one, data[0])], [1])
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_without_copies_is_refused():
    model = network(torch.bfloat16)
    old = torch.optim.SGD(model.parameters(), lr=1e-3).state_dict()
    with pytest.raises(UsageError, match="no float32 copies"):
        with_master_weights(torch.optim.SGD(model.parameters(), lr=1e-3)).load_state_dict(old)


def test_weights_that_were_loaded_in_between_count():
    model = network(torch.bfloat16)
    optimizer = MasterWeights(torch.optim.SGD(model.parameters(), lr=1e-6))
    optimizer.backward(loss_of(model, batches(torch.bfloat16)[0]))
    other = network(torch.bfloat16, seed=3)
    model.load_state_dict(other.state_dict())
    optimizer.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p.float(), q.float(), atol=1e-3)


def test_a_hybrid_moves_its_upper_part_by_float32_copies():
    model, data = network(torch.bfloat16), batches(torch.bfloat16)
    lower, upper = model[0], model[3]
    for p in model[2].parameters():
        p.requires_grad_(False)
    opt = zo.Hybrid(zo.zo_sgd(lower, lr=0.0), torch.optim.SGD(upper.parameters(), lr=1e-4))
    expected = [p.detach().float() for p in upper.parameters()]
    plain = copy.deepcopy(model)
    for _ in range(50):
        opt.step(lambda: loss_of(model, data[0]))
        gradients = torch.autograd.grad(loss_of(plain, data[0]), list(plain[3].parameters()))
        expected = [w - 1e-4 * g.float() for w, g in zip(expected, gradients, strict=True)]
        with torch.no_grad():
            for p, w in zip(plain[3].parameters(), expected, strict=True):
                p.copy_(w)
    for p, w in zip(upper.parameters(), expected, strict=True):
        assert torch.equal(p, w.bfloat16())
    assert not torch.equal(upper.weight, network(torch.bfloat16)[3].weight)
    with pytest.raises(UsageError, match="tuned by both"):
        zo.Hybrid(zo.zo_sgd(model, lr=0.1), torch.optim.SGD(upper.parameters(), lr=0.1))
