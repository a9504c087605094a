"""An estimator is the formula it claims to be, and its expectation and variance are those of the theory."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import zotune as zo
from zotune import reference
from zotune.estimate.objective import evaluate, read
from zotune.model.parameters import ParameterSet

SIGMAS = 5.0
each_sampler = pytest.mark.parametrize("sampler", [zo.rademacher, zo.gaussian], ids=str)
each_difference = pytest.mark.parametrize("difference", [zo.central_difference, zo.forward_difference])


class Vector(nn.Module):
    """x ∈ R⁷, in two tensors, in double precision."""

    def __init__(self):
        super().__init__()
        start = torch.linspace(-1, 1.5, 7, dtype=torch.float64)
        self.first, self.second = nn.Parameter(start[:4].view(2, 2).clone()), nn.Parameter(start[4:].clone())

    def forward(self):
        return torch.cat([self.first.flatten(), self.second])

    def whole(self, part_of):
        """One vector from `part_of(model, name)`: of a direction or of an estimate."""
        return torch.cat([part_of(self, name).flatten() for name in ("first", "second")]).double().numpy()


D = 7
_RANDOM = np.random.default_rng(0)
H = (lambda m: m + m.T)(_RANDOM.normal(size=(D, D)))
B = _RANDOM.normal(size=D)


def quadratic(x):
    """½ xᵀHx + bᵀx, of a NumPy or a torch vector."""
    if isinstance(x, np.ndarray):
        return float(x @ H @ x / 2 + B @ x)
    return x @ torch.from_numpy(H) @ x / 2 + torch.from_numpy(B) @ x


def rosenbrock(x):
    """A smooth function that is no quadratic."""
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def directions(sampler, q, first=0):
    return [zo.Direction(first + i, sampler) for i in range(q)]


def position(model):
    return model().detach().numpy().copy()


@each_sampler
@pytest.mark.parametrize("mu", [1e-3, 0.1, 10.0])
def test_central_difference_is_exact_on_quadratics_for_any_mu(sampler, mu):
    model = Vector()
    gradient = H @ position(model) + B
    estimate = zo.central_difference(lambda: quadratic(model()), ParameterSet(model), directions(sampler, 3), mu=mu)
    for c, u in estimate.terms:
        assert c == pytest.approx(gradient @ model.whole(u.of) / 3, abs=1e-14 / mu * 20 + 1e-12)


@each_sampler
@pytest.mark.parametrize("mu", [1e-3, 0.1, 10.0])
def test_forward_difference_has_the_known_bias_on_quadratics(sampler, mu):
    model = Vector()
    gradient = H @ position(model) + B
    estimate = zo.forward_difference(lambda: quadratic(model()), ParameterSet(model), directions(sampler, 3), mu=mu)
    assert estimate.loss == pytest.approx(quadratic(position(model)), abs=1e-13)
    for c, direction in estimate.terms:
        u = model.whole(direction.of)
        assert c == pytest.approx((gradient @ u + mu / 2 * u @ H @ u) / 3, abs=1e-14 / mu * 20 + 1e-12)


@pytest.mark.parametrize("mu", [0.01, 0.1, 1.0])
def test_central_difference_has_the_known_bias_of_second_order_on_cubes(mu):
    model = Vector()
    (c, direction), *_ = zo.central_difference(
        lambda: (model() ** 3).sum(), ParameterSet(model), directions(zo.gaussian, 1), mu=mu
    ).terms
    u = model.whole(direction.of)
    assert c == pytest.approx(3 * position(model) ** 2 @ u + mu**2 * (u**3).sum(), abs=1e-11)


@pytest.mark.parametrize("mu", [1e-2, 1.0])
def test_estimates_of_a_linear_function_do_not_depend_on_mu(mu):
    model, us = Vector(), directions(zo.gaussian, 2)
    for difference in (zo.central_difference, zo.forward_difference):
        terms = difference(lambda: model() @ torch.from_numpy(B), ParameterSet(model), us, mu=mu).terms
        for c, u in terms:
            assert c == pytest.approx(B @ model.whole(u.of) / 2, abs=1e-12)


@each_sampler
@pytest.mark.parametrize("q", [1, 4])
@pytest.mark.parametrize(
    ("difference", "plain"),
    [(zo.central_difference, reference.rge), (zo.forward_difference, reference.one_sided_rge)],
)
def test_an_estimate_equals_the_plain_reference(sampler, q, difference, plain):
    model, us = Vector(), directions(sampler, q, first=100)
    expected = plain(lambda x: float(rosenbrock(x)), position(model), 0.01, [model.whole(u.of) for u in us])
    estimate = difference(lambda: rosenbrock(model()), ParameterSet(model), us, mu=0.01)
    assert [u for _, u in estimate.terms] == us
    np.testing.assert_allclose(model.whole(estimate.of), expected, rtol=1e-12, atol=1e-12 * np.abs(expected).max())


@each_sampler
def test_an_estimate_with_q_directions_is_the_mean_of_those_with_one(sampler):
    model, us = Vector(), directions(sampler, 4)
    tensors, closure = ParameterSet(model), lambda: rosenbrock(model())
    together = zo.central_difference(closure, tensors, us, mu=0.01)
    apart = [zo.central_difference(closure, tensors, [u], mu=0.01) for u in us]
    assert together.loss == pytest.approx(np.mean([e.loss for e in apart]), rel=1e-14)
    for (c, _), alone in zip(together.terms, apart, strict=True):
        assert c == pytest.approx(alone.terms[0][0] / 4, rel=1e-14)


@pytest.mark.sample(1)
@each_sampler
@pytest.mark.parametrize("q", [1, 4])
@pytest.mark.parametrize("runs", [300, pytest.param(1500, marks=pytest.mark.slow)])
def test_expectation_is_the_gradient_and_second_moment_that_of_theory(sampler, q, runs):
    """E|ĝ|² = (1 + (d + 1)/q) |∇f|² for Gaussian, (1 + (d - 1)/q) |∇f|² for Rademacher directions."""
    model = Vector()
    tensors, closure = ParameterSet(model), lambda: quadratic(model())
    gradient = H @ position(model) + B
    batches = (directions(sampler, q, first=q * run) for run in range(runs))
    g = np.stack([model.whole(zo.central_difference(closure, tensors, us, mu=0.1).of) for us in batches])
    z = (g.mean(0) - gradient) / (g.std(0) / math.sqrt(runs))
    assert np.abs(z).max() < SIGMAS
    squares = (g**2).sum(1)
    extra = D + 1 if sampler is zo.gaussian else D - 1
    expected = (1 + extra / q) * gradient @ gradient
    assert abs(squares.mean() - expected) < SIGMAS * squares.std() / math.sqrt(runs)
    assert squares.std() / math.sqrt(runs) < 0.08 * math.sqrt(1500 / runs) * expected  # or the line above says little


@each_sampler
@pytest.mark.slow
def test_variance_falls_as_one_over_q(sampler):
    model, runs = Vector(), 600
    tensors, closure = ParameterSet(model), lambda: quadratic(model())
    gradient, errors = H @ position(model) + B, {}
    for q in (1, 2, 8):
        batches = (directions(sampler, q, first=q * run) for run in range(runs))
        g = np.stack([model.whole(zo.central_difference(closure, tensors, us, mu=0.1).of) for us in batches])
        squares = ((g - gradient) ** 2).sum(1)
        errors[q] = squares.mean() * q, SIGMAS * squares.std() * q / math.sqrt(runs)
    for (one, width), (other, other_width) in itertools.combinations(errors.values(), 2):
        assert abs(one - other) < math.hypot(width, other_width)


@each_difference
@pytest.mark.parametrize("q", [1, 4])
def test_forward_passes_are_as_many_as_reported(difference, q):
    model, count = Vector(), itertools.count()
    opt = zo.zo_sgd(model, lr=0.1, difference=difference, num_queries=q)

    def closure():
        next(count)
        return quadratic(model())

    estimate = opt.estimate(closure)
    expected = 2 * q if difference is zo.central_difference else q + 1
    assert estimate.num_forwards == opt.num_forwards == next(count) == expected
    opt.step(closure)
    assert opt.num_forwards == next(count) - 1 == 2 * expected


def test_loss_of_a_central_difference_is_the_mean_of_its_probes():
    model, seen = Vector(), []

    def closure():
        seen.append(float(rosenbrock(model())))
        return seen[-1]

    assert zo.zo_sgd(model, lr=0.1, mu=0.1, num_queries=3).estimate(closure).loss == pytest.approx(np.mean(seen))


@each_difference
def test_micro_batches_accumulate_to_the_whole_batch(difference):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y = torch.randn(12, 3, dtype=torch.float64), torch.randn(12, 1, dtype=torch.float64)
    parts = [slice(0, 1), slice(1, 6), slice(6, 12)]

    def loss_of(part):
        return lambda: nn.functional.mse_loss(model(x[part]), y[part])

    opt = zo.zo_sgd(model, lr=0.1, num_queries=2, difference=difference)
    whole = opt.estimate(loss_of(slice(None)))
    summed = opt.estimate(zo.accumulate([loss_of(p) for p in parts], weights=[1, 5, 6]))
    assert summed.loss == pytest.approx(whole.loss, rel=1e-13)
    assert [u for _, u in summed.terms] == [u for _, u in whole.terms]
    for (c, _), (expected, _) in zip(summed.terms, whole.terms, strict=True):
        assert c == pytest.approx(expected, rel=1e-10)
    unweighted = zo.accumulate([loss_of(p) for p in parts])()
    assert unweighted == pytest.approx(np.mean([loss_of(p)().item() for p in parts]))


@pytest.mark.parametrize(("closures", "weights"), [(2, [1.0]), (1, [1.0, 2.0]), (0, None), (0, [])])
def test_accumulate_refuses_unequal_numbers_of_closures_and_weights(closures, weights):
    with pytest.raises(ValueError, match=f"got {closures} and {len(weights or [])}"):
        zo.accumulate([lambda: 1.0] * closures, weights)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.tensor(1.0, dtype=torch.bfloat16), r"torch\.bfloat16 loss, which is too coarse.*\.float\(\)"),
        (torch.tensor(1.0, dtype=torch.float16), r"torch\.float16 loss"),
        (None, "must return the loss, got NoneType.*must not call backward"),
        ("0.5", "must return the loss, got str"),
        (torch.ones(3), r"one number, got a tensor of shape \(3,\)"),
        (torch.ones(0), r"one number, got a tensor of shape \(0,\)"),
    ],
    ids=str,
)
def test_a_value_that_is_no_loss_is_refused_with_the_reason(value, message):
    with pytest.raises(TypeError, match=message):
        evaluate(lambda: value)
    with pytest.raises(TypeError, match=message):
        zo.accumulate([lambda: 1.0, lambda: value])()


@pytest.mark.parametrize(
    "value", [2, 2.0, True + 1, torch.tensor(2.0), torch.tensor([[2]]), torch.tensor(2.0).double()]
)
def test_any_single_number_is_a_loss(value):
    assert evaluate(lambda: value) == 2.0


def test_a_loss_keeps_its_double_precision():
    assert evaluate(lambda: torch.tensor(1 / 3, dtype=torch.float64)) == 1 / 3


def test_a_loss_from_a_half_precision_model_has_many_distinct_coefficients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).bfloat16()
    x, y = torch.randn(8, 16).bfloat16(), torch.arange(8) % 4
    opt = zo.zo_sgd(model, lr=0.0, mu=1e-2, num_queries=300)
    estimate = opt.estimate(lambda: nn.functional.cross_entropy(model(x).float(), y))
    assert len({c for c, _ in estimate.terms}) > 290


@pytest.mark.parametrize(("loss", "c"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, -math.inf)])
def test_an_estimate_is_applied_only_if_all_its_numbers_are_finite(loss, c):
    model = Vector()
    opt, before = zo.zo_sgd(model, lr=0.1), position(model)
    (u,) = opt.directions()
    opt.apply(zo.GradientEstimate(loss, ((1.0, u), (c, u)), 2))
    assert (position(model) == before).all()
    opt.apply(zo.GradientEstimate(1.0, ((1.0, u), (1.0, u)), 2))
    assert (position(model) != before).all()


def test_losses_that_wait_on_a_device_are_read_together_and_in_their_order(monkeypatch):
    stacked, stack = [], torch.stack
    monkeypatch.setattr(torch, "stack", lambda tensors: (stacked.append(len(tensors)), stack(tensors))[1])
    waiting = [torch.tensor(x, dtype=torch.float64) for x in (0.1, math.nan, -3.0)]
    found = read([waiting[0], 2.5, waiting[1], waiting[2]])
    assert [x for x in found if x == x] == [0.1, 2.5, -3.0]
    assert math.isnan(found[2])
    assert stacked == [3]
    assert read([1.0, 2.0]) == [1.0, 2.0]
