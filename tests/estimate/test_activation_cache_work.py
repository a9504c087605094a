"""Reusing what lies before the perturbed block saves the work it claims to save: layers are counted as they run."""

from functools import partial

import pytest
import torch
from torch import nn

import zotune as zo


class Counted(nn.Module):
    """So many equal layers, and how often each has run; nothing is tuned outside of them."""

    def __init__(self, p):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(p)])
        self.runs = [0] * p
        for index, layer in enumerate(self.layers):
            layer.forward = partial(self._count, index, layer.forward)

    def _count(self, index, forward, x):
        self.runs[index] += 1
        return forward(x)

    def forward(self):
        x = torch.ones(2, 3)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.sum()


@pytest.mark.parametrize("p", [1, 2, 6])
@pytest.mark.parametrize("q", [1, 3])
def test_a_joint_step_runs_each_layer_as_often_as_what_comes_before_it_is_perturbed(p, q):
    """One recording pass, and 2q probes of each block from its own depth on: (p + 1) / 2 passes in place of p."""
    model = Counted(p)
    zo.zo_sgd(model, 1e-3, blocks=zo.blocks_by_layer(model), num_queries=q).step(model)
    assert model.runs == [1 + 2 * q * (k + 1) for k in range(p)]
    assert sum(model.runs) == p + 2 * q * p * (p + 1) // 2


@pytest.mark.parametrize("p", [1, 2, 6])
def test_a_sequential_step_records_again_only_what_has_moved(p):
    """After block k has moved, layers k … run once more at the new x, but for the last block, whom nobody follows."""
    model = Counted(p)
    zo.zo_sgd(model, 1e-3, blocks=zo.blocks_by_layer(model), block_order="sequential").step(model)
    assert model.runs == [1 + min(k + 1, p - 1) + 2 * (k + 1) for k in range(p)]


@pytest.mark.parametrize("p", [1, 2, 6])
@pytest.mark.parametrize("order", ["joint", "sequential"])
def test_a_conservative_step_looks_at_its_two_points_from_the_block_on_and_knows_the_loss_at_x(p, order):
    model = Counted(p)
    opt = zo.zo_sgd_cons(model, 1e-3, blocks=zo.blocks_by_layer(model), block_order=order)
    opt.step(model)
    probes = [2 * (k + 1) for k in range(p)]
    if order == "joint":
        assert model.runs == [1 + probe + 2 for probe in probes]
        assert opt.num_forwards == 1 + 2 * p + 2
    else:
        assert model.runs == [1 + min(k + 1, p - 1) + 2 * probe for k, probe in enumerate(probes)]
        assert opt.num_forwards == (1 + 2 + 2) * p


def test_a_one_sided_step_needs_no_pass_for_the_recorded_value():
    model = Counted(4)
    opt = zo.zo_sgd(model, 1e-3, blocks=zo.blocks_by_layer(model), difference=zo.forward_difference)
    value = float(model().detach())
    model.runs[:] = [0] * 4
    estimate = opt.estimate(model)
    assert model.runs == [1 + k + 1 for k in range(4)]
    assert estimate.base == estimate.loss == value
    assert opt.num_forwards == 1 + 4


def test_tied_tensors_are_reused_only_up_to_their_first_reading():
    """A tensor that the first layer and the last one share leaves nothing to be reused."""
    model = Counted(4)
    model.layers[3].weight = model.layers[0].weight
    names = {n for n, _ in model.named_parameters()}
    tied = zo.Block("tied", ("layers.0.weight",))
    rest = zo.Block("rest", tuple(n for n in names if n not in ("layers.0.weight", "layers.3.weight")))
    last = zo.Block("last", ("layers.3.bias",))
    rest = zo.Block("rest", tuple(n for n in rest.tensors if n != "layers.3.bias"))
    opt = zo.zo_sgd(model, 1e-3, blocks=[tied, rest, last])
    opt.estimate(model)
    assert model.runs == [1 + 4] * 3 + [1 + 6]
    assert zo.ParameterSet(model)["layers.3.weight"].name == "layers.0.weight"
