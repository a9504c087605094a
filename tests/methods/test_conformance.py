"""Every method of the table is its plain float64 reference, in which directions are stored whole.

In double precision the whole path agrees. In single precision and below, a step is judged from the coefficients
that were measured: what it does with them is provable to the last bits, and the coefficients have a bound of
their own, (f's rounding) / μ.
"""

from functools import partial

import numpy as np
import pytest
import torch

import zotune as zo
from problems import PROBLEMS, problem
from zotune import reference
from zotune.methods.paper import METHODS

MU, ETA, STEPS = 0.01, 0.02, 12
BETAS, EPS = (0.8, 0.95), 1e-8


def plain_sgd(estimate, f, x, u):
    return reference.zo_sgd(estimate, x, ETA, u)


def plain_cons(estimate, f, x, u):
    return reference.zo_sgd_cons(f, estimate, x, ETA, u)


def plain_mmt(estimate, f, x, u):
    return reference.zo_sgd_mmt(estimate, x, ETA, 0.7, u)


def plain_elementwise(estimate, f, x, u):
    return reference.zo_sgd_elementwise_sign(estimate, x, ETA, u)


def plain_adam(adam, estimate, f, x, u):
    return reference.zo_adam(estimate, x, ETA, BETAS, EPS, adam, u)


# By name: the method with its own options, and its reference given how ĝ is made.
CASES = {
    "sgd": (zo.zo_sgd, plain_sgd),
    "sign": (zo.zo_sgd_sign, plain_sgd),
    "elementwise": (partial(zo.zo_sgd_sign, sign="elementwise"), plain_elementwise),
    "mmt": (partial(zo.zo_sgd_mmt, beta=0.7), plain_mmt),
    "cons": (zo.zo_sgd_cons, plain_cons),
    **{
        adam: (partial(zo.zo_adam, adam=adam, betas=BETAS, eps=EPS), partial(plain_adam, adam))
        for adam in ("torch", "adamm", "amsgrad")
    },
}
DIFFERENCES = {
    "two-sided": (zo.central_difference, reference.rge),
    "one-sided": (zo.forward_difference, reference.one_sided_rge),
}


def signed(plain, f, x, mu, u):
    """The mean of sign(cᵢ) uᵢ, where each cᵢ uᵢ is what `plain` makes of one direction."""
    return np.mean([np.sign(plain(f, x, mu, [u_i]) @ u_i) * u_i for u_i in u], axis=0)


each_case = pytest.mark.parametrize("case", CASES)
each_problem = pytest.mark.parametrize("name", PROBLEMS)
each_q = pytest.mark.parametrize("q", [1, 3])
each_sampler = pytest.mark.parametrize(("q", "sampler"), [(1, zo.rademacher), (3, zo.gaussian)], ids=str)
each_difference = pytest.mark.parametrize("difference", DIFFERENCES)


def test_the_table_holds_every_method():
    methods = {getattr(method, "func", method) for method, _ in CASES.values()}
    assert methods | {zo.forward_grad} == set(METHODS.values()) | {CASES["elementwise"][0].func}


@each_problem
@pytest.mark.parametrize(("q", "sampler"), [(1, zo.rademacher), (3, zo.gaussian)], ids=str)
def test_the_path_of_the_forward_gradient_in_double_precision_is_that_of_the_reference(name, q, sampler):
    p = problem(name)
    _, gradient = p.plain()
    start = p.position()
    path, directions, _ = walk(p, zo.forward_grad(p.model, ETA, num_queries=q, sampler=sampler))
    expected = plain_sgd(partial(reference.forward_gradient, gradient), None, start, directions)
    np.testing.assert_allclose(path, expected, rtol=1e-9, atol=1e-9)


def walk(p, opt, steps=STEPS):
    """The positions after each step, and the directions and estimates of each."""
    path, directions, estimates = [], [], []
    for _ in range(steps):
        directions.append([p.whole(u.of) for u in opt.directions()])
        opt.step(p.closure, inspect=estimates.append)
        path.append(p.position())
    return path, directions, estimates


@each_case
@each_problem
@each_difference
@each_sampler
def test_the_path_in_double_precision_is_that_of_the_reference(case, name, q, difference, sampler):
    method, plain = CASES[case]
    library_difference, plain_difference = DIFFERENCES[difference]
    p = problem(name)
    f, _ = p.plain()
    start = p.position()
    opt = method(p.model, ETA, mu=MU, num_queries=q, difference=library_difference, sampler=sampler, seed=4)
    path, directions, _ = walk(p, opt)
    estimate = partial(plain_difference, f)
    if case == "sign":
        estimate = partial(signed, plain_difference, f)
    expected = plain(lambda x, u: estimate(x, MU, u), f, start, directions)
    np.testing.assert_allclose(path, expected, rtol=1e-9, atol=1e-9)
    assert np.abs(path[-1] - start).max() > 1e-3


@pytest.mark.sample(3)
@each_case
@each_problem
@each_q
def test_the_path_in_single_precision_is_the_reference_of_what_was_measured(case, name, q):
    method, plain = CASES[case]
    p = problem(name, torch.float32)
    f, _ = p.plain()
    start = p.position()
    opt = method(p.model, ETA, mu=MU, num_queries=q, sampler=zo.gaussian)
    path, directions, estimates = walk(p, opt)
    measured = [
        sum((np.sign(c) / q if case == "sign" else c) * u for (c, _), u in zip(e.terms, us, strict=True))
        for e, us in zip(estimates, directions, strict=True)
    ]
    expected = plain(lambda x, g: g, f, start, measured)
    # Each step adds a few roundings of x and of the step; Adam's normalisation keeps relative errors as they are.
    np.testing.assert_allclose(path, expected, rtol=0, atol=STEPS * 8 * 2.0**-24 * (1 + np.abs(expected).max()))
    for us, e, x in zip(directions, estimates, [start, *path], strict=False):
        for u, (c, _) in zip(us, e.terms, strict=True):
            exact = reference.rge(f, x, MU, [u]) @ u / (u @ u) / q
            assert abs(c - exact) < 64 * 2.0**-24 * (1 + abs(e.loss) + np.abs(u).max()) / MU / q


@each_case
@each_q
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_step_is_within_one_rounding_unit_of_the_reference(case, q, dtype):
    method, plain = CASES[case]
    p = problem("transformer", dtype)
    opt = method(p.model, ETA, mu=0.05, num_queries=q)
    start = p.position()
    directions = [p.whole(u.of) for u in opt.directions()]
    estimates = []
    opt.step(p.closure, inspect=estimates.append)
    g = sum(
        (np.sign(c) / q if case == "sign" else c) * u for (c, _), u in zip(estimates[0].terms, directions, strict=True)
    )
    stepped = plain(lambda x, u: g, lambda x: 0.0, start, [directions])[0]
    # The conservative step is one of three; its choice depends on losses in half precision.
    candidates = [start, start - ETA * g, start + ETA * g] if case == "cons" else [stepped]
    unit = torch.finfo(dtype).eps * np.maximum(np.abs(start), np.abs(p.position())) + torch.finfo(dtype).tiny
    assert any((np.abs(p.position() - end) <= unit * (1 + 1e-3) + 1e-6).all() for end in candidates)


@pytest.mark.sample(4)
@each_case
@pytest.mark.parametrize("q", [1, 3])
def test_master_weights_take_the_single_precision_path_of_the_same_estimates(case, q):
    """What bfloat16 shows is the rounding of float32 weights that take the same steps."""
    method, _ = CASES[case]
    half, single = problem("transformer", torch.bfloat16), problem("transformer", torch.bfloat16)
    single.model.float()
    opts = [method(p.model, ETA, mu=0.05, num_queries=q, rounding="master") for p in (half, single)]
    estimates = []
    for _ in range(6):
        opts[0].step(half.closure, inspect=estimates.append)
        # The conservative step's choice is the half-precision model's own: replayed from what became of its weights.
        if case != "cons":
            opts[1].apply(estimates[-1])
            for a, b in zip(half.model.parameters(), single.model.parameters(), strict=True):
                assert torch.equal(a, b.to(torch.bfloat16))
    masters = [opts[0].state[p]["master"] for p in half.model.parameters()]
    assert all(
        m.dtype == torch.float32 and torch.equal(m.bfloat16(), p)
        for m, p in zip(masters, half.model.parameters(), strict=True)
    )
    if case != "cons":
        assert all(torch.equal(m, p) for m, p in zip(masters, single.model.parameters(), strict=True))


@pytest.mark.sample(3)
@each_case
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.bfloat16) for name in PROBLEMS), ("quadratic", torch.float32)], ids=str
)
def test_every_method_improves_every_problem(case, name, dtype):
    method, _ = CASES[case]
    p = problem(name, dtype)
    before = p.value()
    opt = method(p.model, ETA / 2, mu=0.02, num_queries=4)
    for _ in range(40):
        opt.step(p.closure)
    assert p.value() < before - 0.05
