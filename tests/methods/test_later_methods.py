"""The methods beyond the paper are their plain float64 references, in which directions and bases are stored whole.

As in `test_conformance`: in double precision the whole path agrees; in single precision and below a step is judged from
the coefficients that were measured.
"""

import copy
from functools import partial

import numpy as np
import pytest
import torch

import zotune as zo
from problems import PROBLEMS, problem
from zotune import reference
from zotune.apply.subspace import Basis
from zotune.ledger import LedgerWriter, read
from zotune.ledger.replay import header_of, record_to, replay
from zotune.methods import paper
from zotune.methods.mopi import _first_right

MU, ETA, VECTORS, STEPS = 0.01, 0.02, 0.003, 7


def descent(record, measure, start):
    return reference.descend(measure, start, ETA, record.directions)


def muon(record, measure, start):
    return reference.zo_muon(
        measure, start, (ETA, VECTORS), record.directions, record.matrices, record.left, record.coordinates
    )


def mopi(record, measure, start):
    return reference.mopi(
        measure,
        start,
        (ETA, VECTORS),
        0.7,
        *(record.directions, record.matrices, record.left, record.coordinates, record.first_right),
    )


def lozo(record, measure, start):
    return reference.lozo(
        measure, start, ETA, 0.7, record.directions, record.matrices, record.right, record.coordinates
    )


def fzoo(f, x, u):
    return reference.fzoo(f, x, MU, u, 1)


def best_two(f, x, u):
    return reference.randopt(f, x, MU, u, 2, False)


def central(f, x, u):
    return reference.central(f, x, MU, u)


def one_sided(f, x, u):
    return reference.one_sided(f, x, MU, u)


# By name: the method with its own options, the path given the coefficients, and the coefficients of the reference.
CASES = {
    "fzoo": (partial(zo.fzoo, ddof=1, num_queries=4), descent, fzoo),
    "randopt": (partial(zo.randopt, num_queries=5, keep=2, only_better=False), descent, best_two),
    "block, random": (partial(zo.block_coordinate, num_queries=2), descent, central),
    "block, adaptive": (
        partial(zo.block_coordinate, choice="adaptive", sampler=zo.gaussian, difference=zo.forward_difference),
        descent,
        one_sided,
    ),
    "subzero": (partial(zo.subzero, rank=2, interval=3, num_queries=2), descent, central),
    "subzero, square": (partial(zo.subzero, rank=3, interval=3, square=True), descent, central),
    "lozo": (partial(zo.lozo, interval=3), descent, central),
    "lozo, momentum": (partial(zo.lozo, interval=3, beta=0.7, num_queries=2), lozo, central),
    "zo_muon": (partial(zo.zo_muon, rank=3, interval=3, vector_lr=VECTORS), muon, one_sided),
    "mopi": (
        partial(zo.mopi, rank=3, interval=3, top=2, beta=0.7, vector_lr=VECTORS, num_queries=3),
        mopi,
        central,
    ),
}
each_case = pytest.mark.parametrize("case", CASES)


class Record:
    """What the steps of an optimizer draw: whole directions, and bases and coordinates of the matrices."""

    def __init__(self, p, opt):
        self._p, self._opt = p, opt
        self.directions, self.coordinates, self.left, self.right = [], [], [], []
        self._kept = {}
        flat, self.matrices, self._tensors = 0, [], []
        for tensor, parameter in ((opt.tuned.find(w), w) for w in p.model.parameters()):
            if parameter.dim() > 1:
                self.matrices.append(flat + np.arange(parameter.numel()).reshape(parameter.shape))
                self._tensors.append(tensor)
            flat += parameter.numel()

    def note(self):
        """Before a step."""
        found = self._opt.directions()
        self.directions.append([self._p.whole(u.of) for u in found])
        sampler = found[0].sampler
        if not getattr(sampler, "shares_subspace", False):
            return
        cpu = torch.device("cpu")
        spaces = [sampler.subspace(t.id, cpu) for t in self._tensors]
        for side in ("left", "right"):
            getattr(self, side).append([self._same(space.seed, side, k, space) for k, space in enumerate(spaces)])
        self.coordinates.append(
            [[sampler.coordinates(u.seed, t.id, cpu).double().numpy() for u in found] for t in self._tensors]
        )

    def _same(self, seed, side, k, space):
        """One array for each basis, so that a renewal is seen by identity."""
        basis = getattr(space, side)
        return self._kept.setdefault((seed, side, k), None if basis is None else basis.double().numpy())

    @property
    def first_right(self):
        """MOPI's first V of each matrix, for the first step's subspace."""
        self._opt.num_steps = 0
        sampler = self._opt.directions()[0].sampler
        bases = [Basis(t.id, sampler.subspace(t.id, torch.device("cpu")), None) for t in self._tensors]
        like = [torch.from_numpy(z[0]) for z in self.coordinates[0]]
        return [_first_right(m, basis, 2).numpy() for m, basis in zip(like, bases, strict=True)]


def walk(p, opt, steps=STEPS):
    """The positions after each step, what was drawn, and the coefficients before the mean over directions."""
    record, path, coefficients = Record(p, opt), [], []
    for _ in range(steps):
        record.note()
        opt.step(p.closure, inspect=lambda e: coefficients.append([c * len(e.terms) for c, _ in e.terms]))
        path.append(p.position())
    return path, record, coefficients


def given(coefficients):
    """A `Measure` that returns what was measured."""
    remaining = iter(coefficients)
    return lambda x, u: next(remaining)


def test_the_table_holds_every_method():
    methods = {method.func for method, *_ in CASES.values()}
    # Two have files of their own.
    assert methods | {zo.hizoo, zo.grzo} == set(zo.METHODS.values()) - set(paper.METHODS.values())


@each_case
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_path_in_double_precision_is_that_of_the_reference(case, name):
    method, plain, coefficients = CASES[case]
    p = problem(name)
    f, _ = p.plain()
    start = p.position()
    path, record, _ = walk(p, method(p.model, ETA, mu=MU, seed=4))
    expected = plain(record, partial(coefficients, f), start)
    # A whole direction is rounded to single precision; a step of coordinates is not.
    bound = 1e-7 if record.coordinates else 1e-9
    np.testing.assert_allclose(path, expected, rtol=bound, atol=bound)
    assert np.abs(path[-1] - start).max() > 1e-3


@each_case
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_path_in_single_precision_is_the_reference_of_what_was_measured(case, name):
    method, plain, _ = CASES[case]
    p = problem(name, torch.float32)
    start = p.position()
    path, record, coefficients = walk(p, method(p.model, ETA, mu=MU))
    expected = plain(record, given(coefficients), start)
    np.testing.assert_allclose(path, expected, rtol=0, atol=STEPS * 16 * 2.0**-24 * (1 + np.abs(expected).max()))


@each_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_step_is_within_one_rounding_unit_of_the_reference(case, dtype):
    method, plain, _ = CASES[case]
    p = problem("transformer", dtype)
    start = p.position()
    path, record, coefficients = walk(p, method(p.model, ETA, mu=0.05), steps=1)
    expected = plain(record, given(coefficients), start)[0]
    unit = torch.finfo(dtype).eps * np.maximum(np.abs(start), np.abs(path[0])) + torch.finfo(dtype).tiny
    assert (np.abs(path[0] - expected) <= unit * (1 + 1e-3) + 1e-6).all()
    assert np.abs(path[0] - start).max() > 1e-3


@each_case
def test_master_weights_take_the_single_precision_path_of_the_same_estimates(case):
    method, *_ = CASES[case]
    half, single = problem("transformer", torch.bfloat16), problem("transformer", torch.bfloat16)
    single.model.float()
    opts = [method(p.model, ETA, mu=0.05, rounding="master") for p in (half, single)]
    estimates = []
    for _ in range(5):
        opts[0].step(half.closure, inspect=estimates.append)
        opts[1].apply(estimates[-1])
    masters = [opts[0].state[p].get("master", p.float()) for p in half.model.parameters()]
    assert all(torch.equal(m, p) for m, p in zip(masters, single.model.parameters(), strict=True))


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_method_goes_down_a_quadratic(case, dtype):
    method, *_ = CASES[case]
    p = problem("quadratic", dtype)
    before = p.value()
    opt = method(p.model, ETA, mu=0.02)
    for _ in range(40):
        opt.step(p.closure)
    assert p.value() < before - 0.05


# HiZOO's reference has a file of its own.
RUNS = {**{name: method for name, (method, *_) in CASES.items()}, "hizoo": partial(zo.hizoo, alpha=0.05)}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_from_its_state_and_its_ledger_to_the_bit(name, tmp_path):
    """Over renewals of subspaces, in half precision, whose rounding is drawn as well."""

    def made():
        p = problem("transformer", torch.bfloat16)
        return p, RUNS[name](p.model, ETA, mu=0.05, seed=6)

    whole, opt = made()
    with LedgerWriter.create(tmp_path / "run.zol", header_of(opt)) as writer:
        record_to(writer, opt)
        for _ in range(2):
            opt.step(whole.closure)
        saved = copy.deepcopy((whole.model.state_dict(), opt.state_dict()))
        for _ in range(3):
            opt.step(whole.closure)
    again, other = made()
    np.testing.assert_raises(AssertionError, np.testing.assert_array_equal, again.position(), whole.position())
    again.model.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    for _ in range(3):
        other.step(again.closure)
    replayed, third = made()
    replay(third, read(tmp_path / "run.zol"))
    for p in (again, replayed):
        np.testing.assert_array_equal(p.position(), whole.position())


@each_case
def test_a_loss_that_is_no_number_leaves_weights_and_state(case):
    method, *_ = CASES[case]
    p = problem("transformer", torch.float32)
    opt = method(p.model, ETA, mu=MU)
    opt.step(p.closure)
    before, state = p.position(), str(opt.state_dict()["state"])
    opt.step(lambda: p.closure() * float("nan"))
    assert opt.num_skipped == 1
    np.testing.assert_array_equal(p.position(), before)
    assert str(opt.state_dict()["state"]) == state


@pytest.mark.parametrize("case", ["fzoo", "randopt", "zo_muon"])
def test_a_loss_times_a_power_of_two_makes_the_same_steps(case):
    """These methods' steps do not depend on the slope's size."""
    method, *_ = CASES[case]
    ends = []
    for factor in (1, 64):
        p = problem("transformer")
        opt = method(p.model, ETA, mu=MU, params=[w for w in p.model.parameters() if w.dim() > 1])
        for _ in range(3):
            opt.step(lambda p=p, factor=factor: factor * p.closure())
        ends.append(p.position())
    np.testing.assert_allclose(*ends, rtol=1e-9, atol=1e-10)


def test_fzoo_stays_where_all_losses_are_equal_and_its_step_on_a_line_does_not_depend_on_mu():
    model = torch.nn.Linear(5, 3).double()
    before = [p.detach().clone() for p in model.parameters()]
    opt = zo.fzoo(model, lr=1.0)
    opt.step(lambda: 0.1 + 0 * (model.weight.sum() + model.bias.sum()))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert opt.num_skipped == 0
    slope = torch.linspace(-1, 2, 15, dtype=torch.float64).view(3, 5)
    ends = []
    for mu in (1e-3, 0.5):
        model = torch.nn.Linear(5, 3, bias=False).double()
        torch.nn.init.zeros_(model.weight)
        zo.fzoo(model, lr=0.1, mu=mu).step(lambda model=model: (model.weight * slope).sum())
        ends.append(model.weight.detach())
    assert torch.allclose(*ends, rtol=1e-9)
    per_mu = torch.nn.Linear(5, 3, bias=False).double()
    torch.nn.init.zeros_(per_mu.weight)
    zo.fzoo(per_mu, lr=0.1, mu=0.5, per_mu=True).step(lambda: (per_mu.weight * slope).sum())
    assert torch.allclose(per_mu.weight, ends[0] / 0.5, rtol=1e-9)


def test_randopt_stays_where_no_point_is_better_and_its_best_points_vote():
    model = torch.nn.Linear(4, 2, bias=False)
    torch.nn.init.zeros_(model.weight)
    opt = zo.randopt(model, lr=0.1, mu=0.1, keep=3)
    opt.step(lambda: model.weight.square().sum())
    assert not model.weight.any()
    with pytest.raises(zo.UsageError, match="none to vote"):
        zo.majority(model, opt.estimate(lambda: model.weight.square().sum()), 0.1, lambda: torch.zeros(1))
    x = torch.randn(9, 4)
    estimate = opt.estimate(lambda: model(x)[:, 0].sum())
    voters = [u for c, u in estimate.terms if c]
    assert len(voters) == 3
    answers = [(x @ u.of(model, "weight").t()).argmax(dim=1) for u in voters]
    votes = zo.majority(model, estimate, 0.1, lambda: model(x).argmax(dim=1))
    assert torch.equal(votes, torch.stack(answers).sum(dim=0).ge(2).long())


def test_singular_values_of_a_muon_step_are_near_one_and_a_zero_estimate_stays():
    p = problem("transformer", torch.float32)
    before = {n: w.detach().clone() for n, w in p.model.named_parameters()}
    opt = zo.zo_muon(p.model, 1.0, rank=4, num_queries=16)
    opt.step(p.closure)
    for name, w in p.model.named_parameters():
        if w.dim() > 1:
            values = torch.linalg.svdvals(w.detach() - before[name])
            assert values[0] < 1.3
            assert (values[:4] > 0.3).all() and (values[4:] < 1e-5).all()
    model = torch.nn.Linear(3, 3, bias=False)
    kept = model.weight.detach().clone()
    for method in (zo.zo_muon, zo.mopi):
        opt = method(model, 1.0)
        opt.step(lambda: 0 * model.weight.sum() + 1.0)
        assert torch.equal(model.weight, kept)


REFUSED = {
    "one direction for a spread": (lambda m: zo.fzoo(m, 0.1, num_queries=1), ValueError, "2 at least"),
    "ddof": (lambda m: zo.fzoo(m, 0.1, ddof=2), ValueError, "ddof is 0"),
    "more best points than points": (lambda m: zo.randopt(m, 0.1, num_queries=2, keep=3), ValueError, "at most all"),
    "explore": (lambda m: zo.block_coordinate(m, 0.1, explore=0.0), ValueError, "explore is the share"),
    "decay": (lambda m: zo.block_coordinate(m, 0.1, decay=1.0), ValueError, "decay is the share"),
    "choice": (lambda m: zo.block_coordinate(m, 0.1, choice="best"), ValueError, "best"),
    "interval": (lambda m: zo.lozo(m, 0.1, interval=1), zo.UsageError, "with 1 it is zo_sgd"),
    "scale": (lambda m: zo.lozo(m, 0.1, scale="code"), ValueError, "got 'code'"),
    "beta": (lambda m: zo.mopi(m, 0.1, beta=1.0), ValueError, "beta is the share"),
    "top": (lambda m: zo.mopi(m, 0.1, top=0), ValueError, "got top=0"),
    "rank": (lambda m: zo.subzero(m, 0.1, rank=0), zo.UsageError, "got rank=0"),
    "no matrix": (lambda m: zo.zo_muon(m, 0.1, params=[m.bias]), zo.UsageError, "none is tuned"),
    "vector rate": (lambda m: zo.zo_muon(m, 0.1, vector_lr=-1.0), ValueError, "vector_lr=-1"),
    **{
        f"{name} with masks": (
            lambda m, name=name: zo.METHODS[name](m, 0.1, sampler=zo.sparse(zo.gaussian, 0.5)),
            zo.UsageError,
            f"{name} makes directions of its own shape",
        )
        for name in ("subzero", "lozo", "zo_muon", "mopi")
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_method_cannot_do_is_refused_with_the_reason(name):
    make, kind, reason = REFUSED[name]
    with pytest.raises(kind, match=reason):
        make(torch.nn.Linear(3, 2))
