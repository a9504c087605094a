"""Compiled models: a probe runs them uncompiled, so it moves what it should, and nothing is compiled anew."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import zotune as zo

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def made():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def loss(model):
    return nn.functional.cross_entropy(model(X), Y)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


# The tracer is what matters here; its eager backend needs no C++ compiler.
def compiled(f):
    return torch.compile(f, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


def used_before(model):
    found = compiled(model)
    with torch.no_grad():
        found(X)
    return found


WAYS = {"wrapped": compiled, "in place": in_place, "used before": used_before}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "method",
    [
        lambda m: zo.zo_sgd(m, lr=0.05, num_queries=2),
        lambda m: zo.zo_sgd(m, lr=0.05, difference=zo.forward_difference),
        lambda m: zo.zo_sgd(m, lr=0.05, blocks=zo.blocks_by_layer(m)),
        lambda m: zo.zo_sgd_cons(m, lr=0.05),
    ],
    ids=["central", "one-sided", "blocks", "conservative"],
)
def test_steps_of_a_compiled_model_are_those_of_the_plain_one_to_the_bit(way, method):
    plain, other = made(), made()
    opt = method(plain)
    expected = [opt.step(lambda: loss(plain)) for _ in range(3)]
    module = WAYS[way](other)
    compilations = dict(counters["stats"])
    opt = method(other)
    found = [opt.step(lambda: loss(module)) for _ in range(3)]
    assert found == expected
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), other.parameters(), strict=True))
    assert dict(counters["stats"]) == compilations  # no graph was made for a probe


def test_a_whole_objective_may_be_compiled():
    plain, other = made(), made()
    one, two = zo.zo_sgd(plain, lr=0.05), zo.zo_sgd(other, lr=0.05)
    objective = compiled(lambda: loss(other))
    objective()
    assert [one.step(lambda: loss(plain)) for _ in range(3)] == [two.step(objective) for _ in range(3)]


def test_what_was_compiled_is_used_again_after_a_probe():
    model = made()
    module = used_before(model)
    frames = dict(counters["frames"])
    u = zo.Direction(seed=3)
    with torch.no_grad():
        before = module(X)
        with zo.perturbed(model, u, 0.5):
            moved = module(X)
        with zo.perturbed(model, u, 0.5):
            expected = model(X)
        after = module(X)
    assert torch.equal(moved, expected)
    assert not torch.equal(moved, before)
    assert torch.equal(before, after)
    assert dict(counters["frames"]) == frames


def test_an_error_within_a_probe_leaves_the_compiler_as_it_was():
    model = made()
    used_before(model)
    frames = counters["frames"]["total"]
    with pytest.raises(ZeroDivisionError), zo.perturbed(model, zo.Direction(seed=3), 0.5):
        raise ZeroDivisionError
    assert compiled(lambda x: (x * 2).sum())(X) == (X * 2).sum()
    assert counters["frames"]["total"] == frames + 1
