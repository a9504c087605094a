"""An update is element by element: chunks, strides and groups do not matter; its state is wide whatever the weights."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import zotune as zo
from problems import assert_same_bits, bits, problem
from zotune import noise
from zotune.apply import transforms
from zotune.system import limits

TRANSFORMS = {
    "identity": transforms.identity,
    "sign": transforms.elementwise_sign,
    "momentum": partial(transforms.momentum, beta=0.9),
    **{name: partial(adam, beta1=0.9, beta2=0.99, eps=1e-8) for name, adam in transforms.ADAMS.items()},
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
each_transform = pytest.mark.parametrize("transform", TRANSFORMS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)
shapes = st.lists(st.integers(1, 13), min_size=0, max_size=3)


def stepped(model, transform, steps=3, coefficient=0.7, seed=0, **options):
    """The model after some steps whose coefficients are given."""
    opt = zo.ZerothOrder(model, 0.1, transform=TRANSFORMS[transform], seed=seed, **options)
    for step in range(steps):
        terms = tuple((coefficient / (1 + i + step), u) for i, u in enumerate(opt.directions()))
        opt.apply(zo.GradientEstimate(1.0, terms, 2))
    return opt


def numbers(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@quick
@given(
    shapes,
    st.sampled_from(DTYPES),
    st.sampled_from(list(TRANSFORMS)),
    st.integers(1, 40),
    st.integers(0, 2**64 - 1),
    st.sampled_from(list(zo.Rounding)),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([zo.rademacher, zo.gaussian, zo.sparse(zo.gaussian, 0.4, mask="magnitude")]),
)
def test_an_update_does_not_depend_on_how_it_is_cut(shape, dtype, transform, chunk, seed, rounding, decay, sampler):
    models = []
    for size in (1 << 18, chunk):
        model = nn.ParameterDict({"w": numbers(shape, dtype)})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(limits, "UPDATE_ELEMENTS", size)
            stepped(model, transform, seed=seed, num_queries=2, rounding=rounding, weight_decay=decay, sampler=sampler)
        models.append(model)
    assert_same_bits(*models)


@quick
@given(st.sampled_from(list(TRANSFORMS)), st.integers(1, 50), st.integers(0, 50), st.integers(1, 4))
def test_a_transform_of_a_slice_is_the_slice_of_the_transform(transform, size, cut, steps):
    h, cut = TRANSFORMS[transform], min(cut, size)
    whole, first, second = {}, {}, {}
    for step in range(steps):
        gradient = numbers((size,), torch.float32, step)
        kept = gradient.clone()
        out, whole = h(gradient, whole)
        parts, (first, second) = zip(
            *(h(g, s) for g, s in ((gradient[:cut], first), (gradient[cut:], second))), strict=True
        )
        assert torch.equal(bits(torch.cat(parts)), bits(out))
        assert torch.equal(gradient, kept)


@quick
@given(shapes, st.sampled_from(DTYPES), st.sampled_from(list(TRANSFORMS)), st.sampled_from([0.0, 0.3]))
def test_a_step_of_scale_zero_leaves_the_bits_and_advances_the_state(shape, dtype, transform, decay):
    values = numbers(shape, dtype)
    values.view(-1)[::2] = -0.0
    model, moved = (nn.ParameterDict({"w": values.clone()}) for _ in range(2))
    opts = [zo.ZerothOrder(m, 0.1, transform=TRANSFORMS[transform], weight_decay=decay) for m in (model, moved)]
    for opt, scale in zip(opts, (0.0, 1.0), strict=True):
        opt._write(zo.GradientEstimate(1.0, ((0.7, opt.directions()[0]),), 2), scale)
    assert torch.equal(bits(model["w"]), bits(values))
    one, other = (opt.state[m["w"]] for opt, m in zip(opts, (model, moved), strict=True))
    assert one.keys() == other.keys()
    assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one)


@each_transform
@each_dtype
@pytest.mark.parametrize("rounding", list(zo.Rounding))
def test_a_strided_tensor_is_updated_like_a_contiguous_one(transform, dtype, rounding):
    value = numbers((4, 6), dtype)
    plain, strided = nn.ParameterDict({"w": value.clone()}), nn.ParameterDict({"w": value.t().contiguous().t()})
    assert not strided["w"].is_contiguous()
    for model in (plain, strided):
        stepped(model, transform, rounding=rounding)
    assert torch.equal(plain["w"], strided["w"])


@each_transform
def test_empty_tensors_and_single_numbers_are_no_exception(transform):
    model = nn.ParameterDict({"empty": torch.ones(0, 3), "one": torch.tensor(2.0)})
    stepped(model, transform)
    assert model["one"] != 2.0


@each_transform
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1e-2, 1e-6, 1e4])
def test_state_is_single_precision_and_finite_whatever_the_slopes(transform, dtype, size):
    model = nn.ParameterDict({"w": numbers((30, 20), dtype)})
    opt = stepped(model, transform, steps=5, coefficient=size)
    state = opt.state_dict()["state"].get(0, {})
    assert (transform in ("identity", "sign")) == (not state)
    for key, value in state.items():
        if key != "step":
            assert value.dtype == torch.float32
            assert torch.isfinite(value).all()
            assert value.any()
    assert torch.isfinite(model["w"]).all() or (transform in ("identity", "momentum") and size > 1)


@each_transform
@each_dtype
def test_weight_decay_is_decoupled_and_spares_vectors(transform, dtype):
    """x ← (1 - ηλ) x - η h(ĝ): h, its state included, does not see λ."""
    start = nn.ParameterDict({"w": numbers((5, 4), dtype), "b": numbers((4,), dtype)})
    results = []
    for decay in (0.0, 0.5):
        model = copy.deepcopy(start)
        opt = stepped(model, transform, steps=1, weight_decay=decay, rounding="nearest")
        results.append((model, opt.state_dict()["state"]))
    (plain, state), (decayed, other_state) = results
    expected = plain["w"].detach().double() - 0.1 * 0.5 * start["w"].detach().double()
    unit = 2 * torch.finfo(dtype if dtype != torch.float64 else torch.float32).eps
    torch.testing.assert_close(decayed["w"].detach().double(), expected, rtol=unit, atol=unit)
    assert torch.equal(plain["b"], decayed["b"])
    for index, saved in state.items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(other_state[index][k])) for k, v in saved.items())


def test_weight_decay_alone_shrinks_by_its_rate_each_step():
    model = nn.ParameterDict({"w": torch.ones(3, 2, dtype=torch.float64)})
    opt = zo.zo_sgd(model, 0.1, weight_decay=0.5)
    for _ in range(3):
        opt.step(lambda: model["w"].sum() * 0)
    torch.testing.assert_close(
        model["w"].detach(), torch.full((3, 2), 0.95**3, dtype=torch.float64), rtol=1e-14, atol=0
    )


def test_groups_have_rates_and_decay_of_their_own_and_follow_schedulers():
    model = nn.ParameterDict({k: torch.ones(2, 2, dtype=torch.float64) for k in "abc"})
    groups = [
        {"params": model["a"], "lr": 0.1},
        {"params": [model["b"]], "weight_decay": 0.0},
        {"params": [model["c"]]},
    ]
    opt = zo.zo_sgd(model, 0.2, weight_decay=0.5, params=groups)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    for _ in range(2):
        opt.step(lambda: sum(p.sum() for p in model.values()) * 0)
        scheduler.step()
    ends = [float(p.detach()[0, 0]) for p in model.values()]
    np.testing.assert_allclose(ends, [0.95 * 0.975, 1.0, 0.9 * 0.95], rtol=1e-14)


@pytest.mark.parametrize("q", [1, 3])
def test_coefficients_are_cut_one_by_one_before_their_mean(q):
    p, twin = problem("quadratic"), problem("quadratic")
    estimate = twin_opt = None
    opt = zo.zo_sgd(p.model, 0.1, num_queries=q, max_coefficient=0.5)
    twin_opt = zo.zo_sgd(twin.model, 0.1, num_queries=q)
    estimate = twin_opt.estimate(twin.closure)
    measured = [c * q for c, _ in estimate.terms]
    assert any(abs(c) > 0.5 for c in measured)
    us = [p.whole(u.of) for u in opt.directions()]
    expected = p.position() - 0.1 * sum(np.clip(c, -0.5, 0.5) * u for c, u in zip(measured, us, strict=True)) / q
    opt.step(p.closure)
    np.testing.assert_allclose(p.position(), expected, rtol=1e-12)


def test_signs_are_taken_one_by_one_and_that_of_zero_is_zero():
    p = problem("quadratic")
    opt = zo.zo_sgd_sign(p.model, 0.25, num_queries=3)
    us, before = opt.directions(), p.position()
    opt.apply(zo.GradientEstimate(1.0, tuple(zip((5.0 / 3, -1e-9, 0.0), us, strict=True)), 6))
    u = [p.whole(d.of) for d in us]
    np.testing.assert_allclose(p.position(), before - 0.25 * (u[0] - u[1]) / 3, rtol=1e-14)
    assert not any(opt.state.values())


def test_micro_batches_are_one_batch():
    x, y = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)).double(), torch.linspace(-1, 1, 12).double()
    ends = []
    for cuts in ([12], [4, 4, 4], [7, 5]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        parts = list(zip(x.split(cuts), y.split(cuts), strict=True))
        closure = zo.accumulate(
            [lambda a=a, b=b, model=model: (model(a)[:, 0] - b).square().mean() for a, b in parts], cuts
        )
        opt = zo.zo_adam(model, 0.01, blocks=zo.blocks_by_layer(model), num_queries=2)
        for _ in range(5):
            opt.step(closure)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(ends[2], ends[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("difference", [zo.central_difference, zo.forward_difference])
def test_an_estimate_of_q_queries_is_the_mean_of_q_estimates(difference):
    p = problem("rosenbrock")
    opt = zo.zo_sgd(p.model, 0.1, num_queries=4, difference=difference)
    us = opt.directions()
    assert len({u.seed for u in us}) == 4
    together = p.whole(opt.estimate(p.closure).of)
    alone = [p.whole(difference(p.closure, opt.tuned, [u], mu=1e-3).of) for u in us]
    np.testing.assert_allclose(together, np.mean(alone, axis=0), rtol=1e-12)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_what_the_mask_stream_leaves_is_what_the_kernels_made(sparsity):
    made, kept = torch.empty(5000), torch.empty(5000)
    noise.fill(made, noise.GAUSSIAN, 3, 4, 17)
    noise.fill(kept, noise.GAUSSIAN, 3, 4, 17)
    noise.mask(kept, sparsity, 3, 4, 17)
    assert torch.equal(kept[kept != 0], made[kept != 0])
