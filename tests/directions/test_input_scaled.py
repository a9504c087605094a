"""Directions scaled by what their entries multiply: the scales, their covariance, steps, slices, ledgers, refusals."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import zotune as zo

N, M = 6, 4


def model_of(dtype=torch.float32):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(N, M), nn.LayerNorm(M), Conv1D(3, M)).to(dtype)


def inputs(rows=50):
    torch.manual_seed(5)
    return torch.randn(rows, N) * torch.tensor([0.5, 1, 1, 30, 1, 2])


def expected_scales(x):
    """1 / rms of the columns of x in float64, by a plain loop, with a mean square of 1."""
    inverse = [1 / (sum(float(v) ** 2 for v in column) / len(column)) ** 0.5 for column in x.t()]
    mean = sum(v**2 for v in inverse) / len(inverse)
    return torch.tensor([v / mean**0.5 for v in inverse])


def test_scales_are_one_over_the_root_mean_square_of_what_each_number_multiplies():
    model, x = model_of(), inputs()
    found = zo.input_scales(model, lambda: model(x))
    assert found.keys() == {"0.weight", "1.weight", "2.weight"}
    with torch.no_grad():
        hidden = model[0](x)
    normalised = (hidden - hidden.mean(1, keepdim=True)) / (hidden.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    read = {"0.weight": x, "1.weight": normalised, "2.weight": model[1](hidden).detach()}
    for name, rows in read.items():
        assert torch.allclose(found[name], expected_scales(rows), rtol=1e-4), name


def test_an_input_that_is_never_used_has_a_bounded_scale():
    model = nn.Linear(3, 1, bias=False)
    found = zo.input_scales(model, lambda: model(torch.tensor([[1.0, 1.0, 0.0]])))["weight"]
    assert found[2] / found[0] == pytest.approx(100 * (3 / 2) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("base", [zo.rademacher, zo.gaussian], ids=repr)
def test_directions_have_the_scales_squared_as_covariance_and_slices_are_those_of_the_whole(base):
    model = model_of()
    tuned = zo.ParameterSet(model)
    columns, rows = torch.linspace(0.5, 2, N), torch.linspace(0.2, 1, M)
    given = {"0.weight": columns, "1.weight": rows, "2.weight": rows}
    sampler = zo.input_scaled(base, given).at(tuned, 0, 0)
    for name, scale in (("0.weight", columns[None]), ("1.weight", rows), ("2.weight", rows[:, None])):
        u, z = (zo.Direction(7, one).of(tuned, name) for one in (sampler, base))
        assert torch.equal(u, z * scale)
        for start, size in ((0, 3), (2, 2), (5, 6)):
            if start + size <= u.numel():
                out = torch.empty(size)
                sampler.fill(out, 7, tuned[name].id, start)
                assert torch.equal(out, u.flatten()[start : start + size])
    assert torch.equal(*(zo.Direction(7, one).of(tuned, "0.bias") for one in (sampler, base)))


@pytest.mark.parametrize("k", [None, 5])
def test_a_step_is_that_of_the_scaled_problem_in_float64(k):
    """x = s ⊙ θ: the step of x along u = s ⊙ z is that of θ along z, seen through s."""
    x = inputs(5).double()
    scales = {"0.weight": torch.rand(N) + 0.1, "1.weight": torch.rand(M) + 0.1}
    model = model_of(torch.float64)
    options = {"lr": 0.1, "mu": 1e-4, **({} if k is None else {"directions_per_batch": k})}

    def losses(rows):
        return model(rows).square().mean(1)

    opt = zo.zo_sgd(model, sampler=zo.input_scaled(zo.gaussian, scales), **options)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    f = (lambda: losses(x).mean()) if k is None else zo.per_example(losses, x)
    terms = opt.estimate(f).terms
    for (c, u), part in zip(terms, [x] if k is None else x.split(1), strict=True):
        plain = zo.Direction(u.seed, zo.gaussian)
        z = {n: plain.of(model, n).double() for n in before}
        scaled = {n: z[n] * scales[n].double() if n in scales else z[n] for n in before}

        def value(a, rows, moves):
            moved = {n: p + a * moves[n] for n, p in before.items()}
            return float(torch.func.functional_call(model, moved, (rows,)).square().mean()) * len(rows) / len(x)

        slope = (value(1e-4, part, scaled) - value(-1e-4, part, scaled)) / 2e-4
        assert c == pytest.approx(slope, rel=1e-5, abs=1e-9)
    opt.step(f)
    for n, p in model.named_parameters():
        step = -0.1 * sum(c * u.of(model, n).double() for c, u in terms)
        assert torch.allclose(p - before[n], step, atol=1e-9), n


def test_features_of_unequal_size_are_learnt_faster_than_with_equal_entries():
    """A linear problem whose features differ by a factor of 100: the loss after as many steps, best of many rates."""
    torch.manual_seed(0)
    x = torch.randn(64, N) * torch.logspace(-1, 1, N)
    y = x @ (torch.randn(N, 1) / torch.logspace(-1, 1, N)[:, None])

    def loss_after(scaled, rate):
        model = nn.Linear(N, 1, bias=False)
        nn.init.zeros_(model.weight)
        scales = zo.input_scales(model, lambda: model(x))
        sampler = zo.input_scaled(zo.rademacher, scales) if scaled else zo.rademacher
        opt = zo.zo_sgd(model, lr=rate, mu=1e-3, sampler=sampler, seed=1)
        for _ in range(150):
            loss = opt.step(lambda: (model(x) - y).square().mean())
            if not loss < 1e4:
                return float("inf")
        return float((model(x) - y).detach().square().mean())

    rates = [10**e for e in (-4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5, 0)]
    plain, scaled = (min(loss_after(one, rate) for rate in rates) for one in (False, True))
    assert scaled < 0.5 * plain


def test_what_fits_no_tensor_is_refused_in_words():
    model = model_of()
    for given, why in (
        ({"0.weigth": torch.ones(N)}, "no tuned tensor is called '0.weigth'"),
        ({"0.weight": torch.ones(M)}, "takes 6 positive scales"),
        ({"0.weight": torch.zeros(N)}, "takes 6 positive scales"),
    ):
        with pytest.raises(zo.UsageError, match=why):
            zo.zo_sgd(model, lr=0.1, sampler=zo.input_scaled(zo.gaussian, given)).directions()
    with pytest.raises(zo.UsageError, match="independent"):
        zo.input_scaled(zo.sparse(zo.gaussian, 0.5), {})
    with pytest.raises(zo.UsageError, match="did not read"):
        zo.input_scales(model, lambda: None)


def test_a_ledger_of_other_scales_is_refused(tmp_path):
    from zotune.ledger import LedgerError, LedgerWriter, read
    from zotune.ledger.replay import header_of, record_to, replay

    def made(scale):
        model = model_of()
        sampler = zo.input_scaled(zo.gaussian, {"0.weight": torch.linspace(0.5, scale, N)})
        return model, zo.zo_sgd(model, lr=0.1, sampler=sampler)

    model, opt = made(2.0)
    with LedgerWriter.create(tmp_path / "a.zol", header_of(opt)) as writer:
        record_to(writer, opt)
        for _ in range(3):
            opt.step(lambda: model(inputs(2)).square().sum() * 1e-3)
    again, opt = made(2.0)
    replay(opt, read(tmp_path / "a.zol"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(LedgerError, match="sampler"):
        replay(made(2.5)[1], read(tmp_path / "a.zol"))
