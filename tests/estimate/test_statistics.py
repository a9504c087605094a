"""Expectation and variance of estimates are those of the theory, within confidence intervals at fixed seeds."""

import math

import numpy as np
import pytest
import torch

import zotune as zo
from problems import DIMENSION, Problem, Vector, problem, quadratic

SIGMAS = 5.0
RUNS = 400
# A mean within five standard errors is the same statement of fewer steps, with a larger error.
each_size = pytest.mark.parametrize("runs", [150, pytest.param(RUNS, marks=pytest.mark.slow)])
each_sampler = pytest.mark.parametrize(("sampler", "extra"), [(zo.rademacher, -1), (zo.gaussian, 1)], ids=str)


def estimates(p, method=zo.zo_sgd, runs=RUNS, **options):
    """ĝ of so many steps from the same x, one a row."""
    opt = method(p.model, 0.0, mu=0.1, **options)
    rows = []
    for _ in range(runs):
        rows.append(p.whole(opt.estimate(p.closure).of))
        opt.num_steps += 1
    return np.stack(rows)


def assert_mean(samples, expected):
    """The samples' mean is as expected, within the interval that their own spread gives."""
    error = samples.std(0) / math.sqrt(len(samples))
    assert (np.abs(samples.mean(0) - expected) <= SIGMAS * error + 1e-12).all()


def quadratic_problem():
    """A quadratic, and its gradient at x."""
    p = problem("quadratic")
    _, gradient_at = p.plain()
    return p, gradient_at(p.position())


def squared_error(g, gradient):
    return ((g - gradient) ** 2).sum(1)


@pytest.mark.sample(1)
@each_sampler
@pytest.mark.parametrize("q", [1, 4])
@each_size
def test_variance_falls_as_one_over_q(sampler, extra, q, runs):
    p, gradient = quadratic_problem()
    g = estimates(p, sampler=sampler, num_queries=q, runs=runs)
    assert_mean(g, gradient)
    assert_mean(squared_error(g, gradient), (DIMENSION + extra) / q * (gradient @ gradient))


@pytest.mark.sample(2)
@each_sampler
@pytest.mark.parametrize("q", [1, 2])
@each_size
def test_variance_of_blocks_is_the_sum_of_the_blocks_variances(sampler, extra, q, runs):
    """Σ_b (d_b ± 1) |∇_b f|² / q, whatever the other blocks' slopes are."""
    p, gradient = quadratic_problem()
    blocks = zo.blocks_by_size(p.model, 4)
    assert [b.tensors for b in blocks] == [("first",), ("second",)]
    g = estimates(p, sampler=sampler, blocks=blocks, num_queries=q, reuse_prefix=False, runs=runs)
    assert_mean(g, gradient)
    expected = sum((len(part) + extra) * (part @ part) for part in (gradient[:4], gradient[4:])) / q
    assert_mean(squared_error(g, gradient), expected)
    assert expected < (DIMENSION + extra) / q * (gradient @ gradient)


@pytest.mark.sample(1)
@pytest.mark.parametrize("sampler", [zo.rademacher, zo.gaussian], ids=str)
@pytest.mark.parametrize("group", ["global", "layer"])
@each_size
def test_expectation_over_random_masks_is_the_unmasked_share_of_the_gradient(sampler, group, runs):
    """E[ĝ] = (1 - s_l) ∇f."""
    p, gradient = quadratic_problem()
    sampler = zo.sparse(sampler, sparsity=3 / 7, group=group)
    g = estimates(p, sampler=sampler, num_queries=2, runs=runs)
    # The three smallest of |x| are the third to fifth: two entries of the first tensor, one of the second.
    assert np.argsort(np.abs(p.position()))[:3].tolist() == [2, 3, 1]
    masked = p.vector(first=3 / 4) if group == "global" else np.full(DIMENSION, 3 / 7)
    shown = g[:, masked < 1]
    assert_mean(shown, ((1 - masked) * gradient)[masked < 1])


def test_a_forward_difference_has_the_bias_of_its_third_moments():
    """On a quadratic E[ĝ] = ∇f + (μ/2) E[(uᵀHu) u], whose second term is zero: symmetric directions."""
    p = problem("quadratic")
    _, gradient_at = p.plain()
    assert_mean(estimates(p, sampler=zo.gaussian, difference=zo.forward_difference), gradient_at(p.position()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", [zo.zo_sgd, zo.zo_sgd_mmt, zo.zo_adam], ids=lambda m: m.__name__)
@pytest.mark.parametrize("n", [300, pytest.param(1200, marks=pytest.mark.slow)])
def test_the_mean_of_stochastically_rounded_steps_is_the_step(dtype, method, n):
    """Steps far below half a rounding unit arrive on average, over the seeds of the rounding."""
    lr = 1e-4
    start = torch.linspace(0.5, 1.5, 6).to(dtype)
    c = 2.0 if method is not zo.zo_adam else 1.0
    ends = torch.empty(n, 6, dtype=torch.float64)
    for seed in range(n):
        model = torch.nn.ParameterDict({"w": start.clone().view(2, 3)})
        opt = method(model, lr, seed=seed)
        opt.apply(zo.GradientEstimate(1.0, ((c, zo.Direction(7)),), 2))
        ends[seed] = model["w"].detach().double().flatten()
    u = zo.Direction(7).of(model, "w").double().flatten().numpy()
    expected = start.double().numpy() - lr * c * u
    assert (lr * c < 0.5 * torch.finfo(dtype).eps * start[3:]).all()
    assert_mean(ends.numpy(), expected)


def test_a_sign_step_is_biased_as_its_definition_says():
    """E[sign(c) u] = √(2/π) ∇f / |∇f| for Gaussian directions."""
    p = Problem(Vector(quadratic))
    _, gradient_at = p.plain()
    gradient = gradient_at(p.position())
    opt = zo.zo_sgd_sign(p.model, 1.0, mu=0.1, sampler=zo.gaussian)
    rows, start = [], [q.detach().clone() for q in p.model.parameters()]
    before = p.position()
    for _ in range(RUNS):
        opt.step(p.closure)
        rows.append(before - p.position())
        for q, x in zip(p.model.parameters(), start, strict=True):
            q.data.copy_(x)
    assert_mean(np.stack(rows), math.sqrt(2 / math.pi) * gradient / np.linalg.norm(gradient))
