"""A window makes a transform's state again from coefficients: the same bits as keeping it, as far as it reaches."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch

import zotune as zo
from problems import assert_same_bits, problem
from zotune import reference

STATEFUL = {
    "momentum": zo.zo_sgd_mmt,
    **{adam: partial(zo.zo_adam, adam=adam) for adam in ("torch", "adamm", "amsgrad")},
}
each_method = pytest.mark.parametrize("method", STATEFUL)
SETTINGS = {
    "plain": lambda model: {},
    "joint": lambda model: {"blocks": zo.blocks_by_layer(model)},
    "sequential": lambda model: {"blocks": zo.blocks_by_layer(model), "block_order": "sequential"},
    "sparse": lambda model: {"sampler": zo.sparse(zo.gaussian, 0.3, interval=3)},
    "decayed": lambda model: {"weight_decay": 0.1, "num_queries": 3},
    "clipped": lambda model: {"max_coefficient": 0.5, "num_queries": 2},
    "sparse blocks": lambda model: {"sampler": zo.sparse(zo.rademacher, 0.3), "blocks": zo.blocks_by_part(model)},
}
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def run(
    method, steps, name="transformer", dtype=torch.float32, setting="plain", closure=lambda p, step: p.closure, **more
):
    p = problem(name, dtype)
    opt = method(p.model, 0.01, mu=0.05, **{**SETTINGS[setting](p.model), **more})
    losses = [opt.step(closure(p, step)) for step in range(steps)]
    return losses, p, opt


def assert_same_run(one, other):
    assert one[0] == other[0]
    assert_same_bits(one[1].model, other[1].model)


@pytest.mark.sample(3)
@each_method
@pytest.mark.parametrize(
    ("setting", "dtype"), [("plain", torch.float32), *((setting, torch.bfloat16) for setting in SETTINGS)], ids=str
)
def test_a_window_as_long_as_the_run_is_the_kept_state_to_the_bit(method, setting, dtype):
    runs = [run(STATEFUL[method], 5, dtype=dtype, setting=setting, window=window) for window in (None, 5)]
    assert_same_run(*runs)
    assert not any(runs[1][2].state[p] for p in runs[1][1].model.parameters())


@each_dtype
def test_a_window_of_one_step_is_a_method_without_memory(dtype):
    assert_same_run(
        run(zo.zo_sgd_mmt, 5, dtype=dtype, window=1, beta=0.9), run(zo.zo_sgd_mmt, 5, dtype=dtype, beta=0.0)
    )


def test_momentum_with_a_window_of_one_is_zo_sgd():
    one, other = (
        run(m, 6, "rosenbrock", torch.float64, **o) for m, o in ((zo.zo_sgd_mmt, {"window": 1}), (zo.zo_sgd, {}))
    )
    np.testing.assert_allclose(one[1].position(), other[1].position(), rtol=1e-13)


@pytest.mark.parametrize("window", [2, 3])
def test_a_window_is_the_sum_over_so_many_steps(window):
    """m_t = Σ β^(t - k) ĝ_k over the last `window` steps k, the present one included."""
    p = problem("rosenbrock")
    opt = zo.zo_sgd_mmt(p.model, 0.01, beta=0.7, window=window)
    gradients = []
    for _ in range(6):
        before = p.position()
        opt.step(p.closure, inspect=lambda e: gradients.append(p.whole(e.of)))
        m = sum(0.7**age * g for age, g in enumerate(reversed(gradients[-window:])))
        np.testing.assert_allclose(p.position(), before - 0.01 * m, rtol=1e-12)


@pytest.mark.parametrize("adam", ["torch", "adamm", "amsgrad"])
def test_adam_with_a_window_is_adam_begun_anew_at_its_edge(adam):
    p = problem("quadratic")
    opt = zo.zo_adam(p.model, 0.01, adam=adam, window=3, betas=(0.8, 0.9))
    gradients = []
    for _ in range(6):
        before = p.position()
        opt.step(p.closure, inspect=lambda e: gradients.append(p.whole(e.of)))
        path = reference.zo_adam(lambda x, g: g, np.zeros(7), 0.01, (0.8, 0.9), 1e-8, adam, gradients[-3:])
        step = path[-1] - (path[-2] if len(path) > 1 else 0.0)
        np.testing.assert_allclose(p.position() - before, step, rtol=1e-9, atol=1e-13)


@pytest.mark.sample(3)
@each_method
@pytest.mark.parametrize("setting", ["plain", "sequential", "sparse"])
def test_skipped_steps_are_in_neither_state_nor_window(method, setting):
    def closure(p, step):
        return (lambda: p.closure() * float("nan")) if step in (0, 2) else p.closure

    runs = [run(STATEFUL[method], 5, setting=setting, closure=closure, window=window)[1:] for window in (None, 3)]
    assert_same_bits(runs[0][0].model, runs[1][0].model)
    assert runs[1][1].num_skipped == 2


@pytest.mark.sample(2)
@each_method
def test_a_rejected_conservative_step_advances_state_and_window_alike(method):
    ends = []
    for window in (None, 8):
        p = problem("rosenbrock")
        transform = STATEFUL[method](p.model, 0.1).transform
        opt = zo.ZerothOrder(
            p.model,
            0.02 if method == "momentum" else 0.2,
            transform=transform,
            step=zo.zo_sgd_cons(p.model, 0.1).line_search,
            window=window,
        )
        path = [p.position()]
        for _ in range(8):
            opt.step(p.closure)
            path.append(p.position())
        stayed = [np.array_equal(a, b) for a, b in pairwise(path)]
        assert any(stayed)
        assert not all(stayed)
        ends.append(path)
    np.testing.assert_array_equal(*ends)


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_without_the_present_step_is_refused(window):
    with pytest.raises(ValueError, match=f"window={window}"):
        zo.zo_sgd_mmt(problem("quadratic").model, 0.1, window=window)
