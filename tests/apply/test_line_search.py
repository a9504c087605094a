"""The conservative step is the best of three points, looked at with the bits that the weights would have."""

import math
from functools import partial

import pytest
import torch
from torch import nn

import zotune as zo
from problems import all_bits, assert_all_moved, assert_same_bits, problem
from zotune.apply.line_search import conservative
from zotune.apply.transforms import adam, elementwise_sign, identity, momentum
from zotune.system import limits

TRANSFORMS = {
    "identity": identity,
    "sign": elementwise_sign,
    "momentum": partial(momentum, beta=0.9),
    "adam": partial(adam, beta1=0.9, beta2=0.99, eps=1e-8),
}
each_transform = pytest.mark.parametrize("transform", TRANSFORMS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def start(p, lr, transform="identity", **options):
    estimator = partial(zo.central_difference, mu=0.05)  # half precision wants far probes
    chosen = TRANSFORMS[transform]
    return zo.ZerothOrder(p.model, lr, estimator=estimator, transform=chosen, step=conservative, **options)


@pytest.mark.sample(2)
@each_transform
@each_dtype
@pytest.mark.parametrize("rounding", list(zo.Rounding))
def test_the_batchs_loss_never_rises_over_300_steps(transform, dtype, rounding):
    if dtype == torch.float32 and rounding != "nearest":
        pytest.skip("rounding concerns half precision alone")
    p = problem("quadratic", dtype)
    opt = start(p, 0.05, transform, rounding=rounding)
    losses = [p.value()]
    stayed = 0
    for _ in range(300 if transform == "momentum" and rounding == "stochastic" else 40):
        before = all_bits(p.model)
        opt.step(p.closure)
        losses.append(p.value())
        stayed += all(torch.equal(bits, before[name]) for name, bits in all_bits(p.model).items())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert stayed or len(losses) < 300


@pytest.mark.sample(3)
@each_transform
@each_dtype
def test_the_loss_after_a_step_is_the_least_of_those_it_looked_at_to_the_bit(transform, dtype):
    p = problem("transformer", dtype)
    opt = start(p, 0.05, transform, num_queries=2, weight_decay=0.1)
    for _ in range(6):
        seen = []

        def closure(seen=seen):
            seen.append(p.closure())
            return seen[-1]

        opt.step(closure)
        assert len(seen) == 2 * 2 + 3
        assert p.value() == min(map(float, seen[-3:]))


@each_transform
@each_dtype
@pytest.mark.parametrize("rounding", list(zo.Rounding))
def test_a_rejected_step_leaves_the_bits_and_advances_the_state_once(transform, dtype, rounding):
    p, twin = problem("transformer", dtype), problem("transformer", dtype)
    opts = [
        start(p, 0.05, transform, rounding=rounding),
        zo.ZerothOrder(twin.model, 0.0, transform=TRANSFORMS[transform]),
    ]
    before = all_bits(p.model)
    for _ in range(2):
        estimates = []
        calls = iter(range(10))
        # Two probes, then f(x) = 0 and worse on both sides.
        opts[0].step(
            lambda c=calls: p.closure() if next(c) < 2 else p.closure() * 0 + (next(c) > 4), inspect=estimates.append
        )
        opts[1].apply(estimates[0])
        assert_same_bits(before, p.model)
    for a, b in zip(p.model.parameters(), twin.model.parameters(), strict=True):
        kept = {k: v for k, v in opts[0].state[a].items() if k != "master"}
        assert kept.keys() == opts[1].state[b].keys()
        for key, value in kept.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(opts[1].state[b][key])), key


@pytest.mark.parametrize("difference", [zo.central_difference, zo.forward_difference])
@pytest.mark.parametrize(
    ("here", "forth", "back", "chosen"),
    [
        (1.0, 1.0, 1.0, 0),
        (1.0, 0.5, 0.5, 1),
        (1.0, 0.9, 0.5, -1),
        (1.0, math.nan, 2.0, 0),
        (1.0, math.nan, 0.5, -1),
        (1.0, -math.inf, math.nan, 0),
        (1.0, 0.5, -math.inf, 1),
        (1.0, math.inf, math.inf, 0),
    ],
)
def test_ties_keep_x_and_what_is_no_number_is_never_chosen(difference, here, forth, back, chosen):
    model = nn.Linear(2, 1, bias=False)
    opt = zo.zo_sgd_cons(model, 0.25, difference=difference)
    before, (u,) = model.weight.detach().clone(), opt.directions()
    probes = [here + 1e-3, here - 1e-3, here] if difference is zo.central_difference else [here, here + 1e-3]
    values = iter([*probes, forth, back])

    def closure():
        model(torch.ones(1, 2))  # whatever is read
        return next(values)

    opt.step(closure)
    assert next(values, None) is None
    torch.testing.assert_close(model.weight.detach(), before - chosen * 0.25 * u.of(model, "weight"), rtol=2e-3, atol=0)
    assert torch.equal(model.weight, before) == (chosen == 0)


@pytest.mark.parametrize("q", [1, 3])
def test_forward_passes_are_two_or_one_a_query_and_three(q):
    for difference, expected in ((zo.central_difference, 2 * q + 3), (zo.forward_difference, q + 3)):
        p, calls = problem("quadratic"), []
        opt = zo.zo_sgd_cons(p.model, 0.1, num_queries=q, difference=difference)
        opt.step(lambda p=p, calls=calls: calls.append(0) or p.closure())
        assert (len(calls), opt.num_forwards) == (expected, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rounding", ["stochastic", "master"])
@each_transform
def test_a_point_is_looked_at_with_the_bits_it_will_have_however_it_is_read(dtype, rounding, transform, monkeypatch):
    """Whole, by rows of an embedding, in pieces of a linear layer; written in chunks of another size."""
    monkeypatch.setattr(limits, "UPDATE_ELEMENTS", 7)
    monkeypatch.setattr(limits, "PERTURBED_ELEMENTS", 12)
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(9, 5), "linear": nn.Linear(5, 8)}).to(dtype)
    ids, seen = torch.tensor([3, 1, 3]), []

    def closure():
        h = model["linear"](model["embed"](ids))
        seen.append([h.detach().clone(), (model["linear"].weight * 1).detach().clone()])
        return float(len(seen) == 4) * -1.0 + h.float().sum().item() * 0  # forth is best

    opt = zo.ZerothOrder(model, 0.1, transform=TRANSFORMS[transform], step=conservative, rounding=rounding)
    before = all_bits(model)
    opt.apply(opt.estimate(lambda: model["linear"](model["embed"](ids)).float().square().sum()))
    seen.clear()
    opt.estimator = lambda closure, tuned, directions: zo.GradientEstimate(
        1.0, tuple((0.7, u) for u in directions), 2, base=0.0
    )
    seen.append(None), seen.append(None), seen.append(None)
    opt.step(closure)
    looked_at = seen[3]
    with torch.no_grad():
        h = model["linear"](model["embed"](ids))
    assert torch.equal(looked_at[1], model["linear"].weight)
    torch.testing.assert_close(
        looked_at[0].float(), h.float(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6
    )
    assert_all_moved(before, model)
