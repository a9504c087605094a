"""A tuned tensor keeps its name and its noise whatever wraps the model, and what cannot be tuned is refused."""

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import zotune as zo
from zotune.model import parameters as tuned
from zotune.model.parameters import ParameterSet, canonical_name, tensor_id


class Named(nn.Module):
    """A module that holds the parts it is given, under their names and in their order."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


# Two names whose ids of version 1 are the same.
COLLIDING = ("w73811", "w77563")


def names(model):
    return [t.name for t in ParameterSet(model)]


def ids(model):
    return {t.name: t.id for t in ParameterSet(model)}


def test_ids_are_frozen():
    assert tensor_id("", version=1) == 0x46D2E936
    assert tensor_id("lm_head.weight", version=1) == 0x23CE0CB5
    assert tensor_id("model.layers.0.self_attn.q_proj.weight", version=1) == 0xFDD6D894
    assert tensor_id("lm_head.weight") == 0x05B1D8A123CE0CB5


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.text())
def test_an_id_is_the_first_four_bytes_of_two_hashes_by_blake2s(name):
    halves = [hashlib.blake2s(name.encode(), digest_size=size).digest()[:4] for size in (4, 8)]
    assert tensor_id(name) == sum(byte << 8 * i for i, byte in enumerate(b"".join(halves)))
    assert tensor_id(name, version=1) == sum(byte << 8 * i for i, byte in enumerate(halves[0]))


def test_tensors_get_the_ids_of_another_version_and_keep_all_else():
    shared = nn.Linear(3, 3)
    found = ParameterSet(Named(b=shared, a=shared, c=nn.Linear(2, 2)))
    before = [(t.name, t.parameter, t.places) for t in found]
    found.set_noise_version(1)
    assert [t.id for t in found] == [tensor_id(t.name, version=1) for t in found]
    assert [(t.name, t.parameter, t.places) for t in found] == before
    assert all(found.find(t.parameter) is found[t.name] is found.named(t.name) is t for t in found)
    assert found["b.weight"] is found["a.weight"]
    found.set_noise_version(2)
    assert [t.id for t in found] == [tensor_id(t.name) for t in found]


def test_names_whose_ids_of_32_bits_collide_are_tuned_and_only_a_run_of_version_1_refuses_them():
    model = nn.ParameterDict({name: nn.Parameter(torch.ones(2)) for name in COLLIDING})
    assert len({tensor_id(name, version=1) for name in COLLIDING}) == 1
    found = ParameterSet(model)
    u = zo.Direction(3, zo.gaussian)
    assert not torch.equal(*(u.of(found, name) for name in COLLIDING))
    with pytest.raises(zo.UsageError, match="version 1"):
        found.set_noise_version(1)


def test_ids_of_a_large_model_are_distinct():
    parts = [f"model.layers.{i}.{part}.{w}" for i in range(200) for part in "abcdefgh" for w in ("weight", "bias")]
    assert len({tensor_id(name) for name in parts}) == len(parts)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (["fc.weight"], "fc.weight"),
        (["model.embed.weight", "lm_head.weight"], "lm_head.weight"),
        (["lm_head.weight", "model.embed.weight"], "lm_head.weight"),
        (["_orig_mod.fc.weight"], "fc.weight"),
        (["layers._orig_mod.0._checkpoint_wrapped_module.fc.weight"], "layers.0.fc.weight"),
        (["_fsdp_wrapped_module._fsdp_wrapped_module.fc.weight"], "fc.weight"),
        (["base_model.model.fc.weight"], "fc.weight"),
        (["_orig_mod.base_model.model._orig_mod.fc.weight"], "fc.weight"),
        (["my_orig_mod.weight"], "my_orig_mod.weight"),
        (["base_model.fc.weight"], "base_model.fc.weight"),
        (["z.weight", "_orig_mod.a.weight"], "a.weight"),
    ],
)
def test_canonical_names_are_those_without_wrappers(found, expected):
    assert canonical_name(found) == expected


def test_wrapping_a_model_changes_neither_names_nor_noise():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    compiled = Named(_orig_mod=model)
    adapted = Named(base_model=Named(model=compiled))
    u = zo.Direction(4)
    for wrapper in (compiled, adapted, torch.compile(model)):
        assert ids(wrapper) == ids(model)
        for t in ParameterSet(model):
            assert torch.equal(u.of(wrapper, t.name), u.of(model, t.name))


def test_a_wrapped_tensor_is_found_under_its_full_name_too():
    model = nn.Linear(3, 2)
    tensors = ParameterSet(Named(_orig_mod=model))
    assert tensors["weight"] is tensors["_orig_mod.weight"]
    assert tensors["weight"].parameter is model.weight


def test_tied_tensors_are_one_tensor_with_every_name():
    first, second = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    second.weight = first.weight
    tensors = ParameterSet(Named(z=first, a=second))
    assert [t.name for t in tensors] == ["a.weight"]
    assert tensors["z.weight"] is tensors["a.weight"]
    assert tensors.numel == 15
    assert names(Named(z=first, a=second)) == names(Named(a=second, z=first))


def test_a_module_that_is_registered_twice_is_one():
    shared = nn.Linear(3, 3)
    assert names(Named(b=shared, a=shared)) == ["a.weight", "a.bias"]


def test_noise_does_not_depend_on_the_order_of_parameters():
    parts = {"a": nn.Linear(3, 2), "b": nn.LayerNorm(4), "c": nn.Embedding(5, 2)}
    model, reordered = Named(**parts), Named(**dict(reversed(parts.items())))
    u = zo.Direction(11, zo.gaussian)
    assert names(model) != names(reordered)
    assert ids(model) == ids(reordered)
    for name in names(model):
        assert torch.equal(u.of(model, name), u.of(reordered, name))


def test_equal_shaped_tensors_have_unrelated_noise():
    model = nn.ModuleList(nn.Linear(100, 100) for _ in range(2))
    u = zo.Direction(11)
    correlation = (u.of(model, "0.weight") * u.of(model, "1.weight")).mean()
    assert abs(correlation) < 5 / 100


def test_noise_does_not_depend_on_dtype_or_on_what_else_is_tuned():
    model, u = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), zo.Direction(5)
    expected = u.of(model, "1.weight")
    model[0].requires_grad_(False)
    assert torch.equal(u.of(model, "1.weight"), expected)
    assert torch.equal(u.of(model.bfloat16(), "1.weight"), expected)


def test_only_parameters_that_require_a_gradient_are_tuned():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    model[0].weight.requires_grad_(False)
    assert names(model) == ["0.bias", "1.weight", "1.bias", "2.weight", "2.bias"]


def test_given_parameters_are_tuned_instead():
    model = nn.Linear(2, 2).requires_grad_(False)
    assert [t.name for t in ParameterSet(model, [model.bias])] == ["bias"]


def test_two_tensors_with_one_id_are_refused(monkeypatch):
    monkeypatch.setattr(tuned, "tensor_id", lambda name: 7)
    with pytest.raises(zo.UsageError, match=r"'weight' and 'bias' have the same id in version 2 .*; rename"):
        ParameterSet(nn.Linear(2, 2))


def test_two_tensors_with_one_canonical_name_are_refused():
    model = Named(fc=nn.Linear(2, 2), _orig_mod=Named(fc=nn.Linear(2, 2)))
    with pytest.raises(zo.UsageError, match=r"'fc\.weight'"):
        ParameterSet(model)


def test_integer_tensors_are_refused_by_name():
    model = nn.Linear(2, 2)
    model.quantized = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    assert names(model) == ["weight", "bias"]
    with pytest.raises(zo.UsageError, match=r"'quantized' has dtype torch\.int8; only floating-point.*Freeze it"):
        ParameterSet(model, [model.weight, model.quantized])


@pytest.mark.parametrize("model", [nn.Linear(2, 2).requires_grad_(False), nn.ReLU()], ids=["frozen", "empty"])
def test_a_model_with_nothing_to_tune_is_refused(model):
    with pytest.raises(zo.UsageError, match=r"no parameter to tune.*requires_grad_"):
        ParameterSet(model)


@pytest.mark.parametrize("other", [slice(0, 12), slice(11, 23), slice(3, 5)], ids=["same", "overlap", "within"])
def test_parameters_that_share_memory_are_refused(other):
    memory = torch.zeros(24)
    model = Named(a=nn.Parameter(memory[:12]), b=nn.Parameter(memory[other]))
    with pytest.raises(zo.UsageError, match=r"'a' and 'b'|'b' and 'a'"):
        ParameterSet(model)


def test_parameters_that_lie_side_by_side_in_one_memory_are_accepted():
    memory = torch.zeros(24)
    assert names(
        Named(a=nn.Parameter(memory[12:]), b=nn.Parameter(memory[:12]), c=nn.Parameter(torch.zeros(0)))
    ) == list("abc")


def test_parameters_of_another_model_are_refused():
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(zo.UsageError, match=r"1 of the parameters.*do not belong to the model \(Linear\)"):
        ParameterSet(model, [model.weight, other.weight])


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(KeyError, match="no tuned tensor is called 'weigth'; there is: bias, weight"):
        ParameterSet(nn.Linear(2, 2))["weigth"]
