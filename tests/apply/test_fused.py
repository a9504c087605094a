"""Momentum's and Adam's updates in one pass: the bits of the transforms' own operations."""

from functools import partial

import numpy as np
import pytest
import torch

import zotune as zo
from zotune import noise
from zotune.apply import fused
from zotune.apply.tensor_update import TensorUpdate
from zotune.apply.transforms import adam, adamm, amsgrad, identity, momentum
from zotune.model.parameters import ParameterSet

ADAM = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
TRANSFORMS = {
    "momentum": partial(momentum, beta=0.9),
    "adam": partial(adam, **ADAM),
    "adamm": partial(adamm, **ADAM),
    "amsgrad": partial(amsgrad, **ADAM),
}
LR, DECAY, ROUNDING = 1e-2, 0.1, 5
WEIGHT = ParameterSet.of(torch.nn.Linear(100, 50, bias=False))["weight"]

needs_kernels = pytest.mark.skipif(not noise.has_steps(torch.zeros(1)), reason="this installation has no C kernels")


def terms(step, sampler):
    return [(0.3 - step, zo.Direction(10 * step + 1, sampler)), (-0.7, zo.Direction(10 * step + 2, sampler))]


def by_operations(x, transform, step, state, sampler, scale):
    """The same by the transform itself, on the whole of u and ĝ."""
    gradient = torch.zeros(x.numel())
    for c, u in terms(step, sampler):
        part = torch.empty(x.numel())
        u.sampler.fill(part, u.seed, WEIGHT.id, 0)
        gradient = gradient + part * torch.tensor(c)
    h, state = transform(gradient, state)
    if scale:
        y = x.float() * (1 - LR * DECAY) - scale * LR * h
        noise.round_to(x, y, ROUNDING, WEIGHT.id, 0)
    return state


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sampler", [zo.rademacher, zo.gaussian], ids=str)
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("size", [5000, 1723])
def test_steps_in_one_pass_have_the_bits_of_separate_operations_whatever_the_slices(name, sampler, dtype, size):
    transform = TRANSFORMS[name]
    x = (torch.randn(5000, generator=torch.Generator().manual_seed(0)) / 50).to(dtype)
    expected, state, slices = x.clone(), {}, {}
    for step, scale in enumerate((1.0, 0.5, 0.0, 1.0)):
        state = by_operations(expected, transform, step, state, sampler, scale)
        for lo in range(0, len(x), size):
            update = TensorUpdate(WEIGHT, terms(step, sampler), transform, {}, LR, DECAY, ROUNDING)
            slices[lo] = fused.fused_update_(update, x[lo : lo + size], slices.get(lo, {}), lo, scale)
    assert torch.equal(x, expected)
    assert slices[0].keys() == state.keys()
    for key, value in state.items():
        parts = [slices[lo][key] for lo in slices]
        assert torch.equal(torch.cat(parts), value) if isinstance(value, torch.Tensor) else set(parts) == {value}


@needs_kernels
def test_an_optimizer_steps_alike_with_and_without_the_kernel(monkeypatch):
    def trained():
        torch.manual_seed(0)
        model = torch.nn.Linear(40, 70).bfloat16()
        opt = zo.zo_adam(model, lr=1e-2, num_queries=2, weight_decay=0.1, rounding="master")
        for _ in range(5):
            opt.step(lambda: model.weight.float().square().mean() + model.bias.float().square().mean())
        return torch.cat([p.detach().flatten() for p in model.parameters()]), opt.state[model.weight]["exp_avg_sq"]

    taken = []
    original = fused.fused_update_
    monkeypatch.setattr(fused, "fused_update_", lambda *args: taken.append(original(*args)) or taken[-1])
    first = trained()
    assert len(taken) == 10
    assert None not in taken
    monkeypatch.setattr(fused, "fused_update_", lambda *args: None)
    assert all(torch.equal(a, b) for a, b in zip(first, trained(), strict=True))


@pytest.mark.parametrize(
    ("transform", "sampler", "dtype"),
    [
        (TRANSFORMS["adam"], zo.sparse(zo.gaussian, sparsity=0.5), torch.float32),
        (TRANSFORMS["adam"], zo.rademacher, torch.float64),
        (identity, zo.rademacher, torch.float32),
        (partial(lambda g, s, beta: (g, s), beta=0.5), zo.rademacher, torch.float32),
    ],
)
def test_what_has_no_kernel_is_left_to_the_transform_untouched(transform, sampler, dtype):
    x = torch.ones(50, dtype=dtype)
    update = TensorUpdate(WEIGHT, terms(0, sampler), transform, {}, LR, DECAY, None)
    assert fused.fused_update_(update, x, {}, 0, 1.0) is None
    assert torch.equal(x, torch.ones(50, dtype=dtype))


def test_adams_root_is_the_nearest_float_and_no_librarys_guess():
    v = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    step, _ = adam(torch.ones(len(v)), {"exp_avg": torch.ones(len(v)), "exp_avg_sq": v, "step": 9}, **ADAM)
    f = np.float32
    moments = f(0.9) * f(1) + f(1 - 0.9), f(0.99) * v.numpy() + f(1 - 0.99)
    root = np.sqrt(moments[1] / f(1 - 0.99**10))
    assert np.array_equal(step.numpy(), (moments[0] / f(1 - 0.9**10)) / (root + f(1e-8)))
