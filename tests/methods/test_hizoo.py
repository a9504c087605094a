"""HiZOO and GRZO are their equations, written plainly in float64; what HiZOO's H does at the published α."""

import numpy as np
import pytest
import torch
from torch import nn

import zotune as zo
from problems import problem
from zotune.directions.scaled import base_of
from zotune.ledger import LedgerWriter, read
from zotune.ledger.replay import header_of, record_to, replay


def noise(p, opt):
    """The whole z of each direction of the coming step."""
    samplers = [zo.Direction(u.seed, base_of(u.sampler)) for u in opt.directions()]
    return [p.whole(u.of) for u in samplers]


@pytest.mark.parametrize("name", ["quadratic", "transformer"])
@pytest.mark.parametrize("q", [1, 3])
def test_hizoo_in_double_precision_is_its_equations(name, q):
    mu, eta, alpha = 0.01, 0.02, 0.05
    p = problem(name)
    f, _ = p.plain()
    opt = zo.hizoo(p.model, eta, mu=mu, alpha=alpha, num_queries=q)
    x, h = p.position(), np.ones_like(p.position())
    for _ in range(6):
        z = noise(p, opt)
        ends = [(f(x + mu * z_i / np.sqrt(h)), f(x - mu * z_i / np.sqrt(h))) for z_i in z]
        curvature = [abs(plus + minus - 2 * f(x)) / (2 * mu**2) for plus, minus in ends]
        h = (1 - alpha) * h + alpha * np.mean([k * h * z_i**2 for k, z_i in zip(curvature, z, strict=True)], axis=0)
        step = np.mean([(a - b) / (2 * mu) * z_i for (a, b), z_i in zip(ends, z, strict=True)], axis=0)
        x = x - eta * step / np.sqrt(h)
        opt.step(p.closure)
        # A scaled direction is rounded to single precision.
        np.testing.assert_allclose(p.position(), x, rtol=1e-6, atol=1e-7)
    assert h.std() > 1e-3


def test_without_a_share_hizoo_is_zo_sgd():
    ends = []
    for make in (lambda m: zo.hizoo(m, 0.02, alpha=0.0), lambda m: zo.zo_sgd(m, 0.02, sampler=zo.gaussian)):
        p = problem("transformer")
        opt = make(p.model)
        for _ in range(4):
            opt.step(p.closure)
        ends.append(p.position())
    np.testing.assert_allclose(*ends, rtol=1e-9, atol=1e-10)


@pytest.mark.slow
def test_at_the_published_share_h_grows_by_one_common_factor_alone():
    """The figures of `hizoo`'s docstring: 200 numbers with curvatures from 0.1 to 100, 1,000 steps."""
    curvatures = torch.logspace(-1, 2, 200, dtype=torch.float64)
    model = nn.Linear(200, 1, bias=False).double()
    opt = zo.hizoo(model, lr=0.0)
    kappas = []
    opt.on_step = lambda record: kappas.append(record.scalars[0])
    for _ in range(1000):
        opt.step(lambda: (model.weight.square() * curvatures).sum() / 2)
    h = opt.state[model.weight]["hessian"].view(-1)
    assert np.mean(kappas) == pytest.approx(float(curvatures.sum()) / 2, rel=0.02)
    assert float(h.mean()) == pytest.approx(1.015, abs=1e-3)
    assert 5e-4 < float(h.std()) < 1e-3
    correlation = torch.corrcoef(torch.stack([h.log(), curvatures.log()]))[0, 1]
    assert float(correlation) == pytest.approx(0.28, abs=0.02)


def test_in_single_precision_a_small_curvature_leaves_h_at_one():
    single = nn.Linear(200, 1, bias=False)
    opt = zo.hizoo(single, lr=0.0, mu=0.1)
    for _ in range(30):
        opt.step(lambda: 5e-4 * single.weight.square().sum())
    assert (opt.state[single.weight]["hessian"] == 1).all()


@pytest.mark.parametrize("queries", [1, 2])
def test_grzo_is_a_loop_over_examples_with_directions_stored_whole(queries):
    mu, eta, eps = 1e-2, 0.05, 1e-3
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(6, 4).double(), torch.randn(6, 3).double()
    opt = zo.grzo(model, eta, mu=mu, eps=eps, num_queries=queries)
    for _ in range(3):
        weight, bias = (p.detach().clone() for p in model.parameters())
        before = weight.clone(), bias.clone()
        us = opt.directions(count=6 * queries)
        parts = [(u.of(model, "weight").double(), u.of(model, "bias").double()) for u in us]

        def loss(i, a, own, before=before):
            (w, b), (weight, bias) = own[i], before
            return float((x[i] @ (weight + a * w).t() + bias + a * b - y[i]).square().mean())

        for lo in range(0, 6 * queries, 6):
            own = parts[lo : lo + 6]
            delta = np.array([loss(i, mu, own) - loss(i, -mu, own) for i in range(6)])
            a = delta / (delta.std() + eps)
            for k, p in enumerate((weight, bias)):
                p -= eta / (2 * mu * 6 * queries) * sum(a_i * part[k] for a_i, part in zip(a, own, strict=True))
        opt.step(zo.per_example(lambda x, y: (model(x) - y).square().mean(dim=1), x, y))
        assert torch.allclose(model.weight, weight, rtol=1e-7) and torch.allclose(model.bias, bias, rtol=1e-7)
    assert opt.num_forwards == 6 * queries


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_grzo_goes_on_from_its_state_and_its_ledger_to_the_bit(tmp_path, dtype):
    x, y = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).to(dtype), torch.zeros(5, 3, dtype=dtype)

    def made():
        torch.manual_seed(0)
        model = nn.Linear(4, 3).to(dtype)
        return model, zo.grzo(model, 1e-3, mu=0.1, seed=6)

    def step(model, opt):
        opt.step(zo.per_example(lambda x, y: (model(x) - y).float().square().mean(dim=1), x, y))

    whole, opt = made()
    with LedgerWriter.create(tmp_path / "run.zol", header_of(opt)) as writer:
        record_to(writer, opt)
        for _ in range(2):
            step(whole, opt)
        saved = {k: v.clone() for k, v in whole.state_dict().items()}, opt.state_dict()
        for _ in range(2):
            step(whole, opt)
    again, other = made()
    assert not torch.equal(again.weight, whole.weight)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    for _ in range(2):
        step(again, other)
    replayed, third = made()
    replay(third, read(tmp_path / "run.zol"))
    for model in (again, replayed):
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_hizoo_and_grzo_go_down_a_quadratic_in_every_precision(dtype):
    p = problem("quadratic", dtype)
    before, opt = p.value(), zo.hizoo(p.model, 0.02, mu=0.02, alpha=1e-3)
    for _ in range(40):
        opt.step(p.closure)
    assert p.value() < before - 0.05
    torch.manual_seed(0)
    model = nn.Linear(4, 3).to(dtype)
    x, y = torch.randn(6, 4).to(dtype), torch.randn(6, 3).to(dtype)
    f = zo.per_example(lambda x, y: (model(x) - y).float().square().mean(dim=1), x, y)
    before, opt = float(f().detach()), zo.grzo(model, 2e-3, mu=0.05)
    for _ in range(40):
        opt.step(f)
    assert float(f().detach()) < before - 0.05


def test_a_loss_that_is_no_number_leaves_weights_and_curvature():
    p = problem("transformer", torch.float32)
    opt = zo.hizoo(p.model, 0.02, mu=0.01, alpha=0.05)
    opt.step(p.closure)
    before, state = p.position(), str(opt.state_dict()["state"])
    opt.step(lambda: p.closure() * float("nan"))
    assert opt.num_skipped == 1
    np.testing.assert_array_equal(p.position(), before)
    assert str(opt.state_dict()["state"]) == state


def test_what_they_cannot_do_is_refused_with_the_reason():
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="alpha is the share"):
        zo.hizoo(model, 0.1, alpha=1.0)
    with pytest.raises(zo.UsageError, match="hizoo makes directions"):
        zo.hizoo(model, 0.1, sampler=zo.sparse(zo.gaussian, 0.5))
    with pytest.raises(zo.UsageError, match="batches of 2"):
        x = torch.ones(1, 2)
        zo.grzo(model, 0.1).step(zo.per_example(lambda x: model(x).square().mean(dim=1), x))
    with pytest.raises(zo.UsageError, match="per_example"):
        zo.grzo(model, 0.1).step(lambda: model.weight.sum())
