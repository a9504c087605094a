"""One direction an example: each coefficient is the slope of its own examples' losses along its own direction."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zotune as zo
from zotune.errors import UsageError
from zotune.estimate.per_example import weights
from zotune.estimate.per_example.difference import PerExampleDifference
from zotune.ledger import LedgerWriter, read
from zotune.ledger.replay import header_of, record_to, replay
from zotune.ledger.stream import Trace

KINDS = {
    "dense": zo.gaussian,
    "sparse": zo.sparse(zo.rademacher, sparsity=0.3),
    "rank one": zo.low_rank(zo.gaussian),
    "rank 2, shared": zo.low_rank(zo.rademacher, rank=2, interval=3),
    "flipped": zo.flipped(zo.gaussian),
}


class Reader(nn.Module):
    """A small transformer with a tied head, whose vectors, matrices and embedding are all tuned."""

    def __init__(self, width=8, words=11):
        super().__init__()
        self.words, self.norm = nn.Embedding(words, width), nn.LayerNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, ids):
        h = self.words(ids)
        q, k, v = (x.unflatten(-1, (2, -1)).transpose(1, 2) for x in self.qkv(self.norm(h)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        h = h + torch.tanh(self.mix(attended))
        return F.linear(h[:, -1], self.words.weight)

    def losses(self, ids, labels):
        return F.cross_entropy(
            self(ids).float() if self.mix.weight.dtype == torch.bfloat16 else self(ids), labels, reduction="none"
        )


def batch_of(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(11, (size, 5), generator=generator), torch.randint(11, (size,), generator=generator)


def reader(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return Reader().to(dtype)


def slope(model, u, losses, mu):
    """The central difference along u of what `losses` returns, one example at a time."""
    with torch.no_grad():
        ends = []
        for a in (mu, -mu):
            with zo.perturbed(model, u, a):
                ends.append(losses())
    return float((ends[0] - ends[1]) / (2 * mu))


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_each_coefficient_is_the_slope_of_its_own_examples_losses(kind, k):
    model, (ids, labels) = reader(), batch_of(6)
    before = copy.deepcopy(model.state_dict())
    opt = zo.zo_sgd(model, lr=0.1, mu=1e-2, sampler=KINDS[kind], directions_per_batch=k)
    estimate = opt.estimate(zo.per_example(model.losses, ids, labels))
    assert len(estimate.terms) == k
    assert estimate.num_forwards == 2
    assert len({u.seed for _, u in estimate.terms}) == k
    for g, (c, u) in enumerate(estimate.terms):
        own = [i for i in range(6) if i * k // 6 == g]

        def losses(own=own):
            return sum(model.losses(ids[i : i + 1], labels[i : i + 1]) for i in own) / 6

        assert c == pytest.approx(slope(model, u, losses, 1e-2), rel=1e-9, abs=1e-11)
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


class Mixer(nn.Module):
    """Layers that read transposed, thus not contiguous, values: along positions, and after it along features."""

    def __init__(self):
        super().__init__()
        self.words, self.positions, self.features = nn.Embedding(11, 8), nn.Linear(5, 5), nn.Linear(8, 11)

    def losses(self, ids, labels):
        h = self.features(self.positions(self.words(ids).mT).mT.tanh())
        return F.cross_entropy(h.mean(1), labels, reduction="none")


@pytest.mark.parametrize("kind", KINDS)
def test_slopes_are_those_of_layers_that_read_transposed_values(kind):
    torch.manual_seed(0)
    model, (ids, labels) = Mixer().double(), batch_of(4)
    opt = zo.zo_sgd(model, lr=0.1, mu=1e-2, sampler=KINDS[kind], directions_per_batch=4)
    terms = opt.estimate(zo.per_example(model.losses, ids, labels)).terms
    for i, (c, u) in enumerate(terms):
        own = slope(model, u, lambda i=i: model.losses(ids[i : i + 1], labels[i : i + 1]).sum() / 4, 1e-2)
        assert c == pytest.approx(own, rel=1e-9, abs=1e-11)


@pytest.mark.parametrize(
    ("kind", "method"),
    [("dense", zo.zo_sgd), ("rank one", zo.zo_sgd), ("flipped", zo.zo_sgd), ("dense", zo.forward_grad)],
)
def test_the_estimates_mean_is_the_gradient_of_the_mean_loss(kind, method):
    torch.manual_seed(3)
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    f = zo.per_example(lambda x, y: (model(x) - y).square().sum(dim=1), x, y)
    opt = method(model, lr=0.0, sampler=KINDS[kind], directions_per_batch=4)
    sums, squares, count = torch.zeros(8).double(), torch.zeros(8).double(), 250
    for _ in range(count):
        estimate = opt.estimate(f)
        g = torch.cat([estimate.of(model, name).flatten() for name in ("weight", "bias")])
        sums += g
        squares += g.square()
        opt.num_steps += 1
    f().backward()
    gradient = torch.cat([model.weight.grad.flatten(), model.bias.grad])
    error = ((squares / count - (sums / count) ** 2) / count).sqrt()
    z = (sums / count - gradient) / error
    assert z.abs().max() < 4
    # The intervals are narrow enough to tell the gradient from nothing.
    assert (gradient / error).abs().max() > 8


def test_micro_batches_and_queries_make_the_estimate_of_the_whole_batch():
    model, (ids, labels) = reader(), batch_of(7)
    whole = zo.per_example(model.losses, ids, labels)
    bounds = [(0, 3), (3, 4), (4, 7)]
    parts = [zo.per_example(model.losses, ids[lo:hi], labels[lo:hi]) for lo, hi in bounds]
    cut = zo.accumulate(parts, weights=[hi - lo for lo, hi in bounds])
    for options in ({}, {"num_queries": 2}, {"difference": zo.forward_difference}):
        opt = zo.zo_sgd(model, lr=0.1, sampler=zo.low_rank(zo.rademacher), directions_per_batch=3, **options)
        one, other = opt.estimate(whole), opt.estimate(cut)
        assert [c for c, _ in one.terms] == pytest.approx([c for c, _ in other.terms], rel=1e-6, abs=1e-9)
        assert one.loss == pytest.approx(other.loss)
        assert one.num_forwards == other.num_forwards == {2: 4}.get(options.get("num_queries"), 2)
    one_sided = zo.zo_sgd(
        model,
        lr=0.1,
        mu=1e-6,
        difference=zo.forward_difference,
        sampler=zo.low_rank(zo.rademacher),
        directions_per_batch=3,
    )
    for (c, _), (d, _) in zip(one_sided.estimate(whole).terms, one.terms, strict=True):
        assert c == pytest.approx(d, rel=0.05, abs=1e-3)


def test_blocks_have_directions_of_their_own():
    model, (ids, labels) = reader(), batch_of(4)
    blocks = zo.blocks_by_size(model, 100)
    opt = zo.zo_sgd(model, lr=0.1, mu=1e-2, blocks=blocks, directions_per_batch=2)
    estimate = opt.estimate(zo.per_example(model.losses, ids, labels))
    assert [u.block for _, u in estimate.terms] == [block for block in blocks for _ in range(2)]
    assert estimate.num_forwards == 2 * len(blocks)
    c, u = estimate.terms[3]
    expected = slope(model, u, lambda: model.losses(ids[2:], labels[2:]).sum() / 4, 1e-2)
    assert c == pytest.approx(expected, rel=1e-9)


METHODS = {
    "zo_sgd": {},
    "zo_sgd_mmt": {"beta": 0.5},
    "zo_adam": {},
    "zo_sgd_sign": {},
    "zo_sgd_cons": {},
    "forward_grad": {},
}


@pytest.mark.parametrize("kind", ["dense", "rank one", "flipped"])
@pytest.mark.parametrize("method", METHODS)
def test_steps_are_those_of_the_plain_sum_and_a_ledger_repeats_them(method, kind, tmp_path):
    model, (ids, labels) = reader(torch.float32), batch_of(6)
    options = {"lr": 0.02, "sampler": KINDS[kind], "seed": 5, **METHODS[method]}
    make = getattr(zo, method)
    opt = make(model, directions_per_batch=3, **options)
    f = zo.per_example(model.losses, ids, labels)
    with LedgerWriter.create(tmp_path / "a.zol", header_of(opt)) as writer:
        record_to(writer, opt)
        if method == "zo_sgd":
            before, estimate = model.mix.weight.detach().clone(), opt.estimate(f)
            total = sum(c * u.of(model, "mix.weight").double() for c, u in estimate.terms)
            opt.apply(estimate)
            assert torch.allclose(model.mix.weight.double(), before.double() - 0.02 * total, atol=1e-7)
        for _ in range(3):
            opt.step(f)
    ledger = read(tmp_path / "a.zol")
    assert {len(record.coefficients) for record in ledger} == {3}
    again = replay(make(reader(torch.float32), directions_per_batch=3, **options), ledger)
    for name, p in again.tuned.model.named_parameters():
        assert torch.equal(p, model.get_parameter(name))
    for name in ("qkv.weight", "norm.bias", "words.weight"):
        x = reader(torch.float32).get_parameter(name).detach().clone().view(-1)
        Trace(make(reader(torch.float32), directions_per_batch=3, **options), list(ledger)).apply(name, x, size=37)
        assert torch.equal(x, model.get_parameter(name).view(-1))


@pytest.mark.parametrize("kind", ["dense", "rank one", "flipped"])
def test_half_precision_probes_tell_the_slopes_of_single_precision(kind):
    wide, (ids, labels) = reader(torch.bfloat16).float(), batch_of(24)
    half = copy.deepcopy(wide).bfloat16()
    slopes = []
    for model in (wide, half):
        opt = zo.zo_sgd(model, lr=0.1, mu=3e-2, sampler=KINDS[kind], directions_per_batch=24)
        slopes.append(torch.tensor([c for c, _ in opt.estimate(zo.per_example(model.losses, ids, labels)).terms]))
    assert torch.nn.functional.cosine_similarity(*slopes, dim=0) > 0.9


def test_examples_cannot_mix():
    """Losses that would look at the other examples see a batch of one."""
    model = nn.Linear(3, 1)
    x = torch.randn(4, 3)
    f = zo.per_example(lambda x: (model(x) - model(x).mean(dim=0, keepdim=True)).square()[:, 0], x)
    assert float(f().detach()) == 0
    estimate = zo.zo_sgd(model, lr=0.1, directions_per_batch=4).estimate(f)
    assert [c for c, _ in estimate.terms] == [0.0] * 4


def refusals():
    model, x = nn.Linear(3, 1), torch.randn(4, 3)
    large = nn.Linear(3000, 3000, bias=False)

    def loss(x):
        return model(x).square()[:, 0]

    def reads_a_number(x):
        return model(x)[:, 0] * (2.0 if float(model(x)) > 0 else 1.0)

    def read_by_a_product(x):
        return (x @ large.weight).square().sum(dim=1)

    k = {"directions_per_batch": 4}
    big, low = torch.randn(8, 3000), zo.low_rank(zo.rademacher)
    yield zo.zo_sgd, model, k, lambda: loss(x).mean(), "zotune.per_example"
    yield zo.zo_sgd, model, k, zo.batched(loss, x), "zotune.per_example"
    yield zo.zo_sgd, model, k, zo.per_example(reads_a_number, x), "without the others"
    yield zo.fzoo, model, k, zo.per_example(loss, x), "differences of losses"
    yield zo.zo_sgd, model, {"directions_per_batch": 0}, zo.per_example(loss, x), 'at least 1, or "auto"'
    yield zo.zo_sgd, model, {"directions_per_batch": "each"}, zo.per_example(loss, x), 'at least 1, or "auto"'
    yield zo.zo_sgd, model, k, zo.per_example(lambda x: model(x), x), "must have shape"
    yield zo.zo_sgd, model, k, zo.per_example(lambda x: loss(x).bfloat16(), x), "too coarse"
    yield zo.zo_sgd, large, k, zo.per_example(lambda x: large(x).sum(1), big), "zotune.low_rank"
    yield zo.zo_sgd, large, {**k, "sampler": low}, zo.per_example(read_by_a_product, big), "Linear layers"


@pytest.mark.parametrize("number", range(10))
def test_what_cannot_be_is_refused(number):
    make, model, options, f, said = list(refusals())[number]
    with pytest.raises((UsageError, ValueError, TypeError), match=said):
        make(model, lr=0.1, **options).step(f)


def test_a_smaller_batch_has_a_direction_an_example():
    model, (ids, labels) = reader(), batch_of(3)
    opt = zo.zo_sgd(model, lr=1e-3, sampler=zo.low_rank(zo.gaussian), directions_per_batch=64)
    assert len(opt.estimate(zo.per_example(model.losses, ids, labels)).terms) == 3
    with pytest.raises(ValueError, match="same examples"):
        zo.per_example(model.losses, ids, labels[:2])


def test_a_hybrid_differentiates_the_same_objective():
    model, (ids, labels) = reader(), batch_of(6)
    f = zo.per_example(model.losses, ids, labels)
    upper = [model.mix.weight]
    lower = [p for p in model.parameters() if p is not model.mix.weight]
    method = zo.zo_sgd(model, lr=0.01, params=lower, sampler=zo.flipped(zo.rademacher), directions_per_batch=6)
    opt = zo.Hybrid(method, torch.optim.SGD(upper, lr=0.5))
    losses = [opt.step(f) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert float(f().detach()) == pytest.approx(float(model.losses(ids, labels).mean().detach()))


def test_a_direction_an_example_reaches_a_loss_in_fewer_passes_than_one_a_batch():
    """Of a quadratic whose examples agree, a step at the best rate leaves 1 - k/(d + k), k directions and d numbers."""
    d, generator = 60, torch.Generator().manual_seed(0)
    targets = torch.randn(d, generator=generator) + 0.1 * torch.randn(32, d, generator=generator)

    def passes(k, rate):
        model = nn.Linear(d, 1, bias=False)
        nn.init.zeros_(model.weight)
        opt = zo.zo_sgd(model, lr=rate, directions_per_batch=k)
        f = zo.per_example(lambda t: (model.weight - t).square().sum(dim=1) / 2, targets)
        first = float(f().detach())
        return next((2 * (step + 1) for step in range(100) if opt.step(f) < 0.2 * first), math.inf)

    many = passes(32, 32 / (d + 32))
    assert many <= 16
    assert 4 * many < min(passes(1, rate / (d + 1)) for rate in (0.7, 1.0, 1.4))


def test_the_estimator_is_named_in_the_header():
    opt = zo.zo_sgd(nn.Linear(3, 1), lr=0.1, directions_per_batch="auto", mu=1e-2)
    assert isinstance(opt.estimator, PerExampleDifference)
    described = header_of(opt).method["estimator"]
    assert (described["mu"], described["directions"]) == (1e-2, "auto")


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("groups", [5, 2])
def test_flipped_products_by_a_matrix_of_each_example_are_each_examples_own(monkeypatch, biased, groups):
    """Long examples, and a layer of more rows than a piece: the same slopes as of single examples at moved weights."""
    taken = []
    inner = weights.each_alone._own_matrices
    monkeypatch.setattr(weights.each_alone, "_own_matrices", lambda self, *a: taken.append(1) or inner(self, *a))
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 300, bias=biased), nn.Tanh(), nn.Linear(300, 3)).double()
    x = torch.randn(5, 60, 6, dtype=torch.float64)
    opt = zo.zo_sgd(model, lr=0.1, mu=1e-3, sampler=zo.flipped(zo.gaussian), directions_per_batch=groups)
    estimate = opt.estimate(zo.per_example(lambda x: model(x).square().mean((1, 2)), x))
    assert len(taken) == 2  # two layers, both points in one pass
    members = [[i for i in range(5) if i * groups // 5 == g] for g in range(groups)]
    for (c, u), own in zip(estimate.terms, members, strict=True):
        ends = []
        for a in (1e-3, -1e-3):
            with torch.no_grad(), zo.perturbed(opt.tuned, u, a):
                ends.append(float(model(x[own]).square().mean((1, 2)).sum() / 5))
        assert c == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=1e-6)
