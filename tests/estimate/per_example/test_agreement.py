"""How many directions pay follows from the examples' slopes: the norms they estimate, the gain, state and replay."""

import numpy as np
import pytest
import torch
from torch import nn

import zotune as zo
from zotune.estimate.per_example.agreement import agreement, directions_that_pay, gain, products_and_squares
from zotune.ledger import LedgerWriter, read
from zotune.ledger.replay import header_of, record_to, replay


def test_slopes_estimate_the_norms_of_gradients():
    generator = np.random.default_rng(0)
    gradients = generator.normal(size=(12, 30)) + 0.7
    groups = np.arange(12) // 3
    found = []
    for _ in range(2000):
        u = generator.choice([-1.0, 1.0], size=(4, 30))
        found.append(products_and_squares((gradients * u[groups]).sum(axis=1), groups))
    product, square = np.mean(found, axis=0)
    error = np.std(found, axis=0) / np.sqrt(len(found))
    inner = gradients @ gradients.T
    pairs = [inner[i, j] for i in range(12) for j in range(12) if i != j and groups[i] == groups[j]]
    assert abs(product - np.mean(pairs)) < 4 * error[0]
    assert abs(square - np.mean(np.diag(inner))) < 4 * error[1]


@pytest.mark.parametrize("k", [1, 4, 16])
@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
def test_the_gain_is_the_ratio_of_the_variances(k, spread):
    """Against the sums of squared norms of the groups' gradients, which the variance of ĝ is proportional to."""
    generator = np.random.default_rng(1)
    gradients = np.ones((64, 2000)) / np.sqrt(2000) + spread * generator.normal(size=(64, 2000)) / np.sqrt(2000)
    mean, square = gradients.mean(axis=0), np.square(gradients).sum(axis=1).mean()
    together = (np.square(mean).sum() - square / 64) / (1 - 1 / 64)

    def variance(k):
        return np.square(gradients.reshape(k, -1, 2000).sum(axis=1) / 64).sum()

    assert gain([together, square, 9], k, 64) == pytest.approx(variance(1) / variance(k), rel=0.05)


def test_directions_follow_the_agreement():
    sizes = [directions_that_pay([together, 1.0, 9], 64) for together in (0.0, 0.005, 0.02, 0.1, 0.5, 1.0)]
    assert sizes == [1, 2, 8, 32, 32, 32]
    assert directions_that_pay(None, 1) == directions_that_pay([1.0, 1.0, 9], 1) == 1
    assert gain(None, 8, 16) == 1.0
    assert agreement([-1.0, 2.0, 9]) == 0.0


def problem(noise):
    """A linear regression whose examples agree, up to noise in their targets."""
    torch.manual_seed(0)
    model = nn.Linear(20, 1, bias=False)
    x = torch.ones(32, 20) + noise * torch.randn(32, 20)
    y = 10 + 30 * noise * torch.randn(32, 1)
    return model, zo.per_example(lambda x, y: (model(x) - y).square()[:, 0], x, y)


def test_auto_takes_many_directions_and_a_larger_rate_while_examples_agree(tmp_path):
    counts, rates = {}, {}
    for noise in (0.0, 3.0):
        model, f = problem(noise)
        opt = zo.zo_sgd(model, lr=1e-5, directions_per_batch="auto")
        records = []
        opt.on_step = records.append
        for _ in range(12):
            opt.step(f)
        counts[noise] = [len(record.coefficients) for record in records]
        rates[noise] = [record.learning_rates[0] / 1e-5 for record in records]
    assert counts[0.0] == [16] * 12
    assert counts[3.0][:5] == [16] * 5
    assert counts[3.0][-1] < 16
    assert rates[0.0][:5] == pytest.approx([1.0] * 5)
    assert rates[0.0][-1] == pytest.approx(16, rel=0.01)
    assert 0.999 < rates[3.0][-1] < 5


def test_what_auto_has_seen_is_saved_and_replayed(tmp_path):
    model, f = problem(1.0)
    opt = zo.zo_sgd(model, lr=1e-5, directions_per_batch="auto", num_queries=2)
    with LedgerWriter.create(tmp_path / "a.zol", header_of(opt)) as writer:
        record_to(writer, opt)
        for _ in range(8):
            opt.step(f)
        state = opt.state_dict()
        for _ in range(4):
            opt.step(f)
    ledger = read(tmp_path / "a.zol")
    other, g = problem(1.0)
    again = replay(zo.zo_sgd(other, lr=1e-5, directions_per_batch="auto", num_queries=2), ledger.first(8))
    assert again.state_dict()["zeroth_order"] == state["zeroth_order"]
    assert state["zeroth_order"]["learned"][2] == 8
    for _ in range(4):
        again.step(g)
    assert torch.equal(other.weight, model.weight)
