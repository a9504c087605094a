"""A training loop sees the zeroth-order optimizer: its groups, its state, its steps, and none that was not taken."""

import pytest
import torch
from torch import nn

import zotune as zo
from zotune.integrations.stepped_optimizer import SteppedOptimizer


@pytest.fixture
def model():
    return nn.Linear(2, 1, bias=False)


def test_a_step_is_confirmed_once_and_takes_no_closure(model):
    stepped = SteppedOptimizer(zo.zo_sgd(model, lr=0.1))
    with pytest.raises(zo.UsageError, match="there is none"):
        stepped.step()
    stepped.take_step(lambda: model.weight.square().sum())
    with pytest.raises(zo.UsageError, match=r"opt\.step\(closure\)"):
        stepped.step(lambda: model.weight.square().sum())
    stepped.step()
    with pytest.raises(zo.UsageError, match="there is none"):
        stepped.step()
    assert stepped.optimizer.num_steps == 1


def test_groups_defaults_state_and_gradients_are_those_of_the_optimizer(model):
    optimizer = zo.zo_adam(model, lr=0.1)
    stepped = SteppedOptimizer(optimizer)
    seen = []
    stepped.take_step(lambda: model.weight.square().sum(), seen.append)
    assert [type(estimate) for estimate in seen] == [zo.GradientEstimate]
    assert stepped.param_groups is optimizer.param_groups
    assert stepped.defaults == optimizer.defaults and stepped.defaults["lr"] == 0.1
    assert stepped.state is optimizer.state and len(stepped.state) == 1
    model.weight.grad = torch.ones(1, 2)
    stepped.zero_grad()
    assert model.weight.grad is None

    other = SteppedOptimizer(zo.zo_adam(nn.Linear(2, 1, bias=False), lr=0.5))
    other.load_state_dict(stepped.state_dict())
    assert other.optimizer.num_steps == 1
    assert other.param_groups[0]["lr"] == 0.1
