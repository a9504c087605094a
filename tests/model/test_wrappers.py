"""Wrappers change neither names nor noise nor blocks; views that share no number share no memory."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import zotune as zo
from zotune.model.overlap import first_overlap


class Nested(nn.Module):
    """A model with a part of its own that is called as data-parallel wrappers call theirs."""

    def __init__(self):
        super().__init__()
        self.module = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
        self.head = nn.Linear(2, 1)


def wrapped_inside(model):
    model.head = nn.DataParallel(model.head)
    return model


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "compiled": torch.compile,
    "averaged": AveragedModel,
    "both": lambda m: nn.DataParallel(torch.compile(m)),
    "the other way round": lambda m: torch.compile(nn.DataParallel(m)),
    "a part": wrapped_inside,
}


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("way", [zo.blocks_by_layer, zo.blocks_by_part, zo.blocks_by_linear])
def test_names_noise_and_blocks_are_those_of_the_model_alone(name, way):
    plain, wrapped = Nested(), WRAPPERS[name](Nested())
    assert [(t.name, t.id) for t in zo.ParameterSet(plain)] == [(t.name, t.id) for t in zo.ParameterSet(wrapped)]
    assert way(plain) == way(wrapped)
    u = zo.Direction(5, zo.gaussian)
    for long, _ in wrapped.named_parameters():
        own = zo.ParameterSet(wrapped)[long].name
        assert torch.equal(u.of(wrapped, long), u.of(plain, own))


def test_a_compiled_sequence_has_the_blocks_of_its_layers():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2))
    assert [b.name for b in zo.blocks_by_layer(torch.compile(model))] == ["0", "1"]


def test_sharded_tensors_are_refused():
    model = nn.Linear(2, 2)
    model._handle = type("Handle", (), {"uses_sharded_strategy": True})()
    with pytest.raises(zo.UsageError, match="FSDP"):
        zo.ParameterSet(model)


def of_deepspeed(model):
    model.weight.ds_id = 0
    return model


def of_several_processes(model):
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module, wrapped.process_group = model, None
    return wrapped


@pytest.mark.parametrize(
    ("wrap", "says"), [(of_deepspeed, "fully_shard"), (of_several_processes, r"mesh=zotune\.mesh\(\)")]
)
def test_wrappers_of_training_by_gradients_are_refused_with_what_to_use(monkeypatch, wrap, says):
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group: 2)
    with pytest.raises(zo.UsageError, match=says):
        zo.ParameterSet(wrap(nn.Linear(2, 2)))


MEMORY = torch.zeros(6, 8)
VIEWS = {
    "columns": (MEMORY[:, :4], MEMORY[:, 4:], False),
    "common column": (MEMORY[:, :5], MEMORY[:, 4:], True),
    "even and odd": (MEMORY[::2], MEMORY[1::2], False),
    "transposed halves": (MEMORY[:, :4].T, MEMORY[:, 4:].T, False),
    "one inside the other's gaps": (MEMORY[:, ::2], MEMORY[2:4, 1:3], True),
    "in the gaps": (MEMORY[:, ::2], MEMORY[2:4, 1::2], False),
    "whole": (MEMORY, MEMORY[2], True),
    "one after the other": (MEMORY[:3], MEMORY[3:], False),
    "as other numbers": (MEMORY[:, :4], MEMORY.view(torch.float16)[:, 8:], False),
    "as other numbers, common": (MEMORY[:, :4], MEMORY.view(torch.float16)[:, 7:], True),
}


@pytest.mark.parametrize("name", VIEWS)
def test_only_tensors_with_a_number_in_common_overlap(name):
    one, other, overlap = VIEWS[name]
    for pair in ((one, other), (other, one)):
        found = first_overlap(zip("ab", pair, strict=True))
        assert (found is not None) == overlap
        model = nn.ParameterDict(dict(zip("ab", map(nn.Parameter, pair), strict=True)))
        if overlap:
            with pytest.raises(zo.UsageError, match="share memory"):
                zo.ParameterSet(model)
        else:
            assert len(zo.ParameterSet(model)) == 2


def test_columns_of_one_matrix_are_tuned_apart():
    memory, apart = torch.ones(3, 4), [nn.Parameter(torch.ones(3, 2)) for _ in range(2)]
    views = [nn.Parameter(memory[:, :2]), nn.Parameter(memory[:, 2:])]
    for pair in (views, apart):
        model = nn.ParameterList(pair)
        zo.zo_adam(model, 0.1, sampler=zo.gaussian).step(lambda m=model: (m[0] * m[1].square()).sum())
    assert all(torch.equal(v, a) for v, a in zip(views, apart, strict=True))
    assert not torch.equal(views[0], torch.ones(3, 2))


def test_an_expanded_parameter_is_refused():
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(1, 4).expand(3, 4))
    with pytest.raises(zo.UsageError, match="contiguous"):
        zo.ParameterSet(model)
