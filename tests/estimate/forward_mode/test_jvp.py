"""The forward gradient is ∇f·u, moves nothing, keeps nothing, and says where it cannot be had."""

from functools import partial

import accelerate
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad

import zotune as zo
from zotune.directions.blocks import blocks_by_layer, blocks_by_linear
from zotune.estimate.forward_mode import dual_numbers as tangents
from zotune.estimate.forward_mode.jvp import forward_gradient
from zotune.system import limits

DOUBLE = torch.float64
IDS = torch.tensor([[1, 5, 5], [12, 0, 7]])
each_sampler = pytest.mark.parametrize("sampler", [zo.rademacher, zo.gaussian], ids=str)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, DOUBLE], ids=str)


class Network(nn.Module):
    """Tied embedding and head, norms, convolution, attention, a plain parameter, a layer used twice, dropout."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(13, 8)
        self.fc = nn.Linear(8, 8)
        self.layer_norm, self.group_norm, self.rms_norm = nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.RMSNorm(8, 1e-5)
        self.batch_norm = nn.BatchNorm1d(8)
        self.convolution = nn.Conv1d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.dropout = nn.Dropout(0.5)
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.head = nn.Linear(8, 13)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.layer_norm(self.fc(torch.tanh(self.fc(self.embed(ids)))))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.batch_norm(self.group_norm(self.convolution(x.transpose(1, 2)))).transpose(1, 2)
        return self.head(self.rms_norm(self.dropout(x) * self.gain))


def network(dtype=DOUBLE):
    torch.manual_seed(0)
    model = Network()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model.to(dtype)


def loss_of(model, ids=IDS):
    logits = model(ids)
    return F.cross_entropy((logits.double() if logits.dtype == DOUBLE else logits.float()).flatten(0, 1), ids.flatten())


def gradient(model, loss):
    """By back-propagation, in eval mode: a tensor for each name."""
    model.eval()
    tuned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(tuned, torch.autograd.grad(loss(), list(tuned.values())), strict=True))


def product(model, g, u):
    return sum(float((part.double() * u.of(model, name).double()).sum()) for name, part in g.items())


def estimated(model, loss, *directions):
    return forward_gradient(loss, zo.ParameterSet(model), directions)


def coefficient(model, loss, u):
    return estimated(model, loss, u).terms[0][0]


class Terms(nn.Module):
    """A matrix, a vector and a number that are tuned, and a tensor that is not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.w, self.v, self.s = (nn.Parameter(torch.randn(shape, dtype=DOUBLE)) for shape in ((3, 4), (4,), ()))
        self.c = torch.randn(2, 3, 4, dtype=DOUBLE)


def moved_in_place(m):
    x = m.w * 1.0
    y = x + m.c[0]
    x.add_(m.v)
    return y * x


SUMS_AND_PRODUCTS = {
    "both": lambda m: m.w * m.v + m.s,
    "a tensor": lambda m: (m.c * m.w + m.c) * (m.v + m.c),
    "a number": lambda m: 2 * m.w + 1 + (3 + m.v * 0.5),
    "by name": lambda m: torch.add(torch.mul(m.w, m.c), m.c) + torch.add(input=m.w, other=m.v),
    "alpha": lambda m: torch.add(m.w, m.v, alpha=3) + torch.add(m.c, m.s, alpha=2),
    "grown": lambda m: (m.s + m.c) * (m.s * m.c),
    "of other precision": lambda m: m.w.float() * m.v + m.c.float() * m.w + m.w.float() * m.c,
    "moved in place": moved_in_place,
    "written over": lambda m: (m.w + 1.0).mul_(m.v).add_(m.s),
}


@pytest.mark.parametrize("form", SUMS_AND_PRODUCTS)
def test_sums_and_products_have_the_derivative_of_back_propagation(form):
    model, u = Terms(), zo.Direction(3, sampler=zo.gaussian)

    def loss():
        values = SUMS_AND_PRODUCTS[form](model)
        unused = sum(0.0 * p.sum() for p in model.parameters())
        return (values.double() * torch.linspace(0.5, 1.5, values.numel(), dtype=DOUBLE).view_as(values)).sum() + unused

    assert coefficient(model, loss, u) == pytest.approx(product(model, gradient(model, loss), u), rel=1e-6)


@each_sampler
@pytest.mark.parametrize("pieces", [1 << 20, 40, 8])
def test_coefficient_is_the_gradients_product_with_u(monkeypatch, sampler, pieces):
    monkeypatch.setattr(limits, "TANGENT_ELEMENTS", pieces)
    monkeypatch.setattr(limits, "LOGIT_ELEMENTS", pieces)
    model = network()
    g = gradient(model, partial(loss_of, model))
    for seed in range(5):
        u = zo.Direction(seed, sampler)
        assert coefficient(model, partial(loss_of, model), u) == pytest.approx(product(model, g, u), rel=1e-10)


@pytest.mark.parametrize("kind", ["bias", "weight", "norm", "embed", "fc"])
def test_coefficient_over_a_part_of_the_tensors_is_the_product_with_their_gradient(kind):
    model, u = network(), zo.Direction(2, zo.gaussian)
    for name, p in model.named_parameters():
        p.requires_grad_(kind in name)
    g = gradient(model, partial(loss_of, model))
    assert 0 < len(g) < 17
    assert coefficient(model, partial(loss_of, model), u) == pytest.approx(product(model, g, u), rel=1e-10)


@each_sampler
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 0.01), (torch.bfloat16, 0.06)])
def test_coefficient_in_low_precision_is_that_of_the_same_weights_in_double(dtype, tolerance, sampler):
    model, u = network(dtype), zo.Direction(3, sampler)
    exact = network(dtype).double()
    expected = product(exact, gradient(exact, partial(loss_of, exact)), u)
    assert abs(expected) > 0.1
    assert coefficient(model, partial(loss_of, model), u) == pytest.approx(expected, rel=tolerance)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_linear_layer_of_any_shape_has_the_tangent_of_the_formula(data):
    rows, inner, outer, scratch = (data.draw(st.integers(1, 9)) for _ in range(4))
    leading = data.draw(st.sampled_from([(), (rows,), (2, rows), (0,), (rows, 1, 2)]))
    has_bias, dual_input = data.draw(st.booleans()), data.draw(st.booleans())
    layer, u = nn.Linear(inner, outer, bias=has_bias).double(), zo.Direction(data.draw(st.integers(0, 99)), zo.gaussian)
    x, x_tangent = torch.randn(2, *leading, inner, dtype=DOUBLE)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), forward_ad.dual_level():
        patch.setattr(limits, "TANGENT_ELEMENTS", scratch)
        with tangents.DualParameters(zo.ParameterSet(layer), u, 0.25):
            y = layer(forward_ad.make_dual(x, x_tangent) if dual_input else x)
        value, tangent = forward_ad.unpack_dual(y)
    expected = 0.25 * x @ u.of(layer, "weight").double().T
    expected = expected + (x_tangent @ layer.weight.detach().T if dual_input else 0)
    expected = expected + (0.25 * u.of(layer, "bias").double() if has_bias else 0)
    torch.testing.assert_close(value, layer(x).detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tangent, expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_loss_over_a_vocabulary_has_the_same_tangent_in_pieces(data):
    count, vocabulary, scratch = (data.draw(st.integers(1, 12)) for _ in range(3))
    options = {
        "reduction": data.draw(st.sampled_from(["mean", "sum", "none"])),
        "ignore_index": data.draw(st.sampled_from([-100, 0])),
        "label_smoothing": data.draw(st.sampled_from([0.0, 0.3])),
    }
    target = torch.tensor(data.draw(st.lists(st.integers(0, vocabulary - 1), min_size=count, max_size=count)))
    weight = torch.rand(vocabulary, dtype=DOUBLE) if data.draw(st.booleans()) else None
    logits, tangent = torch.randn(2, count, vocabulary, dtype=DOUBLE)
    model = nn.Linear(1, 1).double()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), forward_ad.dual_level():
        patch.setattr(limits, "LOGIT_ELEMENTS", scratch)
        z = forward_ad.make_dual(logits, tangent)
        expected = F.cross_entropy(z, target, weight, **options)
        with tangents.DualParameters(zo.ParameterSet(model), zo.Direction(0)):
            model(torch.ones(1, 1, dtype=DOUBLE))
            found = F.cross_entropy(z, target, weight, **options)
        for a, b in zip(forward_ad.unpack_dual(found), forward_ad.unpack_dual(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.sample(1)
@each_sampler
@pytest.mark.parametrize("num_directions", [300, pytest.param(1500, marks=pytest.mark.slow)])
def test_the_mean_over_directions_is_the_gradient(sampler, num_directions):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.linspace(-1, 1, 15, dtype=DOUBLE).view(5, 3)

    def loss():
        return model(x).square().mean()

    g = gradient(model, loss)
    directions = [zo.Direction(i, sampler) for i in range(num_directions)]
    terms = estimated(model, loss, *directions).terms
    for name, part in g.items():
        draws = np.stack([(len(terms) * c * u.of(model, name)).double().numpy() for c, u in terms])
        error = draws.std(0) / len(draws) ** 0.5
        assert (np.abs(draws.mean(0) - part.numpy()) < 5 * error).all()


def test_an_estimate_averages_over_directions_and_reports_the_loss_at_x():
    model, us = network(), [zo.Direction(i) for i in range(3)]
    found = estimated(model, partial(loss_of, model), *us)
    alone = [coefficient(model, partial(loss_of, model), u) for u in us]
    assert [c for c, _ in found.terms] == pytest.approx([c / 3 for c in alone], rel=1e-12)
    assert [u for _, u in found.terms] == us
    assert found.num_forwards == 3
    assert found.loss == pytest.approx(float(loss_of(model.eval()).detach()), rel=1e-12)


@pytest.mark.sample(1)
@pytest.mark.parametrize("partition", [blocks_by_layer, blocks_by_linear])
def test_directions_within_blocks_are_averaged_block_by_block(partition):
    model = network()
    g, blocks = gradient(model, partial(loss_of, model)), partition(model)
    us = [zo.Direction(seed).within(block) for block in blocks for seed in (3, 4)]
    found = estimated(model, partial(loss_of, model), *us)
    assert found.num_forwards == 2 * len(blocks) > 2
    for c, u in found.terms:
        assert c == pytest.approx(product(model, g, u) / 2, rel=1e-9, abs=1e-13)


def test_micro_batches_have_the_coefficient_of_the_whole_batch():
    model, u, ids = network(), zo.Direction(3), torch.arange(9).view(3, 3)
    whole = estimated(model, partial(loss_of, model, ids), u)
    parts = estimated(
        model, zo.accumulate([partial(loss_of, model, ids[:2]), partial(loss_of, model, ids[2:])], [2, 1]), u
    )
    assert parts.loss == pytest.approx(whole.loss, rel=1e-12)
    assert parts.terms[0][0] == pytest.approx(whole.terms[0][0], rel=1e-12)
    assert parts.num_forwards == 1


@each_dtype
def test_weights_buffers_modes_and_random_states_stay_also_after_an_exception(dtype):
    model, u = network(dtype), zo.Direction(3)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()

    def failing():
        loss_of(model)
        raise KeyError("on the way")

    estimated(model, partial(loss_of, model), u)
    with pytest.raises(KeyError):
        estimated(model, failing, u)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(state, torch.get_rng_state())
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())
    with forward_ad.dual_level():  # the level of the failed pass was left
        assert forward_ad.unpack_dual(model(IDS)).tangent is None


def test_offloaded_weights_have_tangents_where_they_are_used():
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(13, 6), nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 13, bias=False))

    plain, offloaded = build(), accelerate.cpu_offload(build(), execution_device=torch.device("cpu"))
    u = zo.Direction(3)
    found = [estimated(model, partial(loss_of, model), u) for model in (plain, offloaded)]
    assert found[0] == found[1]


def test_a_tuned_tensor_that_is_not_read_is_an_error_that_names_it():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    with pytest.raises(zo.UnreadTensorError, match=r"1 of 3 tuned tensors.*: 1\.weight\."):
        estimated(model, lambda: model[0](torch.ones(1, 2)).sum(), zo.Direction(1))


@pytest.mark.parametrize(
    "spoil", [lambda t: t.item(), lambda t: t.detach(), lambda t: float(t), lambda t: t.detach().numpy().item()]
)
def test_a_loss_that_lost_its_tangent_is_refused_with_a_remedy(spoil):
    model = nn.Linear(2, 1)
    with pytest.raises(zo.UsageError, match=r"no tangent.*Return it as a tensor.*central_difference"):
        estimated(model, lambda: spoil(model(torch.ones(1, 2)).sum()), zo.Direction(1))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


@pytest.mark.parametrize(
    ("operation", "named"), [(lambda x: torch.special.zeta(2 + x.exp(), x.exp()), "zeta"), (Doubled.apply, "Doubled")]
)
def test_an_operation_without_a_derivative_is_named(operation, named):
    model = nn.Linear(2, 1)
    with pytest.raises(zo.UsageError, match=rf"{named}.* no forward-mode derivative.*central_difference"):
        estimated(model, lambda: operation(model(torch.ones(1, 2))).sum(), zo.Direction(1))


def test_other_errors_of_the_closure_pass_as_they_are():
    model = nn.Linear(2, 1)

    def closure():
        raise NotImplementedError("mine")

    with pytest.raises(NotImplementedError, match="mine"):
        estimated(model, closure, zo.Direction(1))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("how", ["wrapped", "in place", "scripted"])
def test_compiled_and_scripted_modules_are_refused(how):
    inner = nn.Linear(2, 1)
    if how == "in place":
        inner.compile()
    elif how == "wrapped":
        inner = torch.compile(inner)
    else:
        inner = torch.jit.script(inner)
    model = nn.Sequential(inner)
    with pytest.raises(zo.UsageError, match=r"'0' is (compiled|scripted).*before torch\.compile"):
        estimated(model, lambda: model(torch.ones(1, 2)).sum(), zo.Direction(1))


def test_a_layer_norm_in_front_of_what_is_tuned_has_no_tangent():
    """Else all that follows would carry zeros along, and a loss that was cut off would have a derivative of zero."""
    model = nn.Sequential(nn.LayerNorm(4).requires_grad_(False), nn.Linear(4, 4))
    with torch.no_grad(), forward_ad.dual_level(), tangents.DualParameters(zo.ParameterSet(model), zo.Direction(0)):
        x = model[0](torch.randn(3, 4))
        assert forward_ad.unpack_dual(x).tangent is None
        model[1](x)
    with pytest.raises(zo.UsageError, match="no tangent"):
        estimated(model, lambda: model[0](model[1](torch.ones(2, 4)).detach()).sum(), zo.Direction(1))


@pytest.mark.parametrize("rows", [(), (1,), (3,)])
def test_the_tangent_of_a_bias_is_not_written_by_the_layer_that_adds_it(rows):
    """One whose tangent is what another computation made, and is read again."""
    layer, x = nn.Linear(4, 4), torch.randn(*rows, 4)
    tangent = torch.randn(4)
    tuned = zo.ParameterSet(layer, [layer.weight])
    with torch.no_grad(), forward_ad.dual_level(), tangents.DualParameters(tuned, zo.Direction(0)):
        bias = forward_ad.make_dual(layer.bias.detach(), tangent)
        before = tangent.clone()
        found = forward_ad.unpack_dual(F.linear(x, layer.weight, bias)).tangent
    assert torch.equal(tangent, before)
    torch.testing.assert_close(found, x @ zo.Direction(0).of(layer, "weight").T + tangent)


def test_under_autocast_a_bias_alone_has_a_tangent_in_the_outputs_precision():
    layer = nn.Linear(4, 4)
    layer.weight.requires_grad_(False)
    reading = tangents.DualParameters(zo.ParameterSet(layer), zo.Direction(0))
    with torch.no_grad(), forward_ad.dual_level(), torch.autocast("cpu", torch.bfloat16), reading:
        y, tangent = forward_ad.unpack_dual(layer(torch.randn(3, 4)))
    assert y.dtype == tangent.dtype == torch.bfloat16


def test_layer_norm_of_a_narrow_input_is_right_in_float16():
    norm, u = nn.LayerNorm(64), zo.Direction(1)
    x = 0.003 * torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    layer = nn.Linear(64, 64)
    model = nn.Sequential(layer, norm)
    layer.weight.data *= 0.1
    layer.bias.data.zero_()
    weights = torch.linspace(-1, 1, 320).view(5, 64)

    def loss(model, x):
        return (model(x).float() * weights).sum()

    half = model.half()
    found = coefficient(half, partial(loss, half, x.half()), u)
    exact = model.float()
    expected = coefficient(exact, partial(loss, exact, x.half().float()), u)
    assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("inside", "outside", "passes"), [(1.0, 1.0, 1), (3e4, 1.0, 2), (0.01, 2.0**-24, 2)])
def test_tangents_outside_the_range_of_float16_are_scaled_into_it(inside, outside, passes):
    model, u = nn.Linear(400, 1, bias=False).half(), zo.Direction(1)
    model.weight.data.mul_(0.001)
    x = inside * u.of(model, "weight").half()
    factor = torch.tensor(outside).half()
    found = estimated(model, lambda: (model(x) * factor).float().sum(), u)
    assert found.terms[0][0] == pytest.approx(400 * float(x.abs().double().mean()) * outside, rel=0.02)
    assert found.num_forwards == passes


def test_a_loss_that_is_not_a_number_is_reported_not_hidden():
    model = nn.Linear(2, 1)
    found = estimated(model, lambda: model(torch.full((1, 2), float("nan"))).sum(), zo.Direction(1))
    assert not found.is_finite


MEMORY = """
import torch
from torch import nn
import zotune as zo
from zotune.system.peak_memory import peak_memory

def estimate(model, ids):
    zo.forward_gradient(lambda: model(ids).square().mean(), zo.ParameterSet(model), [zo.Direction(1)])

ids = torch.arange(16)
estimate(nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8)), ids)  # what torch loads at the first use
model = nn.Sequential(nn.Embedding(40000, 512), *(nn.Linear(512, 512) for _ in range(80)))
before = peak_memory()
estimate(model, ids)
print((peak_memory() - before) / sum(p.nbytes for p in model.parameters()))
"""


def test_neither_u_nor_a_copy_of_the_weights_is_kept(start):
    process = start("-c", MEMORY, OMP_NUM_THREADS="1")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert float(out) < 0.1  # of 166 MB
