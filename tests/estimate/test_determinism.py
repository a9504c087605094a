"""Probes differ by the weights alone: chance between them, and statistics that they would move, are refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zotune as zo
from problems import assert_same_bits

X = torch.linspace(-1, 1, 24).view(8, 3)


def parts():
    torch.manual_seed(0)
    return nn.Linear(3, 4), nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 1))


MAKERS = {
    "central": lambda m: zo.zo_sgd(m, 0.1),
    "forward": lambda m: zo.zo_sgd(m, 0.1, difference=zo.forward_difference),
    "blocks": lambda m: zo.zo_sgd(m, 0.1, blocks=zo.blocks_by_size(m, 4), reuse_prefix=False),
}


@pytest.mark.parametrize("name", MAKERS)
def test_dropout_that_is_left_on_elsewhere_is_refused_and_nothing_moves(name):
    tuned, other = parts()
    before = parts()[0]
    opt = MAKERS[name](tuned)
    for loss in (
        lambda: other(tuned(X)).square().mean(),
        lambda: F.dropout(tuned(X), 0.5, training=True).square().mean(),
        lambda: tuned(X[torch.randperm(8)[:4]]).square().mean(),
        zo.accumulate([lambda: other(tuned(X[:4])).square().mean(), lambda: other(tuned(X[4:])).square().mean()]),
    ):
        with pytest.raises(zo.UsageError, match="draws random numbers"):
            opt.step(loss)
    assert_same_bits(tuned, before)
    assert (opt.num_steps, opt.num_forwards) == (0, 0)
    other.eval()
    opt.step(lambda: other(tuned(X)).square().mean())


def test_dropout_of_the_tuned_model_and_draws_that_the_closure_seeds_are_none():
    tuned, other = parts()
    whole = nn.Sequential(tuned, other)
    zo.zo_sgd(whole, 0.1).step(lambda: whole(X).square().mean())

    def seeded():
        torch.manual_seed(3)
        return other(tuned(X)).square().mean()

    u, mu = zo.Direction(4), 1e-2
    ((c, _),) = zo.central_difference(seeded, zo.ParameterSet(tuned), [u], mu=mu).terms
    with torch.no_grad(), zo.perturbed(tuned, u, mu):
        plus = float(seeded())
    with torch.no_grad(), zo.perturbed(tuned, u, -mu):
        minus = float(seeded())
    assert c == (plus - minus) / (2 * mu)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nn.InstanceNorm1d(4, track_running_stats=True)], ids=str)
def test_running_statistics_outside_the_model_are_not_moved_by_probes(norm):
    tuned = nn.Linear(3, 4)
    opt = zo.zo_sgd(tuned, 0.1)

    def loss():
        return norm(tuned(X).view(2, 4, 4)).square().sum()

    with pytest.raises(zo.UsageError, match="eval mode"):
        opt.step(loss)
    norm.eval()
    statistics = norm.running_mean.clone()
    opt.step(loss)
    assert torch.equal(norm.running_mean, statistics)


@pytest.mark.parametrize(
    "look",
    [torch.zeros_like, torch.randn_like, lambda p: p.new_full((2,), 1.0), lambda p: torch.ones(2).to(p),
     lambda p: torch.ones(1).expand_as(p), lambda p: torch.ones(2).type_as(p), lambda p: torch.ones(p.shape)],
)  # fmt: skip
def test_what_looks_at_a_tensors_shape_alone_does_not_read_it(look):
    model = nn.Linear(3, 1)
    model.extra = nn.Parameter(torch.ones(2))
    opt = zo.zo_sgd(model, 0.1)
    torch.manual_seed(0)

    def loss():
        torch.manual_seed(0)
        return model(X).square().sum() + 0 * look(model.extra).sum()

    with pytest.raises(zo.UnreadTensorError, match="extra"):
        opt.step(loss)
    opt.step(lambda: loss() + model.extra.to(torch.float64).sum())


def test_a_model_under_vmap_is_probed_as_over_its_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(0), nn.Linear(8, 1)).double()
    ids, u = torch.tensor([[1, 2], [3, 4], [1, 7]]), zo.Direction(2, zo.gaussian)
    losses = {
        "vmap": lambda: torch.func.vmap(lambda i: model(i).square().sum())(ids).mean(),
        "loop": lambda: torch.stack([model(i).square().sum() for i in ids]).mean(),
    }
    found = [zo.central_difference(f, zo.ParameterSet(model), [u], mu=0.1).terms[0][0] for f in losses.values()]
    assert abs(found[0] - found[1]) < 1e-12 < abs(found[0])
