"""Directions within a subspace: orthonormal bases that stay for their interval, and lengths as those of dense ones."""

import numpy as np
import pytest
import torch
from torch import nn

import zotune as zo
from zotune.ledger import LedgerError, LedgerWriter, read
from zotune.ledger.replay import header_of, record_to, replay
from zotune.ledger.stream import Trace

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


def test_a_reshaped_matrix_has_the_rank_of_its_square_row_by_row():
    model = nn.Linear(96, 4, bias=False)  # 384 numbers: 16 × 24
    made = zo.subspace(zo.gaussian, 6, interval=2, sides="both", square=True)
    sampler = sampler_at(model, made, 0)
    tensor = zo.ParameterSet(model)["weight"]
    space = sampler.subspace(tensor.id, CPU)
    assert (space.left.shape, space.right.shape) == ((16, 6), (24, 6))
    parts = []
    for seed in range(400):
        z = sampler.coordinates(seed, tensor.id, CPU).double().numpy()
        plain = 384**0.5 / 6 * space.left.double().numpy() @ z @ space.right.double().numpy().T
        parts.append(zo.Direction(seed, sampler).of(model, "weight"))
        np.testing.assert_allclose(parts[-1].numpy(), plain.reshape(4, 96), rtol=1e-4, atol=1e-5)
    assert int(torch.linalg.matrix_rank(parts[0].view(16, 24))) == 6
    assert int(torch.linalg.matrix_rank(parts[0])) == 4
    lengths = torch.stack([part.square().sum() for part in parts])
    assert abs(float(lengths.mean()) - 384) < 4 * float(lengths.std()) / 20
    out = torch.empty(50)
    sampler.fill(out, 7, tensor.id, 31)
    assert torch.equal(out, parts[7].flatten()[31:81])
    # A matrix that is as near to a square as it can be keeps its thin factors, one that was reshaped has none.
    assert not zo.Direction(1, sampler).has_factors(tensor.id)
    square = nn.Linear(6, 4, bias=False)
    plain, same = (
        zo.Direction(1, sampler_at(square, zo.subspace(zo.gaussian, 2, interval=2, sides="both", square=s), 0))
        for s in (False, True)
    )
    assert torch.equal(plain.of(square, "weight"), same.of(square, "weight"))
    assert same.has_factors(zo.ParameterSet(square)["weight"].id)


def test_a_run_in_reshaped_subspaces_is_replayed_whole_and_in_slices(tmp_path):
    def made():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(48, 3), nn.Linear(3, 48))
        return model, zo.subzero(model, lr=0.01, rank=8, interval=2, square=True)

    model, opt = made()
    x = torch.randn(5, 48)
    with LedgerWriter.create(tmp_path / "a.zol", header_of(opt)) as writer:
        record_to(writer, opt)
        for _ in range(5):
            opt.step(lambda: model(x).square().mean())
    ledger, (again, other) = read(tmp_path / "a.zol"), made()
    replay(other, ledger)
    for p, q in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)
    whole = made()[0].get_parameter("0.weight").detach().clone().view(-1)
    Trace(made()[1], list(ledger)).apply("0.weight", whole, size=37)
    assert torch.equal(whole, model.get_parameter("0.weight").view(-1))
    plain = zo.subzero(made()[0], lr=0.01, rank=8, interval=2)
    with pytest.raises(LedgerError):
        replay(plain, ledger)
