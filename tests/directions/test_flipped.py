"""Sign-flipped directions: U ⊙ (r sᵀ) with one U a step, uncorrelated over a step, summed in one pass."""

import numpy as np
import pytest
import torch
from torch import nn

import zotune as zo
from zotune.directions.direction import add_terms
from zotune.errors import UsageError
from zotune.model.parameters import ParameterSet
from zotune.noise import derive_seed, spec
from zotune.system import limits

SHAPE = (7, 5)


def model_of():
    return nn.Linear(SHAPE[1], SHAPE[0])


def optimizer(base=zo.gaussian, **options):
    return zo.zo_sgd(model_of(), lr=0.1, sampler=zo.flipped(base), **options)


def test_a_matrix_is_that_of_the_specification_and_a_vector_has_its_own_direction():
    opt = optimizer(seed=3)
    opt.num_steps = 4
    (u,) = opt.directions()
    weight, bias = opt.tuned["weight"], opt.tuned["bias"]
    shared = spec.gaussian(derive_seed(3, 4, 0, 4), weight.id, 0, 35).reshape(SHAPE)
    r, s = np.split(spec.rademacher(u.seed, weight.id, 0, 12), [7])
    assert np.array_equal(u.of(opt.tuned, "weight").numpy(), shared * (r[:, None] * s))
    assert np.array_equal(u.of(opt.tuned, "bias").numpy(), spec.gaussian(u.seed, bias.id, 0, 7))


def test_directions_are_of_unit_covariance_and_uncorrelated_over_a_step():
    opt, count = optimizer(num_queries=2), 400
    own, both = torch.zeros(35, 35), torch.zeros(35, 35)
    for _ in range(count):
        one, other = (u.of(opt.tuned, "weight").flatten() for u in opt.directions())
        own += torch.outer(one, one) / count
        both += torch.outer(one, other) / count
        opt.num_steps += 1
    bound = 6 / count**0.5
    assert (own - torch.eye(35)).abs().max() < 2 * bound
    assert both.abs().max() < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_sum_is_that_of_its_terms_whatever_the_slices(dtype, monkeypatch):
    opt = optimizer(num_queries=9)
    terms = [(0.1 * (i - 4.3), u) for i, u in enumerate(opt.directions())]
    tensor = ParameterSet.of(opt.tuned)["weight"]
    x = torch.randn(35, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = torch.empty_like(x)
    add_terms(whole, x, terms, tensor.id, 0, rounding_seed=7)
    expected = x.double() + sum(c * u.of(opt.tuned, "weight").double().flatten() for c, u in terms)
    assert torch.allclose(whole.double(), expected, atol={torch.bfloat16: 0.05}.get(dtype, 1e-6))
    monkeypatch.setattr(limits, "UPDATE_ELEMENTS", 11)
    for lo, hi in ((0, 35), (3, 21), (5, 10), (34, 35)):
        part = torch.empty_like(x[lo:hi])
        add_terms(part, x[lo:hi], terms, tensor.id, lo, rounding_seed=7)
        assert torch.equal(part, whole[lo:hi])


def test_devices_without_a_kernel_have_the_same_bits(monkeypatch):
    opt = optimizer(num_queries=9)
    terms = [(0.1 * (i - 4.3), u) for i, u in enumerate(opt.directions())]
    tensor, x = opt.tuned["weight"], torch.randn(35)
    found = []
    for has_kernel in (True, False):
        if not has_kernel:
            monkeypatch.setattr("zotune.noise.adds_products", lambda device: False)
        found.append(torch.empty_like(x))
        add_terms(found[-1], x, terms, tensor.id)
    assert torch.equal(*found)


def test_a_base_of_dependent_entries_is_refused():
    for base in (zo.low_rank(zo.gaussian), zo.flipped(zo.gaussian)):
        with pytest.raises(UsageError, match="must be independent"):
            zo.flipped(base)
