"""Probes of half-precision weights are of x ± μu on average, for every tensor and every way in which it is read.

The objective is the mean of what the model reads times u's part for it, divided by the mean of u². So whatever the
way, the coefficient is the mean of the move along u over μ: 1 is expected.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zotune as zo
from zotune.estimate.perturb import perturbed
from zotune.model.parameters import ParameterSet
from zotune.noise import RADEMACHER, fill, spec
from zotune.system import limits

pytestmark = pytest.mark.usefixtures("kernels")

MU, SIGMAS = 1e-3, 5
HALVES = [torch.bfloat16, torch.float16]
each_half = pytest.mark.parametrize("dtype", HALVES, ids=str)
EYE, NUMBERS, ONES = torch.eye(64), torch.arange(64)[:, None], torch.ones(1, 4096)
MATRIX, TABLE, VECTOR, KERNEL = (64, 64), (200, 64), (4096,), (64, 64, 1, 1)


# By way of reading: the tensor's shape, the examples, how they read it, and whether u comes out transposed.
WAYS = {
    "linear": (MATRIX, EYE, lambda x, w: F.linear(x.to(w.dtype), w), True),
    "product": (MATRIX, EYE, lambda x, w: x.to(w.dtype) @ w, False),
    "rows": (TABLE, NUMBERS, lambda i, w: F.embedding(i, w), False),  # few rows of many, which alone are made
    "table": (MATRIX, NUMBERS.expand(64, 3), lambda i, w: F.embedding(i, w)[:, 1], False),
    "convolution": (KERNEL, EYE, lambda x, w: F.conv2d(x.to(w.dtype)[:, :, None, None], w), True),
    "gain": (VECTOR, ONES, lambda x, w: x.to(w.dtype) * w, False),
    "bias": (VECTOR, ONES, lambda x, w: F.linear(0 * x[:, :8].to(w.dtype), torch.zeros(4096, 8).to(w.dtype), w), False),
    "norm": (VECTOR, ONES, lambda x, w: F.rms_norm(x.to(w.dtype), (4096,), w, 0.0), False),
}


class Own:
    """A sampler without kernels."""

    def fill(self, out, seed, tensor_id, start):
        fill(out, RADEMACHER, seed, tensor_id, start)


SAMPLERS = {
    "gaussian": zo.gaussian,
    "low_rank": zo.low_rank(zo.rademacher, rank=1),
    "sparse": zo.sparse(zo.rademacher, 0.25),
    "own": Own(),
}


def moves(way, value, dtype, *, sampler=zo.rademacher, seeds=None, **options):
    """The mean move along u over μ, by seed; probes share a forward pass where they may."""
    shape, examples, reading, transposed = WAYS[way]
    model, found = nn.ParameterDict({"w": torch.full(shape, value, dtype=dtype)}), []
    opt = zo.zo_sgd(model, lr=0.0, mu=MU, sampler=sampler, **options)
    for seed in range(seeds or (40 if value > 4 else 12)):  # the larger the unit, the larger the spread
        opt.seed = seed
        (u, *_) = opt.directions()
        expected = u.of(opt.tuned, "w").flatten(1) if len(shape) > 1 else u.of(opt.tuned, "w")[None]
        expected = (expected.t() if transposed else expected).contiguous()
        expected = expected[: len(examples)] if shape == TABLE else expected
        scale = float(expected.square().mean())

        def losses(x, s, scale=scale):
            return (reading(x, model["w"]).float().flatten(1) * s).mean(1) / scale

        found.append(opt.estimate(zo.batched(losses, examples, expected)).terms[0][0])
    return torch.tensor(found)


def assert_one(found, tolerance=0.05):
    """A mean of 1, by the tolerance and by the numbers' own spread."""
    error, spread = abs(float(found.mean()) - 1), float(found.std()) / math.sqrt(len(found))
    assert error < tolerance, (found.mean(), spread)
    assert error < SIGMAS * spread + 0.004, (found.mean(), spread)


@each_half
@pytest.mark.parametrize("value", [0.6, -8.0])
@pytest.mark.parametrize("way", WAYS)
def test_the_mean_move_is_that_of_the_direction_however_a_tensor_is_read(way, value, dtype):
    assert_one(moves(way, value, dtype))


@each_half
@pytest.mark.parametrize("value", [0.02, 0.3, 1.0, 1.9, 3.0])
def test_the_mean_move_is_that_of_the_direction_whatever_the_weights(value, dtype):
    assert_one(moves("linear", value, dtype))


@each_half
@pytest.mark.parametrize("way", ["linear", "rows"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_mean_move_is_that_of_the_direction_whatever_the_sampler(sampler, way, dtype):
    assert_one(moves(way, 3.0, dtype, sampler=SAMPLERS[sampler]))


@each_half
def test_forward_differences_and_several_queries_have_the_same_mean(dtype):
    assert_one(moves("linear", 0.6, dtype, difference=zo.forward_difference))
    assert_one(2 * moves("linear", 0.6, dtype, num_queries=2))


@each_half
def test_pieces_of_a_matrix_are_rounded_as_the_whole(dtype, monkeypatch):
    whole = moves("linear", 3.0, dtype, seeds=2)
    monkeypatch.setattr(limits, "PERTURBED_ELEMENTS", 200)
    monkeypatch.setattr(limits, "CACHED_BYTES", 0)
    assert torch.equal(moves("linear", 3.0, dtype, seeds=2), whole)


def bits(t):
    return t.detach().contiguous().view(torch.int16)


@each_half
@pytest.mark.parametrize("a", [MU, -MU, 0.25])
def test_what_is_read_has_the_bits_of_the_specification(a, dtype):
    torch.manual_seed(0)
    model = nn.ParameterDict({"w": torch.randn(70, 61).to(dtype)})
    tuned, u = ParameterSet(model), zo.Direction(2**63 + 5)
    (tensor,) = tuned
    signs = spec.rademacher(u.seed, tensor.id, 0, 70 * 61)
    y = model["w"].detach().float().view(-1).numpy() + signs * torch.tensor(a).numpy()
    random = spec.probe16(u.seed, tensor.id, 0, 70 * 61)
    expected = torch.from_numpy(spec.round_stochastically(y, random, str(dtype).removeprefix("torch."))).view(dtype)
    with torch.no_grad(), perturbed(tuned, u, a):
        whole, rows = model["w"] * 1, F.embedding(torch.tensor([69, 0, 3]), model["w"])
        product = F.linear(torch.eye(61).to(dtype), model["w"])
    for read in (whole, product.t()):
        assert torch.equal(bits(read), bits(expected).view(70, 61))
    assert torch.equal(bits(rows), bits(expected).view(70, 61)[[69, 0, 3]])


@each_half
def test_both_ends_of_a_probe_have_the_same_random_numbers_so_no_weight_moves_at_both(dtype):
    value = 3.0 if dtype == torch.bfloat16 else 12.0
    model = nn.ParameterDict({"w": torch.full((100_000,), value, dtype=dtype)})
    u, ends = zo.Direction(4), []
    for a in (MU, -MU):
        with torch.no_grad(), perturbed(model, u, a):
            ends.append(model["w"] * 1)
    share = MU / (torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(value)))
    assert share < 0.5
    moved = [end != value for end in ends]
    assert not (moved[0] & moved[1]).any()
    for end in moved:
        assert abs(end.double().mean() - share) < SIGMAS * math.sqrt(share * (1 - share) / 100_000)
    along = (ends[0].double() - ends[1].double()) * u.of(model, "w").double() / (2 * MU)
    # The variance that docs/concepts/half-precision.md names.
    assert abs(along.var() / (1 / (2 * share) - 1) - 1) < 0.1


class Tied(nn.Module):
    """An embedding that is the head too, a layer norm with gains of 0.3 to 8, a linear layer with a bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.tokens, self.norm, self.mix = nn.Embedding(40, 32), nn.LayerNorm(32), nn.Linear(32, 32)
        self.norm.weight.data = torch.linspace(0.3, 8, 32).bfloat16().float()
        for p in self.parameters():
            p.data = p.data.bfloat16().float()

    def losses(self, ids):
        hidden = self.norm(torch.tanh(self.mix(self.tokens(ids))))
        logits = F.linear(hidden, self.tokens.weight).float()
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(len(ids), -1).mean(1)


@pytest.mark.sample(1)
@pytest.mark.parametrize("part", ["norm.weight", "tokens.weight", "mix.bias", ""])
def test_the_coefficients_of_a_model_are_those_of_its_twin_in_single_precision(part):
    """On average over directions: their difference has no part along the twin's."""
    plain = Tied()
    for name, p in plain.named_parameters():
        p.requires_grad_(part in name)
    half = copy.deepcopy(plain).bfloat16()
    torch.manual_seed(2)
    ids, found = torch.randint(40, (6, 7)), []
    opts = [zo.zo_sgd(m, lr=0.0, mu=MU) for m in (plain, half)]
    for seed in range(60):
        for opt in opts:
            opt.seed = seed
        pair = [opt.estimate(zo.batched(opt.tuned.model.losses, ids)).terms[0][0] for opt in opts]
        found.append(pair)
    c, rounded = torch.tensor(found).t().double()
    slope = float((c * rounded).sum() / c.square().sum())
    spread = float((rounded - slope * c).std() / c.square().sum().sqrt())
    assert abs(slope - 1) < SIGMAS * spread
    assert spread < 0.5, "too noisy to tell anything"
