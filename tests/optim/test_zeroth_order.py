"""A step is x ← x - η h(ĝ), the same every time, and nothing that is not a number reaches the weights."""

import copy
import math
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import zotune as zo
from zotune import reference
from zotune.estimate.estimate import GradientEstimate
from zotune.methods.table import OF_EXAMPLES

each_sampler = pytest.mark.parametrize("sampler", [zo.rademacher, zo.gaussian], ids=str)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
each_transform = pytest.mark.parametrize("transform", ["fused", "momentum"])


def momentum(gradient, state):
    """m ← 0.9 m + ĝ: a transform with state, as a user would write it."""
    m = 0.9 * state.get("momentum_buffer", 0.0) + gradient
    return m, {"momentum_buffer": m}


TRANSFORMS = {"fused": {}, "momentum": {"transform": momentum}}


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 2)).to(dtype)


def loss_of(model):
    x = torch.linspace(-1, 1, 20).view(4, 5).to(next(model.parameters()).dtype)
    return lambda: model(x).float().square().mean()


def bits(t):
    return t.detach().contiguous().view(torch.uint8)


def assert_same_weights(one, other):
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(bits(a), bits(b)), name


def vector_of(model, part):
    return np.concatenate([part(name).double().flatten().numpy() for name, _ in model.named_parameters()])


@each_sampler
@pytest.mark.parametrize("q", [1, 4])
def test_the_path_of_zo_sgd_equals_the_plain_reference(sampler, q):
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)).double()
    weights = torch.linspace(-1, 1, 13, dtype=torch.float64)
    nn.utils.vector_to_parameters(weights.clone(), model.parameters())

    def f(x):
        x = torch.as_tensor(x)
        return (x**2).sum() + torch.sin(3 * x).sum() + x[0] * x[12]

    opt = zo.zo_sgd(model, lr=0.02, mu=0.01, num_queries=q, sampler=sampler, seed=3)
    path, u = [], []
    for _ in range(20):
        u.append([vector_of(model, partial(d.of, model)) for d in opt.directions()])
        opt.step(lambda: f(nn.utils.parameters_to_vector(model.parameters())))
        path.append(vector_of(model, lambda name: model.get_parameter(name).detach()))
    expected = reference.zo_sgd(lambda x, u: reference.rge(lambda y: float(f(y)), x, 0.01, u), weights.numpy(), 0.02, u)
    np.testing.assert_allclose(path, expected, rtol=0, atol=1e-12)
    assert len({v.tobytes() for step in u for v in step}) == 20 * q


@pytest.mark.sample(2)
@each_sampler
@each_dtype
@each_transform
def test_the_same_seed_gives_the_same_bits_and_another_gives_others(sampler, dtype, transform):
    ends = []
    for seed in (0, 0, 1):
        model = network(dtype)
        torch.manual_seed(torch.initial_seed() + len(ends))  # the global state must not matter
        opt = zo.ZerothOrder(model, lr=1e-2, sampler=sampler, num_queries=2, seed=seed, **TRANSFORMS[transform])
        losses = [opt.step(loss_of(model)) for _ in range(8)]
        ends.append((losses, model))
    assert ends[0][0] == ends[1][0] != ends[2][0]
    assert_same_weights(ends[0][1], ends[1][1])
    assert not torch.equal(ends[0][1][0].weight, ends[2][1][0].weight)


@pytest.mark.parametrize("q", [1, 4])
@each_dtype
def test_a_step_is_the_estimate_times_the_learning_rate(dtype, q):
    model = network(dtype)
    before = copy.deepcopy(model)
    opt = zo.zo_sgd(model, lr=0.125, num_queries=q, sampler=zo.gaussian, rounding="nearest")
    estimate = opt.estimate(loss_of(model))
    opt.apply(estimate)
    for name, p in before.named_parameters():
        expected = p.double() - 0.125 * sum(c * u.of(before, name).double() for c, u in estimate.terms)
        ulp = torch.finfo(dtype).eps * expected.abs().clamp(min=1.0 if dtype == torch.float32 else 0.0) + 1e-7
        assert ((model.get_parameter(name).double() - expected).abs() <= ulp).all()


@each_sampler
def test_one_step_lowers_the_square_of_the_weights(sampler):
    for seed in range(20):
        model = network()
        opt = zo.zo_sgd(model, lr=1e-3, sampler=sampler, seed=seed)

        def square(model=model):
            return sum(p.double().square().sum() for p in model.parameters())

        before = float(square().detach())
        opt.step(square)
        assert float(square().detach()) < before


@each_dtype
def test_every_dtype_is_trained(dtype):
    model = network(dtype)
    opt = zo.zo_sgd(model, lr=2e-2, mu=1e-2)
    losses = [opt.step(loss_of(model)) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.dtype == dtype for p in model.parameters())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1])
@each_transform
def test_a_loss_that_is_not_finite_reaches_neither_weights_nor_state(bad, where, transform):
    model = network(torch.bfloat16)
    opt = zo.ZerothOrder(model, lr=1e-2, **TRANSFORMS[transform])
    opt.step(loss_of(model))
    weights, state = copy.deepcopy(model), copy.deepcopy(opt.state_dict()["state"])
    losses = iter([bad, 1.0] if where == 0 else [1.0, bad])

    def closure():
        loss_of(model)()
        return next(losses)

    reported = opt.step(closure)
    assert not math.isfinite(reported)
    assert_same_weights(model, weights)
    for key, saved in state.items():
        assert saved.keys() == opt.state_dict()["state"][key].keys()
        for name, value in saved.items():
            assert torch.equal(value, opt.state_dict()["state"][key][name])
    assert (opt.num_steps, opt.num_skipped, opt.num_forwards) == (2, 1, 4)
    used = opt.directions()
    opt.step(loss_of(model))
    assert opt.directions() != used
    assert not torch.equal(model[0].weight, weights[0].weight)


def test_several_losses_in_a_row_that_are_not_finite_stop_the_run():
    model = network()
    before = copy.deepcopy(model)
    opt = zo.ZerothOrder(model, lr=0.0, max_skipped=3)

    def nan():
        return loss_of(model)() * math.nan

    for closure in (nan, nan, loss_of(model), nan, nan):  # two in a row, then a good one, then two again
        opt.step(closure)
    with pytest.raises(
        zo.NonFiniteLossError, match=r"NaN or infinite for 3 steps in a row.*[Ll]ower the learning rate"
    ):
        opt.step(nan)
    assert opt.num_skipped == 5
    assert_same_weights(model, before)


@pytest.mark.parametrize("rounding", list(zo.Rounding))
@each_dtype
@each_transform
def test_going_on_from_a_state_dict_equals_not_stopping(dtype, rounding, transform, tmp_path):
    def start(model):
        return zo.ZerothOrder(model, lr=1e-2, num_queries=2, rounding=rounding, seed=5, **TRANSFORMS[transform])

    model = network(dtype)
    opt = start(model)
    for _ in range(4):
        opt.step(loss_of(model))
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "saved.pt")
    straight = [opt.step(loss_of(model)) for _ in range(4)]

    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed_model = network(dtype)
    resumed_model.load_state_dict(saved["model"])
    resumed = zo.ZerothOrder(resumed_model, lr=0.7, num_queries=2, rounding=rounding, seed=99, **TRANSFORMS[transform])
    resumed.load_state_dict(saved["opt"])
    assert [resumed.step(loss_of(resumed_model)) for _ in range(4)] == straight
    assert_same_weights(resumed_model, model)
    assert (resumed.num_steps, resumed.num_forwards) == (opt.num_steps, opt.num_forwards)


def test_loading_a_state_dict_does_not_share_its_tensors():
    model = network(torch.bfloat16)
    opt = zo.zo_sgd(model, lr=1e-2, rounding="master")
    opt.step(loss_of(model))
    saved = opt.state_dict()
    frozen = copy.deepcopy(saved["state"])
    other = zo.zo_sgd(network(torch.bfloat16), lr=1e-2, rounding="master")
    other.load_state_dict(saved)
    other.step(loss_of(other.tuned.model))
    for key, state in frozen.items():
        assert torch.equal(state["master"], saved["state"][key]["master"])
        assert state["master"].dtype == torch.float32


def test_learning_rate_schedulers_work():
    model = network()
    opt = zo.zo_sgd(model, lr=1.0, params=[{"params": model[0].parameters()}, {"params": model[3].weight, "lr": 0.5}])
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.1**step)
    rates = []
    for _ in range(3):
        before, estimate = copy.deepcopy(model), GradientEstimate(1.0, ((1.0, opt.directions()[0]),), 2)
        rates.append([group["lr"] for group in opt.param_groups])
        opt.apply(estimate)
        opt.step(lambda: sum(p.sum() * 0 for p in (*model[0].parameters(), model[3].weight)))
        scheduler.step()
        for p, q, lr in (
            (model[0].bias, before[0].bias, rates[-1][0]),
            (model[3].weight, before[3].weight, rates[-1][1]),
        ):
            torch.testing.assert_close((p - q).abs(), torch.full_like(p, lr), rtol=0, atol=3e-7)
    np.testing.assert_allclose(rates, [[1, 0.5], [0.1, 0.05], [0.01, 0.005]])


@pytest.mark.parametrize("difference", [zo.central_difference, zo.forward_difference])
def test_an_autocast_around_the_whole_run_changes_nothing(difference):
    runs = []
    for around in (nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
        model = network()

        def closure(model=model):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return loss_of(model)()

        opt = zo.zo_sgd(model, lr=0.1, mu=0.1, difference=difference)
        with around:
            runs.append([opt.step(closure) for _ in range(5)])
    assert runs[0] == runs[1]


def test_frozen_and_ungiven_parameters_never_move():
    model = network()
    model[2].weight.requires_grad_(False)
    before = copy.deepcopy(model)
    zo.zo_sgd(model, lr=0.1).step(loss_of(model))
    assert torch.equal(model[2].weight, before[2].weight)
    assert not torch.equal(model[2].bias, before[2].bias)
    model, given = network(), ["0.bias", "3.weight"]
    opt = zo.zo_sgd(model, lr=0.1, params=[model.get_parameter(name) for name in given])
    opt.step(loss_of(model))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert moved == set(given)


def test_no_state_and_no_gradient_is_kept_by_plain_zo_sgd():
    model = network(torch.bfloat16)
    opt = zo.zo_sgd(model, lr=0.1, num_queries=3)
    opt.step(loss_of(model))
    assert not any(opt.state.values())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"num_queries": 0}, "num_queries=0"),
        ({"mu": 0.0}, "mu=0.0"),
        ({"mu": math.nan}, "mu=nan"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**64}, "seed="),
        ({"rounding": "down"}, "down"),
    ],
)
def test_an_option_out_of_range_is_refused_with_its_value(options, message):
    with pytest.raises(ValueError, match=message):
        zo.zo_sgd(network(), **{"lr": 0.1, **options})


def test_a_step_without_a_closure_says_what_a_closure_is():
    with pytest.raises(TypeError, match=r"closure that returns the loss.*must not call backward"):
        zo.zo_sgd(network(), lr=0.1).step()


def test_every_method_of_the_table_lowers_a_loss():
    for name in zo.METHODS.keys() - set(OF_EXAMPLES):
        model = network()
        opt = zo.METHODS[name](model, 1e-3)
        losses = [opt.step(loss_of(model)) for _ in range(20)]
        assert losses[-1] < losses[0] - 0.005, name


def test_a_coefficient_beyond_single_precision_never_reaches_the_weights():
    model = nn.Linear(3, 2)
    before = [p.detach().clone() for p in model.parameters()]
    opt = zo.zo_sgd(model, lr=1.0)
    opt.apply(zo.GradientEstimate(1.0, ((1e39, zo.Direction(1)),), 2))
    assert opt.num_skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
