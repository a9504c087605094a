"""An optimizer's copies, groups and loaded state are whole, or refused in words; autograd learns of its updates."""

import copy
import pickle

import pytest
import torch
from torch import nn

import zotune as zo
from problems import assert_same_bits

X = torch.linspace(-1, 1, 6).view(2, 3)


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


@pytest.mark.parametrize("make", [zo.zo_sgd, zo.zo_sgd_mmt, zo.zo_adam, lambda m, lr: zo.zo_adam(m, lr, window=2)])
def test_a_copy_of_model_and_optimizer_goes_on_as_they_do(make):
    model = small()
    opt = make(model, 0.05)
    torch.optim.lr_scheduler.ConstantLR(opt)  # puts its own step in front of the optimizer's
    opt.on_step = lambda record: None
    opt.step(lambda: model(X).square().sum())
    twin, other = copy.deepcopy((model, opt))
    assert other.on_step is None
    assert other.tuned.model is twin
    before = copy.deepcopy(model)
    other.step(lambda: twin(X).square().sum())
    assert_same_bits(model, before)
    opt.step(lambda: model(X).square().sum())
    assert_same_bits(model, twin)


def test_a_copy_of_the_optimizer_alone_has_a_model_of_its_own():
    model = small()
    other = copy.deepcopy(zo.zo_sgd(model, 0.05))
    with pytest.raises(zo.UnreadTensorError):
        other.step(lambda: model(X).square().sum())
    other.step(lambda: other.tuned.model(X).square().sum())


def test_pickles_and_late_groups_are_refused_in_words():
    model = small()
    opt = zo.zo_sgd(model, 0.05, params=model[0].parameters())
    with pytest.raises(zo.UsageError, match="state_dict"):
        pickle.dumps(opt)
    for parameter in (nn.Parameter(torch.ones(1)), model[2].weight):
        with pytest.raises(zo.UsageError, match="cannot be added later"):
            opt.add_param_group({"params": [parameter]})
    assert len(opt.param_groups) == 1


def test_loaded_state_goes_to_its_parameters_device_and_keeps_its_precision():
    model, elsewhere = small().bfloat16(), small().bfloat16().to("meta")
    opt, other = (zo.zo_sgd_mmt(m, 0.05, rounding="master") for m in (model, elsewhere))
    opt.step(lambda: model(X.bfloat16()).float().square().sum())
    other.load_state_dict(opt.state_dict())
    for p in elsewhere.parameters():
        assert {(v.device.type, v.dtype) for v in other.state[p].values()} == {("meta", torch.float32)}


@pytest.mark.parametrize("make", [zo.zo_sgd, zo.zo_adam])
def test_a_graph_of_the_weights_before_an_update_refuses_to_go_backward(make):
    model = small()
    weight = model[2].weight
    stale = (weight * weight.detach().clone().requires_grad_()).sum() + (weight**2).sum()
    make(model, 0.05).step(lambda: model(X).square().sum())
    with pytest.raises(RuntimeError, match="inplace operation"):
        stale.backward()
