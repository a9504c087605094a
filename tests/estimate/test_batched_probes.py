"""Probes that share a forward pass give what they give alone, for whatever a model does with its tuned tensors."""

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zotune as zo
from model_families import EXPERTS, FAMILIES, MASKED, PARTLY_SINGLE, SINGLE, tiny_model
from tuning_schemes import EXAMPLES, SCHEMES, moved, prepared
from zotune.directions.direction import Direction
from zotune.directions.samplers import gaussian, rademacher
from zotune.estimate import batched_probes as side_by_side
from zotune.estimate.batched_probes import NotSeparableError
from zotune.estimate.finite_difference import central_difference, forward_difference
from zotune.estimate.objective import Batched, batched
from zotune.estimate.perturb import OffsetAlong
from zotune.estimate.probes import values_at, values_side_by_side
from zotune.llm.config.run import TrainConfig
from zotune.llm.config.step import ModelOptions
from zotune.llm.data.collator import collate
from zotune.llm.models.load import load
from zotune.llm.models.tuned_parameters import prepare_tuning
from zotune.llm.scoring.objectives import CLASSIFICATION, TEACHER_FORCING, mean_loss
from zotune.model.parameters import ParameterSet
from zotune.system import limits


def objectives(lm, examples, objective=CLASSIFICATION, most=2):
    """An objective for probes one by one, and the same for probes side by side."""
    encoded = [objective.reads(e) for e in examples]

    batch = collate(encoded, lm.pad_token_id, lm.device, exact=objective.exact)

    def value(_):
        return mean_loss(objective, lm.score(batch), batch, encoded)

    return lambda: value(1), Batched(value, most)


def encode(lm, examples):
    from zotune.llm.data.tokenization import Encoder

    encoder = Encoder(lm.tokenizer, masked=lm.masked, context=lm.context, max_length=None)
    return [encoder(e) for e in examples]


def doubled(lm):
    lm.module.double()
    return lm


@pytest.mark.sample(7)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("objective", [CLASSIFICATION, TEACHER_FORCING], ids=lambda o: o.name)
def test_every_scheme_on_every_family_has_the_same_values(tiny, family, scheme, objective):
    lm = doubled(moved(prepared(tiny(family), **SCHEMES[scheme]), 0.1))
    examples = encode(lm, EXAMPLES)
    alone, together = objectives(lm, examples, objective, most=6)
    tuned = ParameterSet(lm.module)
    points = [(a, Direction(seed, gaussian)) for seed in (3, 4, 5) for a in (1e-2, -1e-2)]
    with torch.no_grad():
        assert values_side_by_side(together, tuned, points) == pytest.approx(values_at(alone, tuned, points), abs=1e-11)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("sampler", [rademacher, gaussian], ids=str)
@pytest.mark.parametrize("kept", [0, 1 << 12, 16 << 20], ids=["nothing", "vectors", "all"])
@pytest.mark.parametrize("of", ["llama", "opt"])
def test_in_every_precision_the_values_are_the_same_up_to_its_rounding(tiny, monkeypatch, of, kept, dtype, sampler):
    monkeypatch.setattr(limits, "CACHED_BYTES", kept)
    lm = tiny(of, dtype)
    alone, together = objectives(lm, encode(lm, EXAMPLES))
    tuned, points = ParameterSet(lm.module), [(a, Direction(9, sampler)) for a in (0.01, -0.01)]
    tolerance = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 5e-3}[dtype]
    with torch.no_grad():
        assert values_at(together, tuned, points) == pytest.approx(values_at(alone, tuned, points), abs=tolerance)


@pytest.mark.parametrize("scratch", [1 << 7, 1 << 10, 1 << 22])
def test_values_do_not_depend_on_the_pieces_of_a_layer(tiny, monkeypatch, scratch):
    lm = doubled(tiny("opt"))
    alone, together = objectives(lm, encode(lm, EXAMPLES))
    tuned, points = ParameterSet(lm.module), [(0.01, Direction(9)), (-0.01, Direction(9))]
    monkeypatch.setattr(limits, "CACHED_BYTES", 0)
    with torch.no_grad():
        expected = values_at(alone, tuned, points)
        monkeypatch.setattr(limits, "PERTURBED_ELEMENTS", scratch)
        assert values_side_by_side(together, tuned, points) == pytest.approx(expected, abs=1e-12)


class Odd(nn.Module):
    """Uses of weights that are neither a plain linear layer nor a plain look-up."""

    def __init__(self):
        super().__init__()
        self.embedding, self.position = nn.Embedding(11, 6), nn.Embedding(4, 6)
        self.gain, self.weight, self.bias = (nn.Parameter(torch.randn(s)) for s in ((6,), (6, 6), (6,)))
        self.convolution = nn.Conv1d(4, 4, 3, padding=1)
        self.norm, self.frozen = nn.LayerNorm(6), nn.Linear(6, 6).requires_grad_(False)
        self.double()

    def forward(self, ids):
        h = self.embedding(ids) + self.position(torch.arange(4))
        h = self.norm(h) * (1.0 + self.gain)
        h = torch.addmm(self.bias, h.view(-1, 6), self.weight).view(*h.shape)
        h = h + self.convolution(h)
        h = torch.addmm(self.bias, h.view(-1, 6), self.frozen.weight).view(*h.shape)
        h = F.linear(h, self.frozen.weight, self.bias * 2)
        h = h + self.gain[None, None] / (2 + self.bias.square())
        return F.linear(h.mean(1), F.embedding(torch.tensor([1, 5, 7]), self.embedding.weight), self.bias[:3])


IDS = torch.arange(20).view(5, 4) % 11
LABELS = torch.tensor([0, 1, 2, 0, 1])


def test_weights_that_are_reshaped_added_to_and_shared_have_the_same_values():
    torch.manual_seed(0)
    model = Odd()
    together = batched(lambda ids, y: F.cross_entropy(model(ids), y, reduction="none"), IDS, LABELS, most=4)
    tuned, points = ParameterSet(model), [(a, Direction(s)) for s in (1, 2) for a in (0.1, -0.1)]
    with torch.no_grad():
        expected = values_at(lambda: F.cross_entropy(model(IDS), LABELS), tuned, points)
        assert values_side_by_side(together, tuned, points) == pytest.approx(expected, abs=1e-12)


class Mixes(nn.Module):
    """A model whose examples are not a share of the first dimension each, or which looks at the length of its batch."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.one, self.two = nn.Linear(6, 6).double(), nn.Linear(6, 3).double()

    def forward(self, x):
        if self.how == "centred":
            x = x - x.mean(0)
        if self.how == "a constant of the batch's length":
            x = x + torch.arange(len(x), dtype=x.dtype)[:, None, None]
        h = self.one(x.transpose(0, 1)).transpose(0, 1) if self.how == "time first" else self.one(x)
        if self.how == "attends to other examples":
            h = F.scaled_dot_product_attention(*(h.transpose(0, 1)[None],) * 3)[0].transpose(0, 1)
        if self.how.startswith("a mask of its weights"):
            mask = (
                self.one.weight[:4, :4] if self.how.endswith("shared") else self.one.weight[:4, :4].expand(1, 1, 4, 4)
            )
            h = F.scaled_dot_product_attention(*(h[:, None],) * 3, attn_mask=mask)[:, 0]
        if self.how == "ranks":
            h = h.gather(0, h.argsort(dim=0))
        if self.how == "writes in place":
            h[1:] += 0.5 * h[:-1]
        if self.how == "has a vmap of its own":
            h = torch.func.vmap(lambda one: self.one(one).tanh())(h)
        if self.how == "sums over the batch":
            h = h / h.square().sum().sqrt()
        if self.how == "reversed":
            return self.two(h.tanh().mean(1)).flip(0)
        return self.two(h.tanh().mean(1)) / len(x)


MIXES = (
    """
    centred,a constant of the batch's length,time first,attends to other examples,ranks,writes in place
    has a vmap of its own,sums over the batch,reversed,a mask of its weights shared,a mask of its weights
""".strip()
    .replace("\n", ",")
    .split(",")
)


@pytest.mark.parametrize("most", [2, 6])
@pytest.mark.parametrize("how", [how.strip() for how in MIXES])
def test_a_model_that_mixes_its_examples_has_the_same_coefficients_from_shared_passes(how, most):
    torch.manual_seed(0)
    model, x = Mixes(how), torch.randn(6, 4, 6, dtype=torch.float64)
    calls = []

    def losses(x):
        calls.append(len(x))
        h = model(x)
        return F.cross_entropy(h @ h.mT, torch.arange(len(x)), reduction="none")

    tuned, u = ParameterSet(model), [Direction(seed, gaussian) for seed in (3, 4, 5)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = central_difference(batched(losses, x, most=most), tuned, u, mu=1e-3)
    assert calls == [6] * (6 // most)
    expected = central_difference(lambda: losses(x).mean(), ParameterSet(model), u, mu=1e-3)
    assert [c for c, _ in found.terms] == pytest.approx([c for c, _ in expected.terms], rel=1e-7)
    assert min(abs(c) for c, _ in found.terms) > 1e-5


def reads_a_number(model, x):
    h = model(x)
    return h.square().sum(1) * float(model.weight.sum())


def branches(model, x):
    h = model(x)
    return h.square().sum(1) if h.sum() > 0 else h.sum(1)


def chooses_rows(model, x):
    h = model(x)
    return torch.zeros(len(x)).index_add(0, (h[:, 0] > 0).nonzero()[:, 0], h[h[:, 0] > 0].sum(1))


def leaves_torch(model, x):
    return torch.from_numpy(model(x).detach().numpy()).square().sum(1)


def draws(model, x):
    return F.dropout(model(x), 0.5).sum(1)


REFUSED = [reads_a_number, branches, chooses_rows, leaves_torch]


@pytest.mark.parametrize("losses", REFUSED, ids=lambda f: f.__name__)
def test_an_objective_that_needs_the_numbers_of_one_end_is_probed_one_by_one_and_says_so_once(losses):
    torch.manual_seed(0)
    model, x = nn.Linear(6, 3), torch.randn(5, 6)
    opt, u = zo.zo_sgd(model, lr=0.0), [Direction(3)]
    f = batched(partial(losses, model), x)
    with pytest.warns(UserWarning, match=rf"probes of .*{losses.__name__}:\d+ run one after the other, .*\(.+\)"):
        found = central_difference(f, opt.tuned, u, mu=1e-2)
    expected = central_difference(lambda: f(), ParameterSet(model), u, mu=1e-2)
    assert found.terms == expected.terms
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert central_difference(f, opt.tuned, u, mu=1e-2).terms == expected.terms
        # Another objective over the same model is judged by itself.
        two = batched(lambda x: model(x).square().sum(1), x)
        central_difference(two, opt.tuned, u, mu=1e-2)
    assert [losses.__name__ in name for name in opt.state_dict()["zeroth_order"]["one_by_one"]] == [True]


def test_a_resumed_optimizer_knows_which_objectives_share_no_pass():
    """Probes that share a pass round otherwise than probes alone, so the bits of a resumed run depend on it."""
    model, x = nn.Linear(6, 3), torch.randn(5, 6)
    f = batched(partial(branches, model), x)
    first, second = zo.zo_sgd(model, lr=0.0), zo.zo_sgd(model, lr=0.0)
    with pytest.warns(UserWarning, match="one after the other"):
        first.estimate(f)
    second.load_state_dict(first.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.estimate(f)


def test_random_draws_are_refused_for_each_end_would_have_its_own():
    model, x = nn.Linear(6, 3), torch.randn(5, 6)
    with pytest.raises(NotSeparableError, match="random"), torch.no_grad():
        values_side_by_side(
            batched(partial(draws, model), x), ParameterSet(model), [(1.0, Direction(1)), (-1.0, Direction(1))]
        )


def test_an_error_of_the_objectives_own_is_raised_as_it_is():
    model, x = nn.Linear(6, 3), torch.randn(5, 6)

    def losses(x):
        raise IndexError("my own mistake")

    with pytest.warns(UserWarning, match="my own mistake"), pytest.raises(IndexError, match="my own mistake"):
        central_difference(batched(losses, x), ParameterSet(model), [Direction(1)], mu=1e-2)


def test_steps_are_the_same_and_the_trial_passes_without_a_word(tiny):
    runs = []
    for which in (0, 1):
        lm = doubled(tiny("llama"))
        f = objectives(lm, encode(lm, EXAMPLES))[which]
        optimizer = zo.zo_sgd(lm.module, lr=1e-2, num_queries=2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            losses = [optimizer.step(f) for _ in range(3)]
        runs.append((losses, [p.detach().clone() for p in lm.module.parameters()]))
    assert runs[0][0] == pytest.approx(runs[1][0], abs=1e-9)
    for one, other in zip(runs[0][1], runs[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-8)


def test_one_sided_differences_and_blocks_share_passes_too(tiny):
    lm = doubled(tiny("llama"))
    alone, together = objectives(lm, encode(lm, EXAMPLES))
    tuned = ParameterSet(lm.module)
    blocks = zo.blocks_by_layer(lm.module)
    u = [Direction(s).within(b) for b in blocks for s in (1, 2)]
    for estimator in (central_difference, forward_difference):
        one, other = (estimator(f, tuned, u, mu=1e-2) for f in (alone, together))
        assert [c for c, _ in one.terms] == pytest.approx([c for c, _ in other.terms], abs=1e-9)


def test_a_micro_batch_shares_passes_within_itself(tiny):
    lm = doubled(tiny("llama"))
    examples = encode(lm, EXAMPLES)
    parts = [objectives(lm, examples[:1]), objectives(lm, examples[1:])]
    tuned, u = ParameterSet(lm.module), [Direction(5)]
    one, other = (central_difference(zo.accumulate([p[i] for p in parts], [1, 3]), tuned, u, mu=1e-2) for i in (0, 1))
    assert one.terms[0][0] == pytest.approx(other.terms[0][0], rel=1e-9)


def test_a_pass_is_shared_by_as_many_probes_as_are_allowed_and_by_two_of_large_tensors(monkeypatch):
    model, x = nn.Linear(6, 3), torch.randn(4, 6)
    sizes = []

    def losses(x):
        sizes.append(len(x))
        return model(x).square().sum(1)

    tuned, u = ParameterSet(model), [Direction(s) for s in range(4)]
    central_difference(batched(losses, x, most=6), tuned, u, mu=1e-2)
    assert len(sizes) == 2
    sizes.clear()
    monkeypatch.setattr(limits, "CACHED_BYTES", 0)
    central_difference(batched(losses, x, most=6), tuned, u, mu=1e-2)
    assert len(sizes) == 4


def test_a_tensor_that_is_not_read_is_found_side_by_side_too():
    model = nn.ModuleDict({"read": nn.Linear(6, 3), "not": nn.Linear(2, 2)})
    tuned = ParameterSet(model)
    with pytest.raises(zo.UnreadTensorError, match=r"not\.weight"):
        central_difference(batched(lambda x: model["read"](x).sum(1), torch.randn(4, 6)), tuned, [Direction(1)], mu=1)


def test_what_is_wrong_with_a_batched_objective_is_said():
    with pytest.raises(ValueError, match=r"the same examples.*got \[3, 4\]"):
        batched(lambda x, y: x, torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match=r"must have shape \(4,\), got \(\)"):
        batched(lambda x: x.sum(), torch.zeros(4))()
    model = nn.Linear(2, 1).bfloat16()
    with pytest.raises(TypeError, match="too coarse"):
        zo.zo_sgd(model, lr=1).step(batched(lambda x: model(x)[:, 0], torch.ones(3, 2).bfloat16()))


def test_reads_and_noise_are_shared(monkeypatch):
    """The reason for all this: each weight is read and each direction made once for both ends of a probe."""
    made, ends = [], []
    monkeypatch.setattr(side_by_side.noise, "axpy_pair", lambda *a: made.append(a[6]))
    monkeypatch.setattr(side_by_side.noise, "foreach_axpy_", lambda *a: ends.append((a[1], *a[4])))
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3), nn.LayerNorm(3))
    tuned, x = ParameterSet(model), torch.randn(8, 6)
    points = [OffsetAlong(Direction(1), 0.1), OffsetAlong(Direction(1), -0.1)]
    with torch.no_grad():
        side_by_side.side_by_side(tuned, points).evaluate(lambda: model(x))
    assert sorted(made) == sorted(t.id for t in tuned if t.parameter.dim() == 2)
    # Those of all vectors in two calls, one an end.
    vectors = [t.id for t in tuned if t.parameter.dim() == 1]
    assert ends == [(vectors, 0.1), (vectors, -0.1)]


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.bfloat16, torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("most", [1 << 20, 1])
def test_vectors_displaced_together_are_those_displaced_alone(monkeypatch, dtypes, most):
    """To the bit; of several precisions, and where together they are too large."""
    monkeypatch.setattr(limits, "CACHED_BYTES", most)
    model = nn.ModuleList(nn.LayerNorm(7).to(dtype) for dtype in dtypes)
    tuned, u = ParameterSet(model), Direction(1, gaussian)
    ends = [OffsetAlong(u, a) for a in (0.1, -0.1)]

    def vectors():
        return torch.stack([p.float() for layer in model for p in (layer.weight, layer.bias)])

    with torch.no_grad():
        found = side_by_side.side_by_side(tuned, ends).evaluate(vectors)
        for of_end, a in zip(found, (0.1, -0.1), strict=True):
            with zo.perturbed(model, u, a):
                assert torch.equal(of_end, vectors())


@pytest.mark.slow
def test_the_built_in_model_is_tuned_side_by_side():
    lm = load(ModelOptions(model="smollm2-135m", dtype="float32", device="cpu"))
    prepare_tuning(lm, TrainConfig(task="sst2", tuning="lora"))
    moved(lm, 0.01)
    alone, together = objectives(lm, encode(lm, EXAMPLES), most=4)
    tuned = ParameterSet(lm.module)
    u = [Direction(1), Direction(2)]
    one, other = (central_difference(f, tuned, u, mu=1e-2) for f in (alone, together))
    for (c, _), (d, _) in zip(one.terms, other.terms, strict=True):
        assert c == pytest.approx(d, rel=0.02)


# Layers whose gradient is written by hand for autograd alone, which torch cannot follow.
ONE_BY_ONE = {("bloom", None), ("recurrent_gemma", None)} | {(family, "eager") for family in EXPERTS}


@pytest.mark.parametrize("length", [7, pytest.param(12, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", [*((f, None) for f in FAMILIES), *((f, "eager") for f in sorted(EXPERTS))], ids=str)
def test_every_family_has_the_values_of_the_plain_closure_from_one_pass_or_says_why_not(family, length):
    name, experts = family
    model, passes = tiny_model(name, experts), []
    for parameter, p in model.named_parameters():
        # Longformer has weights for global attention, which no token asks for here.
        p.requires_grad_("global" not in parameter)
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, 320, (4, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0

    def losses(ids, mask):
        passes.append(len(ids))
        logits = model(input_ids=ids, attention_mask=mask, **({} if name in MASKED else {"use_cache": False})).logits
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(len(ids), -1).mean(1)

    f, tuned = batched(losses, ids, mask), ParameterSet(model)
    points = [(a, Direction(3, gaussian)) for a in (0.05, -0.05)]
    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.filterwarnings("always", "probes of")
        found = values_at(f, tuned, points)
        assert len(passes) == (3 if family in ONE_BY_ONE else 1), [str(w.message) for w in said]
        expected = values_at(lambda: f(), tuned, points)
    assert len(said) == (family in ONE_BY_ONE)
    tolerance = 1e-5 if name in SINGLE | PARTLY_SINGLE else 1e-10
    assert found == pytest.approx(expected, rel=tolerance)
    assert abs(found[0] - found[1]) > 10 * tolerance * found[0]
