"""Directions within given subspaces: where they lie, their covariance, thin products, and steps that stay there."""

import pytest
import torch
from torch import nn

import zotune as zo
from zotune.directions.samplers import Subspace

M, N, R = 7, 9, 2


def basis(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q.float()


LEFT, RIGHT = basis(M, R, 1), basis(N, R + 1, 2)
SPACES = {
    "right": Subspace(0, None, RIGHT),
    "left": Subspace(0, LEFT, None),
    "both": Subspace(0, LEFT, RIGHT),
    "scaled": Subspace(0, 3 * LEFT, None, 0.5),
}


def model_of(dtype=torch.float32):
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(N, M), nn.LayerNorm(M), nn.Linear(M, 3)).to(dtype)


def inside(space, u):
    """The part of u within a subspace, in float64, from the bases alone."""
    u = u.double()
    for side, turned in ((space.left, False), (space.right, True)):
        if side is not None:
            q = torch.linalg.qr(side.double()).Q
            u = (u @ q) @ q.t() if turned else q @ (q.t() @ u)
    return u


@pytest.mark.parametrize("kind", SPACES)
def test_directions_lie_in_their_subspace_and_have_its_projection_as_covariance(kind):
    model, space = model_of(), SPACES[kind]
    tuned = zo.ParameterSet(model)
    sampler = zo.within(zo.rademacher, {"0.weight": space}).at(tuned, 0, 0)
    parts = torch.stack([zo.Direction(seed, sampler).of(tuned, "0.weight") for seed in range(2000)]).double()
    assert all(torch.allclose(inside(space, part), part, atol=1e-5) for part in parts[:5])
    found = torch.einsum("sij,skl->ijkl", parts, parts) / len(parts)
    rows = torch.eye(M) if space.left is None else space.left @ space.left.t()
    columns = torch.eye(N) if space.right is None else space.right @ space.right.t()
    expected = space.scale**2 * torch.einsum("ik,jl->ijkl", rows.double(), columns.double())
    assert (found - expected).abs().max() < 0.25 * expected.abs().max()
    # Any slice of a part is that of the whole; other tensors have the base's directions.
    tensor = zo.ParameterSet(model)["0.weight"]
    out = torch.empty(20)
    sampler.fill(out, 7, tensor.id, 11)
    assert torch.equal(out, parts[7].float().flatten()[11:31])
    plain = zo.Direction(7, zo.rademacher)
    assert torch.equal(zo.Direction(7, sampler).of(model, "0.bias"), plain.of(model, "0.bias"))


def test_a_vector_has_its_own_coordinates():
    model = model_of()
    tuned = zo.ParameterSet(model)
    sampler = zo.within(zo.gaussian, {"1.weight": Subspace(0, LEFT, None)}).at(tuned, 0, 0)
    parts = torch.stack([zo.Direction(seed, sampler).of(tuned, "1.weight") for seed in range(2000)]).double()
    found = parts.t() @ parts / len(parts)
    assert (found - (LEFT @ LEFT.t()).double()).abs().max() < 0.08
    out = torch.empty(4)
    sampler.fill(out, 5, zo.ParameterSet(model)["1.weight"].id, 2)
    assert torch.equal(out, parts[5].float()[2:6])


@pytest.mark.parametrize("kind", SPACES)
def test_probes_and_steps_are_those_of_whole_matrices_in_float64(kind):
    model, x = model_of(torch.float64), torch.randn(11, N, dtype=torch.float64)
    sampler = zo.within(zo.gaussian, {"0.weight": SPACES[kind], "1.weight": Subspace(0, LEFT, None)})
    opt = zo.zo_sgd(model, lr=0.3, mu=1e-2, sampler=sampler, num_queries=2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    directions = opt.directions()
    ends, expected = [], {n: torch.zeros_like(p) for n, p in before.items()}
    for u in directions:
        moved = {n: u.of(model, n).double() for n in before}
        values = []
        for a in (1e-2, -1e-2):
            with zo.perturbed(opt.tuned, u, a):
                found = model(x).square().mean()
            whole = torch.func.functional_call(model, {n: p + a * moved[n] for n, p in before.items()}, (x,))
            assert torch.allclose(found, whole.square().mean(), rtol=1e-12)
            values.append(float(found))
        c = (values[0] - values[1]) / 2e-2
        for n in expected:
            expected[n] -= 0.3 * c / 2 * moved[n]
        ends.append(c)
    opt.step(lambda: model(x).square().mean())
    for n, p in model.named_parameters():
        assert torch.allclose(p - before[n], expected[n], atol=1e-9), n
    step = (model[0].weight - before["0.weight"]).detach()
    assert step.abs().max() > 0
    assert torch.allclose(inside(SPACES[kind], step), step, atol=1e-8)


def test_a_direction_an_example_within_subspaces_is_each_examples_own():
    model, x = model_of(torch.float64), torch.randn(6, N, dtype=torch.float64)
    sampler = zo.within(zo.gaussian, {"0.weight": SPACES["right"], "1.weight": Subspace(0, LEFT, None)})
    opt = zo.zo_sgd(model, lr=0.1, mu=1e-3, sampler=sampler, directions_per_batch=6)
    f = zo.per_example(lambda x: model(x).square().mean(1), x)
    estimate = opt.estimate(f)
    for (c, u), row in zip(estimate.terms, x, strict=True):
        ends = []
        for a in (1e-3, -1e-3):
            with zo.perturbed(opt.tuned, u, a):
                ends.append(float(model(row[None]).square().mean()))
        assert c == pytest.approx((ends[0] - ends[1]) / 2e-3 / 6, rel=1e-6)


def test_what_fits_no_tensor_is_refused_in_words():
    model = model_of()
    for spaces, why in (
        ({"0.weigth": SPACES["left"]}, "no tuned tensor is called '0.weigth'"),
        ({"0.weight": Subspace(0, RIGHT, None)}, "no bases of a tensor of shape"),
        ({"1.weight": Subspace(0, None, LEFT)}, "no bases of a tensor of shape"),
    ):
        with pytest.raises(zo.UsageError, match=why):
            zo.zo_sgd(model, lr=0.1, sampler=zo.within(zo.gaussian, spaces)).directions()
    with pytest.raises(zo.UsageError, match="independent"):
        zo.within(zo.low_rank(zo.gaussian), {})


def test_a_ledger_of_other_bases_is_refused(tmp_path):
    from zotune.ledger import LedgerError, LedgerWriter, read
    from zotune.ledger.replay import header_of, record_to, replay

    def made(space):
        model = model_of()
        return model, zo.zo_sgd(model, lr=0.1, sampler=zo.within(zo.gaussian, {"0.weight": space}))

    model, opt = made(SPACES["left"])
    with LedgerWriter.create(tmp_path / "a.zol", header_of(opt)) as writer:
        record_to(writer, opt)
        for _ in range(3):
            opt.step(lambda: model(torch.ones(2, N)).square().sum())
    again, opt = made(SPACES["left"])
    replay(opt, read(tmp_path / "a.zol"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    _, other = made(SPACES["both"])
    with pytest.raises(LedgerError, match="sampler"):
        replay(other, read(tmp_path / "a.zol"))
