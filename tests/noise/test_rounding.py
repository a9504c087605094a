"""An update of half-precision weights that is smaller than their rounding unit still arrives, on average.

And an update needs no memory beyond the weights, however many directions it has and however a tensor lies.
"""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import zotune as zo
from zotune.apply import transforms
from zotune.estimate.estimate import GradientEstimate
from zotune.noise import eager
from zotune.noise.back_ends import EAGER
from zotune.system import limits

pytestmark = pytest.mark.usefixtures("kernels")

N, SIGMAS = 4096, 5.0
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
each_half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
each_sampler = pytest.mark.parametrize("sampler", [zo.rademacher, zo.gaussian], ids=str)


def copied_identity(gradient, state):
    return gradient.clone(), state


def holder(dtype, value=1.5):
    """One tensor of N equal weights, in the middle of a binade."""
    return nn.ParameterDict({"w": torch.full((N,), value, dtype=dtype)})


def constant_estimate(step, c=1.0, sampler=zo.rademacher):
    return GradientEstimate(1.0, ((c, zo.Direction(10_000 + step, sampler)),), 2)


class Largest(TorchDispatchMode):
    """Bytes of the largest storage that a torch operation returned and was not given."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in given:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


@pytest.mark.sample(2)
@each_half
@each_sampler
@pytest.mark.parametrize("options", [{}, {"transform": copied_identity}], ids=["fused", "general"])
@pytest.mark.parametrize("value", [1.5, -0.0123])
def test_an_update_below_half_a_unit_arrives_on_average(dtype, sampler, options, value):
    steps = 200
    model = holder(dtype, value)
    start = model["w"].detach().double().clone()
    ulp = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(abs(value)))
    opt = zo.ZerothOrder(model, lr=0.02 * ulp, **options)
    intended = torch.zeros(N, dtype=torch.float64)
    for step in range(steps):
        estimate = constant_estimate(step, sampler=sampler)
        opt.apply(estimate)
        intended -= 0.02 * ulp * estimate.of(model, "w").double()
    error = (model["w"].double() - start) - intended
    # A step of s units has a variance of s (1 - s), at most that of its expectation 0.02 E|u| ≤ 0.02.
    deviation = ulp * math.sqrt(steps * 0.02)
    assert abs(error.mean()) < SIGMAS * deviation / math.sqrt(N)
    # The updates that did arrive are those intended, not noise about zero: regress one on the other.
    slope = ((error + intended) * intended).sum() / intended.square().sum()
    assert abs(slope - 1) < SIGMAS * deviation / float(intended.norm())
    assert SIGMAS * deviation / float(intended.norm()) < 0.6


@each_half
def test_a_drift_below_half_a_unit_arrives_on_average(dtype):
    model, steps = holder(dtype), 300
    ulp = torch.finfo(dtype).eps
    opt = zo.zo_sgd(model, lr=0.01 * ulp)
    u = zo.Direction(77)
    for _ in range(steps):
        opt.apply(GradientEstimate(1.0, ((1.0, u),), 2))  # along one direction: the drift is 3 units
    moved = -(model["w"].double() - 1.5) * u.of(model, "w")
    deviation = ulp * math.sqrt(steps * 0.01) / math.sqrt(N)
    assert abs(moved.mean() - 3 * ulp) < SIGMAS * deviation
    assert (moved.mean() / deviation) > 50


@each_half
def test_rounding_to_nearest_moves_nothing_where_stochastic_rounding_does(dtype):
    for rounding, moves in ((zo.Rounding.NEAREST, False), (zo.Rounding.STOCHASTIC, True)):
        model = holder(dtype)
        opt = zo.zo_sgd(model, lr=0.1 * torch.finfo(dtype).eps, rounding=rounding)
        for step in range(50):
            opt.apply(constant_estimate(step))
        assert bool((model["w"] != 1.5).any()) == moves


@each_half
def test_rounding_noise_differs_between_steps_tensors_and_runs(dtype):
    def after(seed=0, steps=1, name="w"):
        model = nn.ParameterDict({name: torch.full((N,), 1.5, dtype=dtype)})
        opt = zo.zo_sgd(model, lr=0.5 * torch.finfo(dtype).eps, seed=seed)
        opt.num_steps = steps
        direction = zo.Direction(1)
        opt.apply(GradientEstimate(1.0, ((1.0, direction),), 2))
        return (model[name] != 1.5).double() - 0.5

    one = after()
    assert torch.equal(one, after())
    assert abs(one.mean()) < SIGMAS * 0.5 / math.sqrt(N)
    for other in (after(seed=1), after(steps=2), after(name="v")):
        assert abs((one * other).mean()) < SIGMAS * 0.25 / math.sqrt(N)


@each_half
@each_sampler
@pytest.mark.parametrize("options", [{}, {"transform": copied_identity}], ids=["fused", "general"])
def test_master_weights_equal_a_single_precision_twin(dtype, sampler, options):
    model, twin = holder(dtype), holder(torch.float32)
    opt = zo.ZerothOrder(model, lr=1e-4, rounding="master", **options)
    plain = zo.ZerothOrder(twin, lr=1e-4, **options)
    for step in range(50):
        for each in (opt, plain):
            each.apply(constant_estimate(step, c=1.0 + step, sampler=sampler))
        assert torch.equal(opt.state[model["w"]]["master"].view(-1), twin["w"].detach())
        assert torch.equal(model["w"], twin["w"].to(dtype))
    assert (model["w"] != 1.5).any()


@pytest.mark.parametrize("rounding", list(zo.Rounding))
def test_rounding_concerns_no_other_dtype(rounding):
    for dtype in (torch.float32, torch.float64):
        model, plain = holder(dtype), holder(dtype)
        opt = zo.zo_sgd(model, lr=1e-9, rounding=rounding)
        opt.apply(constant_estimate(0))
        zo.zo_sgd(plain, lr=1e-9).apply(constant_estimate(0))
        assert torch.equal(model["w"], plain["w"])
        assert not opt.state[model["w"]]


@pytest.mark.sample(2)
@each_dtype
@each_sampler
def test_an_update_with_many_directions_allocates_no_more_than_one_with_one(dtype, sampler, kernels, monkeypatch):
    monkeypatch.setattr(limits, "UNDO_BYTES", 0)  # no copy of small weights to undo a step that breaks off
    made = {}
    for q in (1, 8):
        model = nn.Linear(256, 256).to(dtype)
        opt = zo.zo_sgd(model, lr=1e-3, num_queries=q, sampler=sampler)
        x = torch.ones(1, 256, dtype=dtype)
        with Largest() as estimating:
            estimate = opt.estimate(lambda model=model, x=x: model(x).float().sum())
        with Largest() as updating:
            opt.apply(estimate)
        made[q] = estimating.bytes, updating.bytes
    assert made[1] == made[8]
    if kernels is not EAGER:
        assert made[8][1] <= 64  # nothing of the size of a tensor


@each_dtype
@each_sampler
def test_torch_operations_allocate_a_chunk_at_a_time_however_large_a_tensor_is(dtype, sampler):
    x = torch.zeros(3 * eager._ELEMENTS + 5, dtype=dtype)
    rows, indices = x[: 6 * (1 << 17)].view(-1, 1 << 17), torch.tensor([5, 0, 1, 9, 2, 2])
    with Largest() as adding:
        eager.add(x, x, sampler.kernel, [1, 2], [0.1, 0.2], 7, 3, 99)
    with Largest() as adding_rows:
        eager.add_rows(rows, indices, sampler.kernel, 1, 0.1, 7)
    assert 0 < adding.bytes <= 8 * eager._ELEMENTS + 1024
    assert 0 < adding_rows.bytes <= 8 * eager._ELEMENTS + 4096


@pytest.mark.parametrize("options", [{}, {"transform": copied_identity}], ids=["fused", "general"])
@each_dtype
def test_a_non_contiguous_parameter_is_updated_like_a_contiguous_one(options, dtype):
    value = torch.linspace(-1, 1, 24).view(4, 6).to(dtype)
    plain, strided = nn.ParameterDict({"w": value.clone()}), nn.ParameterDict({"w": value.t().contiguous().t()})
    assert not strided["w"].is_contiguous()
    address = strided["w"].data_ptr()
    for model in (plain, strided):
        opt = zo.ZerothOrder(model, lr=0.1, num_queries=2, **options)
        opt.apply(GradientEstimate(1.0, tuple((0.5, u) for u in opt.directions()), 4))
    assert torch.equal(plain["w"], strided["w"])
    assert strided["w"].data_ptr() == address


@each_sampler
def test_the_fused_update_equals_the_general_one_within_one_ulp(sampler):
    torch.manual_seed(0)
    models = [nn.Linear(40, 30)]
    models.append(copy.deepcopy(models[0]))
    terms = tuple((c, zo.Direction(seed, sampler)) for seed, c in enumerate([0.3, -1.7, 2e-3]))
    for model, transform in zip(models, (transforms.identity, copied_identity), strict=True):
        zo.ZerothOrder(model, lr=1e-2, transform=transform).apply(GradientEstimate(1.0, terms, 3))
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        a, b = a.detach(), b.detach()
        ulp = torch.nextafter(a.abs(), torch.tensor(math.inf)) - a.abs()
        # Where x and the step cancel, the unit is that of the step.
        assert ((a - b).abs() <= ulp.maximum(torch.tensor(2.0**-26))).all()
        assert not torch.equal(a, torch.zeros_like(a))
