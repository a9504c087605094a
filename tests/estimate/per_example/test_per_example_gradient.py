"""Forward gradients with a tangent an example: each coefficient is what back-propagation says of its own examples."""

import pytest
import torch
from test_per_example import KINDS, batch_of, reader
from torch import nn

import zotune as zo
from zotune.errors import UsageError
from zotune.system import limits


def gradients(model, ids, labels):
    """The gradient of each example's loss, by back-propagation."""
    losses = [model.losses(ids[i : i + 1], labels[i : i + 1])[0] for i in range(len(ids))]
    names = [name for name, _ in model.named_parameters()]
    return [dict(zip(names, torch.autograd.grad(x, list(model.parameters())), strict=True)) for x in losses]


@pytest.mark.parametrize("kind", ["dense", "sparse", "rank one", "flipped"])
@pytest.mark.parametrize("k", [2, 6])
def test_each_coefficient_is_the_derivative_of_its_own_examples(kind, k):
    model, (ids, labels) = reader(), batch_of(6)
    opt = zo.forward_grad(model, lr=0.1, sampler=KINDS[kind], directions_per_batch=k, num_queries=2)
    parts = [zo.per_example(model.losses, ids[lo:hi], labels[lo:hi]) for lo, hi in [(0, 1), (1, 6)]]
    estimate = opt.estimate(zo.accumulate(parts, weights=[1, 5]))
    own = gradients(model, ids, labels)
    assert len(estimate.terms) == 2 * k and estimate.num_forwards == 2
    assert estimate.loss == pytest.approx(float(model.losses(ids, labels).mean().detach()))
    for number, (c, u) in enumerate(estimate.terms):
        members = [i for i in range(6) if i * k // 6 == number % k]
        slope = sum(float((g * u.of(model, name)).sum()) for i in members for name, g in own[i].items())
        assert c == pytest.approx(slope / 6 / 2, rel=1e-9, abs=1e-12)


def test_auto_learns_the_agreement_of_the_examples_and_a_step_goes_down():
    model, (ids, labels) = reader(torch.float32), batch_of(8)
    opt = zo.forward_grad(model, lr=0.02, directions_per_batch="auto")
    f = zo.per_example(model.losses, ids, labels)
    losses = [opt.step(f) for _ in range(30)]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert opt.num_forwards == 30


def refusals():
    model, x = nn.Linear(3, 1), torch.randn(4, 3)
    yield model, lambda x: (model(x) * model.weight.detach().sum()).square()[:, 0], x, "differences of their losses say"
    yield model, lambda x: model(x)[:, 0] * (2.0 if float(model(x)) > 0 else 1.0), x, "without the others"
    yield model, lambda x: torch.special.zeta(model(x).square() + 2, model(x))[:, 0], x, "no forward-mode derivative"
    half = nn.Linear(3, 1).bfloat16()
    yield half, lambda x: half(x).float().square()[:, 0], x.bfloat16(), "single or double precision"


@pytest.mark.parametrize("number", range(4))
def test_what_has_no_derivative_of_each_example_is_refused(number):
    model, loss, x, said = list(refusals())[number]
    with pytest.raises(UsageError, match=said):
        zo.forward_grad(model, lr=0.1, directions_per_batch=4).step(zo.per_example(loss, x))


def test_copies_that_take_too_much_are_refused(monkeypatch):
    monkeypatch.setattr(limits, "EXAMPLE_BYTES", 100)
    model, x = nn.Linear(3, 1), torch.randn(4, 3)
    with pytest.raises(UsageError, match="4 rows would take"):
        zo.forward_grad(model, lr=0.1, directions_per_batch=4).step(zo.per_example(lambda x: model(x)[:, 0], x))
