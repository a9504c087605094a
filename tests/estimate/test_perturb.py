"""Within `perturbed(model, u, a)` any model computes what a copy of it with the weights x + a·u computes.

The copy is made by hand: u comes from the noise specification, and so does the rounding of x + a·u to half precision.
The moved weights are written into a deep copy that knows nothing of perturbations.
"""

import copy
import hashlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zotune as zo
from zotune.estimate import perturb
from zotune.model.parameters import ParameterSet
from zotune.noise import spec
from zotune.system import limits

A = 0.0371  # no power of two, so that a·u and x + a·u are rounded


def independent_part(u, names, p):
    """The part of u for a tensor with these names, from the specification."""
    made = getattr(spec, u.sampler.name)(u.seed, id_of(names), 0, p.numel())
    return torch.from_numpy(made).view(p.shape)


def id_of(names):
    """The id of a tensor with these names, from its definition."""
    halves = (hashlib.blake2s(min(names).encode(), digest_size=size).digest()[:4] for size in (4, 8))
    return int.from_bytes(b"".join(halves), "little")


def independently_rounded(y, u, names, dtype):
    """Sums in the dtype of the weights: in half precision rounded by the probe stream of u."""
    if dtype not in (torch.bfloat16, torch.float16):
        return y.to(dtype)
    random = spec.probe16(u.seed, id_of(names), 0, y.numel())
    bits = spec.round_stochastically(y.contiguous().view(-1).numpy(), random, str(dtype).removeprefix("torch."))
    return torch.from_numpy(bits).view(dtype).view(y.shape)


def moved_copy(model, u, a):
    """A deep copy of the model whose tuned weights are x + a·u."""
    twin, names = copy.deepcopy(model), {}
    for name, p in twin.named_parameters(remove_duplicate=False):
        names.setdefault(p, []).append(name)
    for p, called in names.items():
        if p.requires_grad:
            wide = torch.float64 if p.dtype == torch.float64 else torch.float32
            part = independent_part(u, called, p).to(wide) * torch.tensor(a, dtype=wide)
            p.data.copy_(independently_rounded(p.data.to(wide) + part, u, called, p.dtype))
    return twin


class Calls(nn.Module):
    """A module from parts and a function of them."""

    def __init__(self, forward, **parts):
        super().__init__()
        self._function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs):
        return self._function(self, *inputs)


def parameter(*shape):
    return nn.Parameter(torch.randn(shape))


def tied():
    embed, head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
    head.weight = embed.weight
    return Calls(lambda m, ids: m.head(m.embed(ids)), embed=embed, head=head)


def transposed_linear():
    linear = nn.Linear(6, 4)
    linear.weight = nn.Parameter(torch.randn(6, 4).t())
    return linear


def with_running_statistics():
    norm = nn.BatchNorm1d(6)
    norm(torch.randn(20, 6))
    return norm


def by_functional_call():
    inner = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5))
    return Calls(lambda m, x: torch.func.functional_call(m.inner, dict(m.inner.named_parameters()), (x,)), inner=inner)


def attention(m, x):
    return m.attention(x, x, x, need_weights=False)[0]


def outputs_of(m, x):
    return m.rnn(x)[0]


ROWS = (torch.Size((3, 6)),)
SEQUENCES = (torch.Size((2, 5, 8)),)
IDS = torch.tensor([[1, 3, 3], [10, 0, 1]])
# name: (model, inputs: shapes or tensors)
MODELS = {
    "linear": (lambda: nn.Linear(6, 4), ROWS),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), ROWS),
    "linear of one vector": (lambda: nn.Linear(6, 4), (torch.Size((6,)),)),
    "linear with a vector as weight": (lambda: Calls(lambda m, x: F.linear(x, m.w), w=parameter(6)), ROWS),
    "linear, bias alone tuned": (
        lambda: Calls(lambda m, x: F.linear(x, torch.ones(4, 6).to(x), m.b), b=parameter(4)),
        ROWS,
    ),
    "linear fed with a parameter": (
        lambda: Calls(
            lambda m, x: m.fc(m.prompt) + x.sum() * m.prompt.sum(), prompt=parameter(2, 6), fc=nn.Linear(6, 4)
        ),
        ROWS,
    ),
    "embedding, few rows looked up": (lambda: nn.Embedding(11, 6), (IDS,)),
    "embedding, padding": (lambda: nn.Embedding(11, 6, padding_idx=3), (IDS,)),
    "embedding, one id": (lambda: nn.Embedding(11, 6), (torch.tensor(7),)),
    "embedding, int32 ids": (lambda: nn.Embedding(11, 6), (IDS.int(),)),
    "embedding, all rows looked up": (lambda: nn.Embedding(5, 6), (IDS % 5,)),
    "embedding, largest norm": (lambda: nn.Embedding(11, 6, max_norm=1.0), (IDS,)),
    "bag of embeddings": (lambda: nn.EmbeddingBag(11, 6), (IDS,)),
    "tied embedding and head": (tied, (IDS,)),
    "one module used twice": (lambda: Calls(lambda m, x: m.fc(torch.tanh(m.fc(x))), fc=nn.Linear(6, 6)), ROWS),
    "another module's weight": (
        lambda: Calls(lambda m, x: F.linear(m.fc(x), m.fc.weight.t()) @ m.fc.weight.T, fc=nn.Linear(6, 4)),
        ROWS,
    ),
    "plain parameters": (
        lambda: Calls(lambda m, x: x * m.scale / m.shift + m.scale[1], scale=parameter(6), shift=parameter()),
        ROWS,
    ),
    "parameter list": (
        lambda: Calls(lambda m, x: torch.cat([x, *m.list]), list=nn.ParameterList([parameter(2, 6), parameter(1, 6)])),
        ROWS,
    ),
    "parameter dict": (
        lambda: Calls(lambda m, x: torch.einsum("ij,j->i", x, m.dict["a"]), dict=nn.ParameterDict({"a": parameter(6)})),
        ROWS,
    ),
    "detached and data": (lambda: Calls(lambda m, x: x * m.w.detach() + m.w.data, w=parameter(6)), ROWS),
    "layer norm": (lambda: nn.LayerNorm(6), ROWS),
    "convolution in one dimension": (lambda: nn.Conv1d(6, 4, 3), (torch.Size((2, 6, 8)),)),
    "convolution in two dimensions": (lambda: nn.Conv2d(3, 4, 3), (torch.Size((2, 3, 8, 8)),)),
    "batch norm": (with_running_statistics, ROWS),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), ROWS),
    "functional call": (by_functional_call, ROWS),
    "a frozen layer between": (lambda: nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6).requires_grad_(False)), ROWS),
}
# These may take another kernel under a perturbation (a fused one, or that of another memory format).
MODELS_UP_TO_ROUNDING = {
    "transposed weight": (transposed_linear, ROWS),
    "channels last": (
        lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
        (torch.Size((2, 3, 8, 8)),),
    ),
    "transposed embedding": (
        lambda: Calls(lambda m, ids: F.embedding(ids, m.w), w=nn.Parameter(torch.randn(6, 11).t())),
        (IDS,),
    ),
    "attention": (
        lambda: Calls(attention, attention=nn.MultiheadAttention(8, 2, batch_first=True)),
        SEQUENCES,
    ),
    "transformer layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), SEQUENCES),
    "lstm": (lambda: Calls(outputs_of, rnn=nn.LSTM(8, 5, num_layers=2, batch_first=True)), SEQUENCES),
    "gru": (lambda: Calls(outputs_of, rnn=nn.GRU(8, 5, bidirectional=True)), SEQUENCES),
}


def built(make, inputs, dtype):
    torch.manual_seed(0)
    model = make().to(dtype).eval()
    return model, [torch.randn(i).to(dtype) if isinstance(i, torch.Size) else i for i in inputs]


@pytest.mark.parametrize("sampler", [zo.rademacher, zo.gaussian], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_perturbed_forward_equals_that_of_a_moved_copy_bit_for_bit(name, dtype, sampler):
    model, inputs = built(*MODELS[name], dtype)
    u = zo.Direction(41, sampler)
    twin = moved_copy(model, u, A)
    for with_graph in (False, True):
        with torch.set_grad_enabled(with_graph):
            if with_graph and name == "embedding, largest norm":
                continue  # renormalizes its weight in place, which autograd forbids
            with zo.perturbed(model, u, A):
                out = model(*inputs)
            assert torch.equal(out, twin(*inputs))
            assert not torch.equal(out, copy.deepcopy(model)(*inputs))


@pytest.mark.parametrize("sampler", [zo.rademacher, zo.gaussian], ids=str)
@pytest.mark.parametrize("name", MODELS_UP_TO_ROUNDING)
def test_perturbed_forward_equals_that_of_a_moved_copy(name, sampler):
    model, inputs = built(*MODELS_UP_TO_ROUNDING[name], torch.float64)
    u = zo.Direction(41, sampler)
    twin = moved_copy(model, u, A)
    for with_graph in (False, True):
        with torch.set_grad_enabled(with_graph):
            with zo.perturbed(model, u, A):
                out = model(*inputs)
            torch.testing.assert_close(out, twin(*inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [37, 16, 8, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layer_in_pieces_equals_the_whole(monkeypatch, rows, bias):
    monkeypatch.setattr(limits, "PERTURBED_ELEMENTS", 10 * rows + 3)
    model = nn.Linear(10, 37, bias=bias)
    for p in model.parameters():
        p.data = p.data.mul(64).round()  # integers, so that sums are exact in any order
    x = torch.arange(60.0).view(2, 3, 10) - 30
    u = zo.Direction(5)
    with torch.no_grad(), zo.perturbed(model, u, 0.5):
        out = model(x)
    assert torch.equal(out, moved_copy(model, u, 0.5)(x))


@pytest.mark.parametrize("shape", [(37, 10), (1, 3), (100, 7), (8, 400), (50, 399)])
def test_pieces_are_a_matrixs_rows_in_order_as_even_as_can_be(shape):
    """A small rest would be a slow product; none is larger than the scratch, unless a single row is."""
    ranges = perturb.pieces(shape, 400)
    assert [row for lo, hi in ranges for row in range(lo, hi)] == list(range(shape[0]))
    sizes = [hi - lo for lo, hi in ranges]
    at_once = max(1, 400 // shape[1])
    assert max(sizes) <= at_once
    assert len(sizes) == -(-shape[0] // at_once)
    assert sizes[:-1] == [sizes[0]] * (len(sizes) - 1)
    assert sizes[0] - sizes[-1] < len(sizes)
    model = nn.Linear(shape[1], shape[0])
    tuned = ParameterSet(model)
    assert perturb.largest_piece(tuned, frozenset(t.id for t in tuned), 400) == sizes[0] * shape[1]


def test_linear_layer_wider_than_the_scratch_is_still_perturbed(monkeypatch):
    monkeypatch.setattr(limits, "PERTURBED_ELEMENTS", 5)
    model, u = nn.Linear(6, 4), zo.Direction(5)
    x = torch.ones(2, 6)
    with torch.no_grad(), zo.perturbed(model, u, A):
        out = model(x)
    assert torch.equal(out, moved_copy(model, u, A)(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_read_in_slices_of_rows_equals_the_whole_and_each_row_is_made_once(monkeypatch, dtype):
    monkeypatch.setattr(limits, "CACHED_BYTES", 0)  # as a large matrix, which is not made whole and kept
    model, u, made = nn.Linear(10, 37).to(dtype), zo.Direction(5), []
    whole = perturb.OffsetAlong.move

    def move(self, out, x, tensor, start):
        made.append((start, x.numel()))
        whole(self, out, x, tensor, start)

    monkeypatch.setattr(perturb.OffsetAlong, "move", move)
    weight = model.weight
    with torch.no_grad(), zo.perturbed(model, u, A):
        parts = [weight[lo : lo + 8] for lo in range(0, 37, 8)]
        other = [weight[::2], weight[5:2], weight[3], weight[-2:], model.bias[1:]]
    moved = moved_copy(model, u, A)
    assert torch.equal(torch.cat(parts), moved.weight)
    assert made[:5] == [(10 * lo, 10 * min(8, 37 - lo)) for lo in range(0, 37, 8)]
    expected = [moved.weight[::2], moved.weight[5:2], moved.weight[3], moved.weight[-2:], moved.bias[1:]]
    assert all(map(torch.equal, other, expected))


def test_mixed_dtypes_share_the_scratch_without_mixing():
    model = nn.ModuleList([nn.Linear(6, 4).to(d) for d in (torch.float32, torch.bfloat16, torch.float64) * 2])
    x, u = torch.randn(2, 6), zo.Direction(5)
    outs = []
    with torch.no_grad(), zo.perturbed(model, u, A):
        for layer in model:
            outs.append(layer(x.to(layer.weight.dtype)))
    for out, layer in zip(outs, moved_copy(model, u, A), strict=True):
        assert torch.equal(out, layer(x.to(layer.weight.dtype)))


def test_a_graph_through_a_perturbed_model_is_that_of_the_moved_copy():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    u, x = zo.Direction(5), torch.randn(2, 6, requires_grad=True)
    with zo.perturbed(model, u, A):
        out = model(x)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    (expected,) = torch.autograd.grad(moved_copy(model, u, A)(x).sum(), x)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("name", ["linear", "tied embedding and head", "layer norm", "convolution in one dimension"])
def test_perturbed_forward_under_autocast_equals_that_of_a_moved_copy(name):
    model, inputs = built(*MODELS[name], torch.float32)
    u = zo.Direction(41)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(*inputs)  # autocast may remember casts of the unmoved weights
        with zo.perturbed(model, u, A):
            out = model(*inputs)
        assert torch.equal(out, moved_copy(model, u, A)(*inputs))


def test_an_index_out_of_range_is_still_the_embeddings_own_error():
    model = nn.Embedding(11, 6)
    for index in (-1, 11):
        with torch.no_grad(), pytest.raises(IndexError), zo.perturbed(model, zo.Direction(1), A):
            model(torch.tensor([0, index]))


def test_an_empty_lookup_is_empty():
    model = nn.Embedding(11, 6)
    with torch.no_grad(), zo.perturbed(model, zo.Direction(1), A):
        assert model(torch.zeros(0, 3, dtype=torch.long)).shape == (0, 3, 6)


def test_plus_and_minus_are_mirror_images():
    model, u = nn.Linear(6, 4).double(), zo.Direction(3, zo.gaussian)
    x = torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        outs = []
        for a in (A, -A):
            with zo.perturbed(model, u, a):
                outs.append(model(x))
        torch.testing.assert_close(sum(outs) / 2, model(x), rtol=1e-13, atol=1e-13)


def test_parts_of_a_direction_follow_the_specification_under_any_of_a_tensors_names():
    model, u = tied(), zo.Direction(9, zo.gaussian)
    names = ["embed.weight", "head.weight"]
    for name in names:
        assert torch.equal(u.of(model, name), independent_part(u, names, model.embed.weight))


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_direction_refuses_a_seed_out_of_range(seed):
    with pytest.raises(ValueError, match="seed"):
        zo.Direction(seed)
