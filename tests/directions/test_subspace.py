"""Directions within a subspace: orthonormal bases that stay for their interval, and lengths as those of dense ones."""

import pytest
import torch
from torch import nn

import zotune as zo

CPU = torch.device("cpu")


def sampler_at(model, made, step, seed=3):
    return made.at(zo.ParameterSet(model), seed, step)


@pytest.mark.parametrize("sides", ["left", "both"])
def test_bases_are_orthonormal_and_renewed_every_interval(sides):
    model = nn.Linear(40, 30)
    made = zo.subspace(zo.gaussian, 5, interval=3, sides=sides)
    (tensor, _) = zo.ParameterSet(model)
    spaces = [sampler_at(model, made, step).subspace(tensor.id, CPU) for step in range(6)]
    for space in spaces:
        for basis in (space.left, space.right):
            if basis is not None:
                assert torch.allclose(basis.t() @ basis, torch.eye(5), atol=1e-6)
    assert all(
        torch.equal(a.left, b.left) == (i // 3 == j // 3) for i, a in enumerate(spaces) for j, b in enumerate(spaces)
    )
    assert (spaces[0].right is not None) == (sides == "both")
    assert spaces[0].right is None or not torch.equal(spaces[0].right[:30], spaces[0].left)


@pytest.mark.parametrize(("sides", "squared"), [("left", 4 * 24), ("both", 24 * 18)])
def test_a_direction_has_the_rank_and_the_mean_length_of_its_kind(sides, squared):
    model = nn.Linear(24, 18)
    sampler = sampler_at(model, zo.subspace(zo.gaussian, 4, interval=9, sides=sides), 0)
    parts = [zo.Direction(seed, sampler).of(model, "weight") for seed in range(400)]
    assert all(int(torch.linalg.matrix_rank(part)) == 4 for part in parts[:5])
    lengths = torch.stack([part.square().sum() for part in parts])
    assert abs(float(lengths.mean()) - squared) < 4 * float(lengths.std()) / 20
    # Any slice of a part is that of the whole.
    out = torch.empty(50)
    tensor = zo.ParameterSet(model)["weight"]
    sampler.fill(out, 7, tensor.id, 31)
    assert torch.equal(out, parts[7].flatten()[31:81])


def test_small_matrices_get_their_own_rank_and_vectors_the_base():
    model = nn.Linear(3, 2)
    sampler = sampler_at(model, zo.subspace(zo.gaussian, 64, interval=2), 0)
    u, dense = zo.Direction(5, sampler), zo.Direction(5, zo.gaussian)
    assert int(torch.linalg.matrix_rank(u.of(model, "weight"))) == 2
    assert torch.equal(u.of(model, "bias"), dense.of(model, "bias"))
    with pytest.raises(zo.UsageError, match="independent"):
        zo.subspace(zo.sparse(zo.gaussian, 0.5), 2, interval=2)
    with pytest.raises(zo.UsageError, match="interval=0"):
        zo.subspace(zo.gaussian, 2, interval=0)


def test_a_rule_of_coordinates_without_a_subspace_is_refused():
    from zotune.apply.subspace import InSubspace, coordinates_only

    for sampler in (zo.gaussian, zo.low_rank(zo.gaussian, 2), zo.sparse(zo.gaussian, 0.5)):
        model = nn.Linear(3, 2)
        opt = zo.ZerothOrder(model, 0.1, transform=InSubspace(coordinates_only), sampler=sampler)
        with pytest.raises(zo.UsageError, match="share none"):
            opt.step(lambda model=model: model.weight.sum() + model.bias.sum())
