"""Directions of low rank: what they are, that nothing but their two thin factors is made, and that all agree with U."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zotune as zo
from problems import assert_same_bits
from zotune import noise
from zotune.directions.direction import add_terms, sum_terms
from zotune.directions.low_rank import add_products
from zotune.directions.samplers import Factors
from zotune.errors import UsageError
from zotune.estimate.batched_probes import side_by_side
from zotune.estimate.perturb import OffsetAlong, perturbed_by
from zotune.estimate.probes import refused, values_at
from zotune.ledger import LedgerWriter, read
from zotune.ledger.replay import header_of, record_to, replay
from zotune.ledger.stream import Trace
from zotune.model.parameters import ParameterSet, tensor_id
from zotune.noise import spec
from zotune.noise.spec import derive_seed
from zotune.system import limits

BASES = {"rademacher": spec.rademacher, "gaussian": spec.gaussian}
each_base = pytest.mark.parametrize("base", BASES)
each_rank = pytest.mark.parametrize("rank", [1, 2, 5])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
SIGMAS = 4.5


class Net(nn.Module):
    """Tied embeddings, positions, a convolution, a norm, linear layers with and without bias."""

    def __init__(self, vocabulary=23, places=5):
        super().__init__()
        self.embed, self.places = nn.Embedding(vocabulary, 12), nn.Embedding(places, 12)
        self.conv, self.norm = nn.Conv1d(12, 12, 3, padding=1), nn.LayerNorm(12)
        self.up, self.down = nn.Linear(12, 31), nn.Linear(31, 12, bias=False)
        self.head = nn.Linear(12, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        h = self.embed(tokens) + self.places(torch.arange(tokens.shape[1]).expand_as(tokens))
        h = h + self.conv(h.transpose(1, 2)).transpose(1, 2)
        h = h + self.down(torch.tanh(self.up(self.norm(h))))
        return self.head(h)


def network(dtype=torch.float64, **sizes):
    torch.manual_seed(0)
    return Net(**sizes).to(dtype)


TOKENS = torch.randint(0, 23, (6, 5), generator=torch.Generator().manual_seed(1))


def objective(model, most=2):
    def losses(tokens):
        logits = model(tokens)[:, :-1]
        return F.cross_entropy(logits.transpose(1, 2).double(), tokens[:, 1:], reduction="none").mean(dim=1)

    return zo.batched(losses, TOKENS, most=most)


def sampler(base="gaussian", rank=2, interval=1):
    return zo.low_rank(getattr(zo, base), rank, interval=interval)


def factors(u, name, shape, base, rank, right_seed=None):
    """A/√r and B from the specification alone."""
    rows, columns = shape[0], int(np.prod(shape[1:]))
    right_seed = derive_seed(u.seed, 0, 0, 3) if right_seed is None else right_seed
    left = BASES[base](u.seed, tensor_id(name), 0, rows * rank).reshape(rows, rank)
    right = BASES[base](right_seed, tensor_id(name), 0, columns * rank).reshape(columns, rank)
    return left, right


def materialised(model, u, a):
    """A copy of the model at x + a·u, with U stored whole: the product of its factors in double precision."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in moved.named_parameters():
            name = "embed.weight" if name == "head.weight" else name
            p += a * u.of(model, name).to(p.dtype)
    return moved


@each_base
@each_rank
def test_a_direction_is_the_specifications_to_the_bit_and_has_its_rank(base, rank):
    model = network(torch.float32)
    opt = zo.zo_sgd(model, lr=0.1, sampler=sampler(base, rank), num_queries=2)
    for u in opt.directions():
        for name, p in model.named_parameters():
            found = u.of(model, name)
            if p.dim() == 1:
                expected = BASES[base](u.seed, tensor_id(name), 0, p.numel())
            else:
                expected = spec.low_rank(*factors(u, name, p.shape, base, rank)).reshape(p.shape)
                assert torch.linalg.matrix_rank(found.view(len(p), -1).double(), rtol=1e-5) <= rank
            assert np.array_equal(found.numpy(), expected), name


@each_base
@each_rank
def test_elements_of_a_slice_are_those_of_the_whole(base, rank):
    model = nn.Linear(37, 29)
    (u,) = zo.zo_sgd(model, lr=0.1, sampler=sampler(base, rank)).directions()
    whole, rng = u.of(model, "weight").flatten(), np.random.default_rng(0)
    for _ in range(40):
        lo, hi = sorted(rng.integers(0, whole.numel() + 1, 2))
        part = torch.empty(int(hi - lo))
        u.sampler.fill(part, u.seed, tensor_id("weight"), int(lo))
        assert torch.equal(part, whole[lo:hi])


@each_base
@each_rank
@each_dtype
@pytest.mark.parametrize("rounding_seed", [None, 3])
def test_the_kernel_of_an_update_gives_the_bits_of_the_general_mechanism(base, rank, dtype, rounding_seed):
    """Slices within rows, across rows, across tiles; two directions."""
    model = nn.Linear(300, 77, bias=False)
    us = zo.zo_sgd(model, lr=0.1, sampler=sampler(base, rank), num_queries=2).directions()
    terms, whole = [(0.3, us[0]), (-0.7, us[1])], torch.randn(77 * 300).to(dtype)
    for start, size in ((0, 77 * 300), (1234, 5000), (299, 2), (0, 1)):
        x = whole[start : start + size].clone()
        expected, found, wide = torch.empty_like(x), torch.empty_like(x), noise.compute_dtype(dtype)
        total = x.to(wide) + sum_terms(terms, tensor_id("weight"), start, size, wide, x.device)
        noise.round_to(expected, total, rounding_seed, tensor_id("weight"), start)
        add_terms(found, x, terms, tensor_id("weight"), start, rounding_seed)
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.sample(1)
@each_base
@pytest.mark.parametrize("rank", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("n", [2000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_the_covariance_is_the_identity(base, rank, n):
    """Every entry of E[u uᵀ] of a 3 × 2 matrix, within its confidence interval; the mean too."""
    model = nn.Linear(2, 3, bias=False)
    bound = sampler(base, rank).at(ParameterSet(model), 0, 0)
    rows = [zo.Direction(seed, bound).of(model, "weight").flatten() for seed in range(n)]
    u = torch.stack(rows).double()
    products = u[:, :, None] * u[:, None, :]
    error = products.mean(dim=0) - torch.eye(6, dtype=torch.float64)
    assert (error.abs() <= SIGMAS * products.std(dim=0) / n**0.5 + 1e-6).all()
    assert (u.mean(dim=0).abs() <= SIGMAS * u.std(dim=0) / n**0.5).all()


@pytest.mark.parametrize(("base", "rank"), [("rademacher", 1), ("rademacher", 4), ("gaussian", 1), ("gaussian", 2)])
def test_thin_products_are_the_model_with_whole_matrices(base, rank):
    """Linear, embedding and tied head in float64; of Gaussian entries U is rounded to single precision, once each."""
    model = network()
    (u,) = zo.zo_sgd(model, lr=0.1, sampler=sampler(base, rank)).directions()
    with torch.no_grad(), zo.perturbed(model, u, 0.01):
        found = model(TOKENS)
    expected = materialised(model, u, 0.01)(TOKENS)
    assert torch.allclose(found, expected, rtol=0, atol=1e-10 if base == "rademacher" else 1e-7)
    assert (found - model(TOKENS)).abs().max() > 1e-3


def test_thin_products_are_those_of_the_factors_in_double_precision():
    """A Gaussian direction of a linear layer to the last digit, by factors from the specification."""
    model = nn.Linear(40, 30).double()
    (u,) = zo.zo_sgd(model, lr=0.1, sampler=sampler("gaussian", 3)).directions()
    left, right = (torch.from_numpy(f).double() for f in factors(u, "weight", (30, 40), "gaussian", 3))
    x = torch.randn(7, 40, dtype=torch.float64)
    moved = model.weight + 0.01 * (left / 3**0.5) @ right.T
    with torch.no_grad(), zo.perturbed(model, u, 0.01):
        found = model(x)
    expected = F.linear(x, moved, model.bias + 0.01 * u.of(model, "bias").double())
    # 1/√r is that of single precision.
    assert torch.allclose(found, expected, rtol=0, atol=1e-7)
    scaled = (left.float() * np.float32(1 / np.sqrt(3))).double()
    expected = F.linear(x, model.weight + 0.01 * scaled @ right.T, model.bias + 0.01 * u.of(model, "bias").double())
    assert torch.allclose(found, expected, rtol=0, atol=1e-10)


def test_thin_products_are_right_in_every_family_and_precision(tiny, family):
    for dtype, bound in (("float32", 2e-3), ("bfloat16", 0.2)):
        lm = tiny(family, dtype)
        model, tokens = lm.module, torch.randint(5, 40, (4, 9), generator=torch.Generator().manual_seed(2))
        for p in model.parameters():
            p.requires_grad_(True)
        (u,) = zo.zo_sgd(model, lr=0.1, sampler=sampler("rademacher", 1)).directions()
        with torch.no_grad():
            base = model(input_ids=tokens).logits.double()
            with zo.perturbed(model, u, 0.02):
                found = model(input_ids=tokens).logits.double()
            moved = copy.deepcopy(model).double()
            tuned = ParameterSet(model)
            for name, p in moved.named_parameters():
                p += 0.02 * u.of(tuned, name).double()
            expected = moved(input_ids=tokens).logits
        assert (found - expected).norm() <= bound * (expected - base).norm() + 1e-6, dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize(("m", "n"), [(5, 3), (2500, 40), (31, 4200)])
@pytest.mark.parametrize("bias", [True, False])
def test_thin_products_of_shares_are_those_in_double_precision(dtype, rank, m, n, bias):
    """Equal shares with matrices of their own, and with the same one both ways, to the rounding of their precision."""
    g = torch.Generator().manual_seed(0)
    x, out = torch.randn(6, n, generator=g).to(dtype), torch.randn(6, m, generator=g).to(dtype)
    made = [Factors(torch.randn(m, rank, generator=g), torch.randn(n, rank, generator=g)) for _ in range(2)]
    for pair in (made, [made[0], made[0]]):
        factors = [Factors(f.left, f.right, a) for f, a in zip(pair, (0.3, -0.3), strict=True)]
        found, expected = out.clone(), out.double()
        biases = torch.randn(2, m, generator=g).to(dtype) if bias else None
        add_products(found, x, factors, biases)
        for i, f in enumerate(factors):
            if biases is not None:
                expected[3 * i : 3 * i + 3] += biases[i].double()
            expected[3 * i : 3 * i + 3] += f.a * x[3 * i : 3 * i + 3].double() @ (f.left @ f.right.T).double().T
        bound = {torch.bfloat16: 2**-7, torch.float16: 2**-9}.get(dtype, 1e-5) * 0.3 * (n * rank) ** 0.5
        assert (found.double() - expected).abs().max() <= 6 * bound + 2**-7 * (dtype == torch.bfloat16)


@pytest.mark.parametrize("shape", [(1,), (1, 5), (5,)])
@pytest.mark.parametrize("tuned", [True, False])
def test_a_bias_of_any_shape_that_is_broadcast_is_added_to_each_end(shape, tuned):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 4).double())
            self.bias = nn.Parameter(torch.randn(shape).double(), requires_grad=tuned)

        def forward(self, x):
            return F.linear(x, self.weight, self.bias)

    model, x = Layer(), torch.randn(6, 4, dtype=torch.float64)
    for of in (sampler("rademacher", 2), zo.rademacher):
        (u,) = zo.zo_sgd(model, lr=0.1, sampler=of).directions()
        with torch.no_grad():
            ends = side_by_side(ParameterSet(model), [OffsetAlong(u, 0.3), OffsetAlong(u, -0.3)])
            found = ends.evaluate(lambda model=model: model(x))
        for of_end, a in zip(found, (0.3, -0.3), strict=True):
            moved = {t.name: t.parameter + a * u.of(model, t.name) for t in ParameterSet(model)}
            expected = torch.func.functional_call(model, moved, x)
            assert torch.allclose(of_end, expected, rtol=0, atol=1e-7)


def test_no_weight_is_made_or_written(monkeypatch):
    """Neither by one probe nor by many: linear layers and embeddings meet thin factors only."""
    model = network(torch.float32, vocabulary=200, places=200)
    model.conv.requires_grad_(False)
    opt = zo.zo_sgd(model, lr=0.1, sampler=sampler(), num_queries=3)
    before, made = copy.deepcopy(model), []
    for kind, name in ((perturbed_by, "read"), (side_by_side, "_perturbed")):
        monkeypatch.setattr(kind, name, noted(made, getattr(kind, name)))
    for kind in (perturbed_by, side_by_side):
        monkeypatch.setattr(kind, "_piece", None)
    for closure in (lambda: objective(model)(), objective(model, most=6)):
        opt.estimate(closure)
        assert {t.name for t in made} == {"norm.weight", "norm.bias", "up.bias"}
        made.clear()
    assert_same_bits(model, before)


def noted(tensors, method):
    """The method, which then notes whose numbers it was asked for."""

    def with_note(self, tensor, value):
        tensors.append(tensor)
        return method(self, tensor, value)

    return with_note


@pytest.mark.parametrize("most", [2, 4, 6])
@pytest.mark.parametrize("interval", [1, 7])
def test_side_by_side_is_one_by_one(most, interval):
    model = network()
    opt = zo.zo_sgd(model, lr=0.1, sampler=sampler(interval=interval), num_queries=3)
    points = [(a, u) for u in opt.directions() for a in (0.1, -0.1)]
    f = objective(model, most)
    with torch.no_grad():
        together = values_at(f, opt.tuned, points)
        alone = values_at(lambda: f(), opt.tuned, points)
    assert not refused(opt.tuned)
    assert np.allclose([float(v) for v in together], [float(v) for v in alone], rtol=0, atol=1e-12)


def test_many_directions_share_one_pass(monkeypatch):
    """However large the model: 2q copies of the batch, where only thin factors and vectors are a copy's own."""
    model, asked = network(torch.float32), []
    model.conv.requires_grad_(False)
    f = objective(model, most=6)
    monkeypatch.setattr(limits, "CACHED_BYTES", 6 * 4 * (12 * 2 + 31))
    counted = type(f)(lambda copies: asked.append(copies) or f.value(copies), most=6)
    for chosen, expected in ((sampler(), [6]), (zo.rademacher, [2, 2, 2])):
        opt = zo.zo_sgd(model, lr=0.1, sampler=chosen, num_queries=3)
        opt.estimate(counted)
        assert asked == expected
        asked.clear()


@pytest.mark.parametrize("method", ["zo_sgd", "zo_sgd_mmt", "zo_adam", "zo_sgd_cons", "forward_grad"])
def test_steps_are_those_along_the_same_matrices_stored_whole(method):
    model, dense = network(), network()
    makes = zo.METHODS[method]
    opt, again = (
        makes(m, lr=0.001, sampler=s) for m, s in ((model, sampler("rademacher", 4, 2)), (dense, zo.gaussian))
    )

    class Whole:
        """The same directions as a sampler that knows nothing of factors."""

        def __init__(self, bound):
            self.bound = bound

        def fill(self, out, seed, tensor, start):
            self.bound.fill(out, seed, tensor, start)

    for _ in range(4):
        own = opt.directions()
        again.directions = lambda blocks=None, count=None, own=own: [
            zo.Direction(u.seed, Whole(u.sampler), block) for block in blocks or [None] for u in own
        ]
        one, other = opt.step(objective(model)), again.step(objective(dense))
        assert abs(one - other) < 1e-9
    for (name, p), q in zip(model.named_parameters(), dense.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-8), name
    assert not torch.equal(model.up.weight, network().up.weight)


@pytest.mark.parametrize("interval", [1, 3])
def test_the_right_factor_stays_for_an_interval_and_changes_after_it(interval):
    model, base, rank, seed = nn.Linear(20, 10, bias=False), "gaussian", 2, 11
    opt = zo.zo_sgd(model, lr=1e-4, sampler=sampler(base, rank, interval), num_queries=2, seed=seed)
    spaces = []
    for step in range(6):
        for u in opt.directions():
            right_seed = None if interval == 1 else derive_seed(seed, step // interval, 0, 3)
            expected = spec.low_rank(*factors(u, "weight", (10, 20), base, rank, right_seed))
            assert np.array_equal(u.of(model, "weight").numpy(), expected)
            spaces.append(torch.linalg.svd(torch.from_numpy(expected).double()).Vh[:rank])
        opt.step(lambda: model.weight.square().sum())
    stay = [bool(((a.T @ a) - (b.T @ b)).norm() < 1e-5) for a, b in pairwise(spaces)]
    # Two queries a step: pairs within a step, between steps, between intervals.
    assert stay == [interval > 1 and (i + 1) // (2 * interval) == i // (2 * interval) for i in range(11)]


def test_the_steps_of_an_interval_move_a_matrix_by_one_of_the_same_rank():
    model = network()
    opt = zo.zo_sgd(model, lr=0.05, sampler=sampler("gaussian", 2, interval=5), num_queries=2)
    for _ in range(2):
        before = model.up.weight.detach().clone()
        for _ in range(5):
            opt.step(objective(model))
        values = torch.linalg.svdvals(model.up.weight.detach() - before)
        assert values[2] < 1e-5 * values[0] < values[1]


SCHEDULES = {
    "eggroll": sampler("rademacher", 1),
    "lozo": sampler("gaussian", 2, interval=3),
    "sparse": zo.sparse(sampler("gaussian", 2, interval=3), 0.3, interval=2),
}
each_schedule = pytest.mark.parametrize("chosen", SCHEDULES.values(), ids=SCHEDULES.keys())
METHODS = {
    "zo_sgd": zo.zo_sgd,
    "zo_adam, window": lambda model, lr, **options: zo.zo_adam(model, lr, window=4, **options),
}
each_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS.keys())


@pytest.mark.sample(2)
@each_schedule
@each_method
@each_dtype
def test_a_ledger_replays_to_the_bit_whole_and_tensor_by_tensor(chosen, make, dtype, tmp_path):
    model, base = network(dtype), network(dtype)
    options = {"lr": 0.01, "sampler": chosen, "num_queries": 2, "seed": 5}
    opt = make(model, **options)
    with LedgerWriter.create(tmp_path / "a.zol", header_of(opt)) as writer:
        record_to(writer, opt)
        for _ in range(5):  # beyond an interval and the window
            opt.step(objective(model))
    ledger = read(tmp_path / "a.zol")
    again = replay(make(network(dtype), **options), ledger)
    assert_same_bits(again.tuned.model, model)
    shaped = network(dtype).to("meta")
    shaped.head.weight = shaped.embed.weight
    meta = make(shaped, **options)
    weights = {t.name: t.storage() for t in ParameterSet(base)}
    trace = Trace(meta, ledger, lambda t: weights[t.name])
    for t in opt.tuned:
        x = weights[t.name].clone().view(-1)
        trace.apply(t.name, x, size=17)
        assert torch.equal(x.view_as(t.storage()), t.storage()), t.name
    assert not torch.equal(model.up.weight, base.up.weight)


def test_a_ledger_says_rank_and_interval_and_refuses_others(tmp_path):
    made = [zo.zo_sgd(network(), lr=0.1, sampler=s) for s in (sampler("gaussian", 2, 3), sampler("gaussian", 2, 4))]
    assert header_of(made[0]).method["sampler"] == {"base": "gaussian", "rank": 2, "interval": 3}
    with LedgerWriter.create(tmp_path / "a.zol", header_of(made[0])):
        pass
    with pytest.raises(UsageError, match="interval"):
        replay(made[1], read(tmp_path / "a.zol"))


@each_schedule
@each_method
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(chosen, make):
    model = network(torch.bfloat16)
    opt = make(model, lr=0.01, sampler=chosen, seed=5)
    for step in range(8):
        if step == 4:
            other, state = copy.deepcopy(model), copy.deepcopy(opt.state_dict())
        opt.step(objective(model))
    resumed = make(other, lr=0.01, sampler=chosen, seed=5)
    resumed.load_state_dict(state)
    for _ in range(4):
        resumed.step(objective(other))
    assert_same_bits(other, model)


@pytest.mark.parametrize(("interval", "masks"), [(2, 4), (4, 2), (1, 3)])
def test_a_sparse_direction_of_low_rank_is_that_direction_but_for_its_zeros(interval, masks):
    """Right factors and masks are renewed each in their own time."""
    model, base = nn.Linear(40, 30, bias=False), sampler("gaussian", 2, interval)
    opt, plain = (zo.zo_sgd(model, lr=1e-4, sampler=s) for s in (zo.sparse(base, 0.3, interval=masks), base))
    places = []
    for _ in range(8):
        (u,), (whole,) = opt.directions(), plain.directions()
        found, expected = u.of(model, "weight"), whole.of(model, "weight")
        places.append(found != 0)
        assert torch.equal(found[places[-1]], expected[places[-1]])
        assert 0.6 < float(places[-1].double().mean()) < 0.8
        for each in (opt, plain):
            each.step(lambda: model.weight.square().sum())
    same = [torch.equal(a, b) for a, b in pairwise(places)]
    assert same == [(i + 1) % masks != 0 for i in range(7)]


def test_blocks_have_their_own_parts():
    model = network()
    blocks = zo.blocks_by_size(model, 400)
    opt = zo.zo_sgd(model, lr=0.01, sampler=sampler(), blocks=blocks)
    whole = zo.zo_sgd(network(), lr=0.01, sampler=sampler()).directions()[0]
    for u in opt.directions():
        for t in opt.tuned:
            expected = whole.of(model, t.name) if u.moves(t.id) else torch.zeros(t.parameter.shape)
            assert torch.equal(u.of(model, t.name), expected)
    opt.step(lambda: objective(model)())
    assert opt.num_skipped == 0


def test_the_command_line_names_rank_and_interval_and_its_ledger_verifies(short, zotune, tmp_path):
    more = ("--dtype", "bfloat16", "--rank-interval", 3)
    assert zotune(*short(*more, "--rank", 2)).code == 0
    assert read(tmp_path / "out/ledger.zol").header.method["sampler"] == {
        "base": "rademacher",
        "rank": 2,
        "interval": 3,
    }
    assert zotune("ledger", "verify", tmp_path / "out").code == 0
    refused = zotune(*short(*more, out="other"))
    assert refused.code == 2
    assert "needs a zeroth-order method and a rank" in refused.err


@pytest.mark.parametrize(
    "make",
    [
        lambda: zo.low_rank(zo.gaussian, 0),
        lambda: zo.low_rank(zo.gaussian, interval=0),
        lambda: zo.low_rank(zo.sparse(zo.gaussian, 0.5)),
    ],
    ids=["rank", "interval", "base"],
)
def test_what_cannot_be_is_refused(make):
    with pytest.raises(UsageError):
        make()
