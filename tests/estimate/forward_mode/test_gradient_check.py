"""The check of the first forward gradient refuses what is wrong, and nothing that is right."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zotune as zo
from zotune.estimate.forward_mode.gradient_check import _TRIALS, contradiction

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@torch.library.custom_op("zotune_test::without_derivative", mutates_args=())
def without_derivative(x: torch.Tensor) -> torch.Tensor:
    """An operator as quantised kernels are: torch knows nothing of its derivative."""
    return x.clone()


class Detaching(nn.Module):
    def forward(self, x):
        return x.detach()


def network(middle, dtype, std=0.3):
    torch.manual_seed(0)
    layers = [nn.Embedding(50, 16), nn.Linear(16, 32), nn.LayerNorm(32), middle, nn.Linear(32, 32), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(32, 50))
    for p in model.parameters():
        p.data += std * torch.randn_like(p) - (0 if p.dim() == 1 else p.data)
    return model.to(dtype)


def loss_of(model):
    ids = torch.arange(24) % 50
    logits = model(ids)
    return F.cross_entropy(logits.double() if logits.dtype == torch.float64 else logits.float(), (7 * ids) % 50)


def estimated(model, seed=0, estimator=None):
    estimator = estimator or zo.CheckedForwardGradient()
    return estimator(lambda: loss_of(model), zo.ParameterSet(model), [zo.Direction(seed)])


@pytest.mark.sample(1)
@each_dtype
@pytest.mark.parametrize("std", [0.02, 0.3])
def test_a_right_coefficient_is_never_refused(dtype, std):
    for seed in range(30):
        model = network(nn.Tanh(), dtype, std)
        assert estimated(model, seed) == zo.forward_gradient(
            lambda model=model: loss_of(model), zo.ParameterSet(model), [zo.Direction(seed)]
        )


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_tangents_that_end_on_the_way_are_refused_and_where_is_said(dtype):
    with pytest.raises(zo.UsageError, match=r"differences of the loss say .*Tangents end in: .*detach.*central_diff"):
        estimated(network(Detaching(), dtype))


@pytest.mark.sample(2)
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
@pytest.mark.parametrize("cut", [torch.Tensor.detach, lambda x: x.data])
def test_in_half_precision_a_cut_is_judged_by_what_it_cuts_off(dtype, cut):
    class Beside(nn.Module):
        """Most of what is passed on has no tangent."""

        def forward(self, x):
            return x + 5 * cut(x)

    class Doubled(nn.Module):
        def forward(self, x):
            return 6 * x

    class Softmax(nn.Module):
        """exp(x - max) over its sum does not depend on the maximum."""

        def forward(self, x):
            e = (x - cut(x.amax(-1, keepdim=True))).exp()
            return 8 * e / e.sum(-1, keepdim=True)

    def slope(middle, seed):
        model = network(middle, torch.float64, 0.1)
        return zo.forward_gradient(lambda: loss_of(model), zo.ParameterSet(model), [zo.Direction(seed)]).terms[0][0]

    refused = 0
    for seed in range(6):
        whole, left = slope(Doubled(), seed), slope(Beside(), seed)
        if abs(whole - left) > 0.35 * max(abs(whole), abs(left)) + 0.3:
            refused += 1
            with pytest.raises(
                zo.UsageError, match=r"\.detach\(\) or \.data cuts off.*Tangents end in: .*central_diff"
            ):
                estimated(network(Beside(), dtype, 0.1), seed)
        right = network(Softmax(), dtype)
        assert estimated(right, seed).terms[0][0] == pytest.approx(
            zo.forward_gradient(lambda m=right: loss_of(m), zo.ParameterSet(right), [zo.Direction(seed)]).terms[0][0]
        )
    assert refused


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
@pytest.mark.parametrize("number", [torch.Tensor.item, float, torch.Tensor.tolist, lambda x: x.float().numpy().item()])
def test_in_half_precision_numbers_that_leave_torch_are_refused_where_the_loss_reads_them(dtype, number):
    seen = []

    class Reading(nn.Module):
        def __init__(self, is_used):
            super().__init__()
            self.is_used = is_used

        def forward(self, x):
            with torch.no_grad():
                seen.append(number(x.abs().amax().clone()))
            return x / seen[-1] if self.is_used else x

    with pytest.raises(zo.UsageError, match="numbers that left torch"):
        estimated(network(Reading(True), dtype))
    assert estimated(network(Reading(False), dtype)).num_forwards == 1


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_in_half_precision_differences_do_not_judge_a_coefficient(dtype, monkeypatch):
    """Of a model with many tuned weights they are noise."""
    monkeypatch.setattr(
        "zotune.estimate.forward_mode.gradient_check.central_difference",
        lambda *args, **more: pytest.fail("a difference"),
    )
    model, calls = network(nn.Tanh(), dtype), []

    def loss():
        calls.append(1)
        return loss_of(model)

    zo.CheckedForwardGradient()(loss, zo.ParameterSet(model), [zo.Direction(0)])
    assert len(calls) == 1


@each_dtype
def test_an_operator_that_drops_tangents_is_refused_by_name_even_if_only_a_part_of_them(dtype):
    class Beside(nn.Module):
        def forward(self, x):
            return x + 1e-3 * torch.ops.zotune_test.without_derivative(x)

    with pytest.raises(zo.UsageError, match=r"zotune_test.without_derivative.* drops tangents .*central_difference"):
        estimated(network(Beside(), dtype))


@each_dtype
def test_a_loss_whose_tangents_nearly_all_vanish_is_refused_in_every_precision(dtype):
    class LastLayerAlone(nn.Module):
        def __init__(self):
            super().__init__()
            self.below, self.head = nn.Linear(64, 64), nn.Linear(64, 4)

        def forward(self, x):
            return self.head(torch.tanh(self.below(x)).detach())

    torch.manual_seed(0)
    model, x = LastLayerAlone().to(dtype), torch.randn(16, 64).to(dtype)
    model.head.requires_grad_(False)

    def loss():
        return (
            10 * model(x).float().square().mean()
            + 1e-6 * model.below.weight.float().sum()
            + 1e-6 * (model.below.bias.float().sum())
        )

    with pytest.raises(zo.UsageError, match=r"differences of the loss say|\.data cuts off"):
        zo.CheckedForwardGradient()(loss, zo.ParameterSet(model), [zo.Direction(0)])


def test_only_the_first_finite_estimate_is_checked():
    model, estimator, calls = network(nn.Tanh(), torch.float32), zo.CheckedForwardGradient(), []

    def loss():
        calls.append(len(calls))
        return loss_of(model) * (math.nan if len(calls) == 1 else 1)

    counts = []
    for _ in range(4):
        found = estimator(loss, zo.ParameterSet(model), [zo.Direction(0), zo.Direction(1)])
        assert found.num_forwards == 2
        counts.append(len(calls))
    assert counts == [2, 6, 8, 10]


def test_a_refused_model_is_refused_again():
    model, estimator = network(Detaching(), torch.float32), zo.CheckedForwardGradient()
    for _ in range(2):
        with pytest.raises(zo.UsageError, match="detach"):
            estimated(model, estimator=estimator)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_of_the_loss_is_never_taken_for_a_contradiction(dtype):
    trial, generator = _TRIALS[dtype], torch.Generator().manual_seed(0)
    wrong = 0
    for _ in range(2000):
        c = 10 ** float(torch.empty(()).uniform_(-6, 1, generator=generator))
        curvature = 10 ** float(torch.empty(()).uniform_(-2, 3, generator=generator))

        def slope(mu, c=c, curvature=curvature):
            noise = 2.0 * trial.rounding * float(torch.randn((), generator=generator))
            return c * (1 + curvature * mu**2) + noise / (2 * mu)

        wrong += contradiction(c, slope, 2.0, trial) is not None
    assert wrong == 0


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("factor", [0.0, -1.0, 0.5, 1.5])
def test_a_wrong_coefficient_is_a_contradiction(dtype, factor):
    said = contradiction(0.4 * factor, lambda mu: 0.4 + 3 * mu**2, 2.0, _TRIALS[dtype])
    assert said == pytest.approx(0.4, rel=0.05)


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_in_half_precision_differences_that_lie_together_by_chance_contradict_nothing(dtype):
    """As of a large model, whose derivative is 37, and for which every μ is too large or drowns in rounding."""
    differences = {2.5e-3: 13.4, 5e-3: -3.1, 1e-2: -5.0, 2e-2: -4.2, 4e-2: -26.3}
    assert contradiction(40.4, differences.__getitem__, 11.0, _TRIALS[dtype]) is None


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_in_half_precision_a_lost_derivative_is_a_contradiction_where_differences_agree(dtype):
    assert contradiction(0.0, lambda mu: 4.0 + 300 * mu**2, 2.0, _TRIALS[dtype]) == pytest.approx(4.0, rel=0.05)
