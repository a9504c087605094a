"""One block a step: by turns, equally often, or where the coefficients are large; a bad choice is refused."""

from collections import Counter

import pytest
import torch
from torch import nn

import zotune as zo


class Uneven(nn.Module):
    """Three layers, of which the loss depends most on the last."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2, bias=False) for _ in range(3)])

    def loss(self):
        return sum(10.0**i * layer.weight.sum() for i, layer in enumerate(self.layers))


def chosen(choice, steps=120, **options):
    model = Uneven()
    opt = zo.block_coordinate(model, 0.0, choice=choice, sampler=zo.gaussian, **options)
    names = []
    for _ in range(steps):
        (block,) = opt.active_blocks
        names.append(block.name)
        opt.step(model.loss)
    return opt, names


def test_turns_and_equal_chances():
    _, names = chosen("cyclic", 7)
    assert names == [f"layers.{i % 3}" for i in range(7)]
    _, names = chosen("random")
    assert all(20 < count < 60 for count in Counter(names).values())


def test_the_adaptive_choice_goes_where_coefficients_are_large_and_explores():
    opt, names = chosen("adaptive", explore=0.3)
    shares = opt.block_choice.shares()
    assert sum(shares) == pytest.approx(1)
    assert min(shares) >= 0.1
    assert shares[2] > 0.6
    count = Counter(names)
    assert count["layers.2"] > 60
    assert min(count.values()) > 3


@pytest.mark.parametrize("choice", ["random", "adaptive"])
def test_an_unbiased_step_is_divided_by_the_probability_of_its_block(choice):
    model = Uneven().double()
    opt = zo.block_coordinate(model, 1.0, choice=choice, unbiased=True)
    for _ in range(12):
        place = [b.name for b in opt.blocks].index(opt.active_blocks[0].name)
        share = opt.block_choice.shares()[place]
        before = model.layers[place].weight.detach().clone()
        found = []
        opt.step(model.loss, inspect=found.append)
        ((c, u),) = found[0].terms
        expected = before - c / share * u.of(model, f"layers.{place}.weight")
        assert torch.allclose(model.layers[place].weight, expected)


def test_the_dominant_layer_is_the_first_with_outliers_or_none_is_named():
    layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    for i in (1, 3):
        layers[i].weight.data[0].fill_(1e7)
    x = torch.ones(1, 8)
    assert [
        p is q for p, q in zip(zo.dominant_layer(layers, lambda: layers(x)), layers[1].parameters(), strict=True)
    ] == [True] * 2
    with pytest.raises(zo.UsageError, match="no layer's output has outliers"):
        zo.dominant_layer(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), lambda: None)
    layers[1].requires_grad_(False)
    with pytest.raises(zo.UsageError, match="none of whose parameters requires a gradient"):
        zo.dominant_layer(layers, lambda: layers(x))
    with pytest.raises(zo.UsageError, match="no stack of layers"):
        zo.dominant_layer(nn.Linear(2, 2), lambda: None)


def test_blocks_that_are_no_partition_are_refused():
    with pytest.raises(zo.UsageError, match="in no block"):
        zo.block_coordinate(Uneven(), 0.1, blocks=[zo.Block("one", ("layers.0.weight",))])
