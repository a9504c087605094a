"""Weights that lie elsewhere and visit the model only while a module runs are tuned like any others."""

import copy

import accelerate
import pytest
import torch
from torch import nn

import zotune as zo

CPU = torch.device("cpu")
IDS = torch.tensor([1, 2, 2, 6])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3, bias=False)).to(dtype)


def pair(dtype=torch.float32):
    """A model offloaded to the CPU, and the same one not offloaded."""
    model = network(dtype)
    return accelerate.cpu_offload(copy.deepcopy(model), execution_device=CPU), model


@each_dtype
@pytest.mark.parametrize("sampler", [zo.rademacher, zo.gaussian], ids=str)
def test_offloaded_weights_are_perturbed_where_they_are_used(dtype, sampler):
    offloaded, plain = pair(dtype)
    assert all(p.is_meta for p in offloaded.parameters())
    u = zo.Direction(3, sampler)
    outs = []
    for model in (offloaded, plain):
        with torch.no_grad(), zo.perturbed(model, u, 0.25):
            outs.append(model(IDS))
    assert torch.equal(*outs)
    assert not torch.equal(outs[0], plain(IDS))
    assert torch.equal(offloaded(IDS), plain(IDS))


@pytest.mark.sample(2)
@each_dtype
@pytest.mark.parametrize("rounding", list(zo.Rounding))
def test_steps_update_offloaded_weights_as_they_do_others(dtype, rounding):
    offloaded, plain = pair(dtype)
    runs = []
    for model in (offloaded, plain):
        opt = zo.zo_sgd(model, lr=0.05, num_queries=2, rounding=rounding)
        runs.append([opt.step(lambda model=model: model(IDS).float().square().mean()) for _ in range(5)])
    assert runs[0] == runs[1]
    for tensor in opt.tuned:
        stored = zo.ParameterSet(offloaded)[tensor.name].storage()
        assert torch.equal(stored, tensor.parameter)
    assert not torch.equal(plain[1].weight, network(dtype)[1].weight)


def test_directions_of_an_offloaded_tensor_are_those_of_the_tensor():
    offloaded, plain = pair()
    u = zo.Direction(3, zo.gaussian)
    assert torch.equal(u.of(offloaded, "1.weight"), u.of(plain, "1.weight"))


@pytest.mark.parametrize("tied_again", [False, True], ids=["offloading unties", "tied again"])
def test_tied_offloaded_tensors_are_one_tensor(tied_again):
    plain = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    plain[1].weight = plain[0].weight
    offloaded = accelerate.cpu_offload(copy.deepcopy(plain), execution_device=CPU)
    if tied_again:  # as loaders do that place a model on several devices
        offloaded[1].weight = offloaded[0].weight
    runs = []
    for model in (offloaded, plain):
        opt = zo.zo_sgd(model, lr=0.01)
        assert [t.name for t in opt.tuned] == ["0.weight"]
        runs.append([opt.step(lambda model=model: model(IDS).square().mean()) for _ in range(5)])
    assert runs[0] == runs[1]


def test_an_offloaded_tensor_that_is_not_read_is_an_error():
    offloaded, _ = pair()
    with pytest.raises(zo.UnreadTensorError, match=r"3\.weight"):
        zo.zo_sgd(offloaded, lr=0.1).step(lambda: offloaded[:3](IDS).sum())


def test_a_frozen_offloaded_tensor_does_not_move():
    model = network()
    model[1].requires_grad_(False)
    before = model[1].weight.clone()
    accelerate.cpu_offload(model, execution_device=CPU)
    zo.zo_sgd(model, lr=0.1).step(lambda: model(IDS).sum())
    assert torch.equal(model[1]._hf_hook.weights_map["weight"], before)


def test_offloading_to_disk_is_refused_before_an_update_is_lost(tmp_path):
    model = accelerate.disk_offload(network(), tmp_path, execution_device=CPU)
    with pytest.raises(zo.UsageError, match=r"weights are not held in memory.*Offload the model to the CPU"):
        zo.zo_sgd(model, lr=0.1).step(lambda: model(IDS).sum())


def test_a_meta_tensor_without_weights_anywhere_is_refused():
    model = nn.Linear(2, 2, device="meta")
    with pytest.raises(zo.UsageError, match="on the meta device"):
        zo.Direction(1).of(model, "weight")
