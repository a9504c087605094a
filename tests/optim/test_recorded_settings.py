"""What a ledger does not hold of each step may not change while it is written, and differs in its header."""

import math
from functools import partial

import pytest
import torch
from torch import nn

import zotune as zo
from problems import assert_same_bits
from zotune.apply.transforms import adam, momentum
from zotune.ledger import LedgerError, LedgerWriter, read
from zotune.ledger.replay import describe, header_of, record_to, replay
from zotune.optim.zeroth_order import ZerothOrder

X = torch.linspace(-1, 1, 6).view(2, 3)


def small():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


CHANGES = {
    "weight_decay": lambda o: o.param_groups[0].update(weight_decay=0.4),
    "param_groups": lambda o: o.param_groups[0]["params"].pop(),
    "max_coefficient": lambda o: setattr(o, "max_coefficient", 1.0),
    "transform": lambda o: setattr(o, "transform", partial(momentum, beta=0.5)),
    "coefficient": lambda o: setattr(o, "coefficient", math.sin),
    "num_queries": lambda o: setattr(o, "num_queries", 2),
    "rounding": lambda o: setattr(o, "rounding", "nearest"),
    "seed": lambda o: setattr(o, "seed", 8),
    "bound in place": lambda o: o.transform.keywords.update(beta=0.3),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_constant_is_refused_before_anything_moves(name, tmp_path):
    model = small()
    opt = zo.zo_sgd_mmt(model, 0.1, weight_decay=0.1)
    with LedgerWriter.create(tmp_path / "run.zol", header_of(opt)) as writer:
        record_to(writer, opt)
        opt.step(lambda: model(X).square().sum())
        opt.param_groups[0]["lr"] = 0.05  # which records hold
        opt.step(lambda: model(X).square().sum())
        before = model.weight.detach().clone()
        CHANGES[name](opt)
        with pytest.raises(zo.UsageError, match="ledger holds"):
            opt.step(lambda: model(X).square().sum())
        assert torch.equal(model.weight, before)
        assert writer.num_steps == 2
    opt.on_step = None
    if name != "num_queries":
        opt.step(lambda: model(X).square().sum())
        assert not torch.equal(model.weight, before)


def test_a_constant_that_changed_after_the_header_was_made_is_refused(tmp_path):
    opt = zo.zo_sgd(small(), 0.1, weight_decay=0.1)
    header = header_of(opt)
    opt.param_groups[0]["weight_decay"] = 0.2
    with LedgerWriter.create(tmp_path / "run.zol", header) as writer, pytest.raises(LedgerError, match="groups"):
        record_to(writer, opt)


def scaled(factor, gradient, state):
    return factor * gradient, state


def scaling(factor):
    return lambda gradient, state: (factor * gradient, state)


@pytest.mark.parametrize("make", [lambda a: partial(scaled, a), scaling, lambda a: partial(partial(scaled, a))])
def test_functions_that_differ_by_what_is_bound_to_them_are_described_differently(make):
    def described(factor):
        return describe(ZerothOrder(small(), 0.1, transform=make(factor)))["transform"]

    assert described(1.0) == described(1.0) != described(2.0)


def test_the_packages_own_functions_are_described_as_ever():
    found = describe(zo.zo_adam(small(), 0.1))
    assert found["transform"]["name"] == "zotune.transforms.adam"
    assert found["transform"].keys() == {"name", *partial(adam, beta1=1, beta2=1, eps=1).keywords}
    assert found["step"] == {"name": "zotune.steps.fixed"}


def test_a_hybrids_step_without_a_finite_loss_is_a_skipped_step_of_its_ledger(tmp_path):
    lower, upper, base = small(), nn.Linear(2, 1), small()
    method = zo.zo_sgd(lower, 0.1, num_queries=2)
    opt = zo.Hybrid(method, torch.optim.SGD(upper.parameters(), 0.1))
    factors = iter([1.0, math.nan, 1.0])
    with LedgerWriter.create(tmp_path / "run.zol", header_of(method)) as writer:
        record_to(writer, method)
        for factor in factors:
            opt.step(lambda factor=factor: upper(lower(X)).square().mean() * factor)
    ledger = read(tmp_path / "run.zol")
    assert [record.is_skipped for record in ledger] == [False, True, False]
    replayed = replay(zo.zo_sgd(base, 0.1, num_queries=2), ledger)
    assert (replayed.num_skipped, replayed.num_steps) == (1, 3)
    assert_same_bits(lower, base)


@pytest.mark.parametrize("option", ["betas", "momentum", "max_coefficient", "maximize"])
def test_options_that_groups_do_not_have_are_refused(option):
    model = small()
    with pytest.raises(zo.UsageError, match=option):
        zo.zo_sgd(model, 0.1, params=[{"params": list(model.parameters()), option: (0.5,)}])
