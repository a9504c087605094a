"""One currency of passes: what the model really computes, counted pass by pass, whatever the method."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import zotune as zo
from zotune.optim.hybrid import Hybrid
from zotune.optim.pass_cost import PassCost, pass_cost


class Counted(nn.Module):
    """Three layers that count their passes: plain ones 1, with tangents 2, with a graph 3."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(3)])
        self.cost = self.calls = 0

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        tangent = forward_ad.unpack_dual(x).tangent if forward_ad._current_level >= 0 else None
        self.calls += 1
        self.cost += 2 if tangent is not None else 3 if x.requires_grad else 1
        return x.square().mean()


METHODS = {
    "zo_sgd": lambda m: zo.zo_sgd(m, lr=0.01, num_queries=3),
    "one_sided": lambda m: zo.zo_sgd(m, lr=0.01, difference=zo.forward_difference, num_queries=3),
    "zo_sgd_cons": lambda m: zo.zo_sgd_cons(m, lr=0.01),
    "blocks": lambda m: zo.zo_sgd(m, lr=0.01, blocks=zo.blocks_by_layer(m)),
    "fzoo": lambda m: zo.fzoo(m, lr=0.01, num_queries=4),
    "hizoo": lambda m: zo.hizoo(m, lr=0.01),
    "forward_grad": lambda m: zo.forward_grad(m, lr=0.01, num_queries=2),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_equivalents_of_a_method_are_those_of_its_passes(name):
    torch.manual_seed(0)
    model, x = Counted(), torch.randn(4, 3)
    optimizer = METHODS[name](model)
    optimizer.step(lambda: model(x))  # which may check itself
    before, calls, cost = optimizer.num_forwards, model.calls, model.cost
    for _ in range(3):
        optimizer.step(lambda: model(x))
    passes = optimizer.num_forwards - before
    assert passes == model.calls - calls
    assert pass_cost(optimizer).equivalents(passes, 3) == model.cost - cost


def test_a_hybrids_and_a_first_order_optimizers_back_propagated_passes_count_three():
    torch.manual_seed(0)
    model, x = Counted(), torch.randn(4, 3)
    lower, upper = model.layers[0], [p for layer in model.layers[1:] for p in layer.parameters()]
    hybrid = Hybrid(zo.zo_sgd(lower, lr=0.01, num_queries=2), torch.optim.SGD(upper, lr=0.01))
    for _ in range(3):
        hybrid.step(lambda: model(x))
    assert pass_cost(hybrid).equivalents(hybrid.zeroth_order.num_forwards, 3) == model.cost == 3 * (4 + 3)
    model.cost = 0
    model(x).backward()
    adam = torch.optim.Adam(model.parameters())
    assert pass_cost(adam).equivalents(1, 1) == model.cost == 3
    assert pass_cost(adam, checkpointing=True).equivalents(1, 1) == 4


def test_layers_that_are_reused_count_once_a_row_and_gradients_end_at_the_cut():
    # Ten of twelve layers are reused; 40 passes of batches, of which the rows make 5.
    assert PassCost(layers=12, reused=10).layer_passes(40, 20, 5) == 40 * 2 + 10 * 5
    assert PassCost(each=2, layers=12, reused=10).layer_passes(40, 20, 5) == 2 * 40 * 2 + 10 * 5
    assert PassCost(per_step=None, layers=12).layer_passes(40, 40) == 3 * 40 * 12
    # A hybrid's 20 steps have two probes each below layer 9, and one pass back-propagated through three layers.
    hybrid = PassCost(per_step=1, layers=12, cut=9)
    assert hybrid.layer_passes(60, 20) == 40 * 12 + 20 * (12 + 2 * 3)
    assert hybrid.equivalents(60, 20) == 40 + 3 * 20
