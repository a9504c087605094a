"""What an optimizer refuses before anything moves: numbers, nested steps, frozen tensors, states of another kind."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import zotune as zo
from zotune.errors import UsageError

X = torch.linspace(-1, 1, 6).view(2, 3)


def model_of():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def loss_of(model):
    return lambda: model(X).square().sum()


def weights_of(model):
    return [p.detach().clone() for p in model.parameters()]


def is_unmoved(model, before):
    return all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_a_rate_that_is_no_finite_number_is_refused(name, bad):
    with pytest.raises(ValueError, match="must be a finite number"):
        zo.zo_sgd(model_of(), **{"lr": 0.1, name: bad})


@pytest.mark.parametrize("rate", [math.nan, math.inf, 1e39], ids=str)
def test_a_schedule_whose_rate_is_not_finite_moves_nothing(rate):
    model = model_of()
    opt = zo.zo_adam(model, lr=0.1)
    opt.step(loss_of(model))
    opt.param_groups[0]["lr"], before = rate, weights_of(model)
    with pytest.raises(ValueError, match="finite numbers"):
        opt.step(loss_of(model))
    assert is_unmoved(model, before)
    assert opt.num_steps == 1


def test_a_step_within_a_step_over_the_same_weights_is_refused_and_one_of_other_weights_is_not():
    model, other = model_of(), model_of()
    opt, same, apart = (zo.zo_sgd(m, lr=0.1) for m in (model, model, other))
    for inner in (opt, same):
        before = weights_of(model)
        with pytest.raises(UsageError, match="within the closure"):
            opt.step(lambda inner=inner: inner.step(loss_of(model)))
        assert is_unmoved(model, before)
    apart_before = weights_of(other)
    with pytest.raises(UsageError, match="within the closure"):
        opt.on_step = lambda record: opt.step(loss_of(model))
        opt.step(loss_of(model))
    opt.on_step = lambda record: apart.step(loss_of(other))
    opt.step(loss_of(model))
    assert not is_unmoved(other, apart_before)
    assert (opt.num_steps, apart.num_steps) == (1, 1)


def test_a_tensor_that_was_frozen_later_is_refused_and_not_moved():
    model = model_of()
    opt = zo.zo_sgd(model, lr=0.1)
    opt.step(loss_of(model))
    model[0].requires_grad_(False)
    before = weights_of(model)
    with pytest.raises(UsageError, match=r"'0\.weight' was frozen"):
        opt.step(loss_of(model))
    assert is_unmoved(model, before)
    given = zo.zo_sgd(model, lr=0.1, params=model.parameters())  # frozen ones that were asked for are tuned
    given.step(loss_of(model))
    assert not torch.equal(before[0], model[0].weight)


@pytest.mark.parametrize("seed", [np.int64(5), np.uint64((1 << 63) + 5), torch.tensor(5)], ids=str)
def test_an_integer_of_another_type_is_the_same_seed(seed):
    found = [zo.zo_sgd(model_of(), lr=0.1, seed=s).directions()[0].seed for s in (seed, int(seed))]
    assert found[0] == found[1]
    assert zo.Direction(seed).seed == int(seed)


def test_a_state_of_another_kind_is_refused_and_changes_nothing():
    model = model_of()
    opt = zo.zo_adam(model, lr=0.1, window=3)
    opt.step(loss_of(model))
    plain = zo.zo_adam(model_of(), lr=0.2)
    cases = [
        (plain, opt.state_dict(), "saved with a window"),
        (zo.block_coordinate(model_of(), lr=0.2), None, "blocks"),
        (plain, torch.optim.SGD(model.parameters()).state_dict(), "no state of a zeroth-order optimizer"),
    ]
    for taker, state, message in cases:
        with pytest.raises(UsageError, match=message):
            taker.load_state_dict(state or plain.state_dict())
        assert taker.param_groups[0]["lr"] == 0.2
        assert not taker.num_steps


@pytest.mark.parametrize(
    ("saved", "taker"),
    [
        (partial(zo.zo_adam, adam="torch"), partial(zo.zo_adam, adam="adamm")),  # the same names of tensors
        (zo.zo_adam, zo.zo_sgd_mmt),
        (partial(zo.zo_muon, rank=2), partial(zo.mopi, rank=2, top=1)),
        (zo.zo_sgd, zo.zo_sgd_mmt),
    ],
)
def test_the_state_of_another_transform_is_refused(saved, taker):
    model = model_of()
    opt = saved(model, lr=0.1)
    before = opt.state_dict()
    opt.step(loss_of(model))
    other = taker(model, lr=0.2)
    with pytest.raises(UsageError, match="saved by an optimizer with the transform"):
        other.load_state_dict(opt.state_dict())
    assert other.param_groups[0]["lr"] == 0.2
    assert not other.state_dict()["state"]
    other.load_state_dict(before)  # of no step
    again = saved(model_of(), lr=0.2)
    state = opt.state_dict()
    del state["zeroth_order"]["transform"]  # as states of earlier versions
    again.load_state_dict(state)
    assert again.num_steps == 1


def test_named_parameters_are_tuned_as_parameters():
    model, again = model_of(), model_of()
    for m, given in ((model, model.named_parameters()), (again, again.parameters())):
        zo.zo_sgd(m, lr=0.1, params=given).step(loss_of(m))
    assert is_unmoved(model, weights_of(again))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_that_others_have_changed_are_not_put_back_from_their_masters(dtype):
    model = model_of().to(dtype)
    opt = zo.zo_sgd_mmt(model, lr=1e-5, mu=0.01, rounding="master")

    def loss():
        return model(X.to(dtype)).float().square().sum()

    for _ in range(2):
        opt.step(loss)
    with torch.no_grad():
        model[0].weight.fill_(0.5)
    kept = opt.state[model[2].weight]["master"].clone()
    opt.param_groups[0]["lr"] = 0.0
    opt.step(loss)
    assert (model[0].weight == 0.5).all()
    assert torch.equal(opt.state[model[2].weight]["master"], kept)
