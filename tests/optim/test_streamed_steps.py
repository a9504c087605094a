"""An optimizer over streamed layers takes the steps that it takes over layers in memory, to the bit."""

import copy
import math

import pytest
import torch
from torch import nn

import zotune as zo
from zotune.model.mapped_memory import ScratchFile, is_mapped
from zotune.model.streaming import LayerStream, settle, stream_of
from zotune.model.transfer import ToDevice

CPU = torch.device("cpu")
IDS = torch.tensor([[1, 2, 2, 6], [0, 3, 5, 5]])


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 9), nn.Linear(9, width, bias=False)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Network(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        self.embed, self.layers = nn.Embedding(7, 6), nn.ModuleList([Layer(6) for _ in range(depth)])
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.fixture(params=["in place", "copied to a device"])
def pair(request, tmp_path, monkeypatch):
    """A model whose layers are streamed, and the same one in memory."""
    if request.param != "in place":
        monkeypatch.setattr("zotune.model.streaming.InPlace", lambda matrices: ToDevice(matrices, CPU))

    def make(dtype=torch.float32, depth=3):
        torch.manual_seed(0)
        plain = Network(depth).to(dtype)
        streamed = copy.deepcopy(plain)
        scratch = ScratchFile(tmp_path)
        for p in streamed.layers.parameters():
            p.data = scratch.copy(p.data) if p.dim() > 1 else p.data
        LayerStream(streamed, scratch, CPU)
        return streamed, plain

    return make


def steps(make, models, count=5):
    """The losses of some steps of each model, at the same batches."""
    return [take(make(model), model, count) for model in models]


def take(optimizer, model, count):
    def closure():
        return model(IDS).float().log_softmax(-1)[..., 0].mean()

    return [optimizer.step(closure) for _ in range(count)]


def same_weights(one, other):
    settle(one)
    pairs = zip(one.named_parameters(), other.named_parameters(), strict=True)
    return all(name == of and torch.equal(p, q) for (name, p), (of, q) in pairs)


METHODS = {
    "zo_sgd": lambda model: zo.zo_sgd(model, lr=0.05),
    "several queries": lambda model: zo.zo_sgd(model, lr=0.05, num_queries=3, weight_decay=0.1),
    "zo_adam": lambda model: zo.zo_adam(model, lr=0.01, weight_decay=0.1),
    "moments of a window": lambda model: zo.zo_sgd_mmt(model, lr=0.05, window=2),
    "zo_sgd_cons": lambda model: zo.zo_sgd_cons(model, lr=0.05),
    "forward_grad": lambda model: zo.forward_grad(model, lr=0.05),
    "low rank": lambda model: zo.zo_sgd(model, lr=0.05, sampler=zo.low_rank(zo.gaussian, 2)),
    "masks by magnitude": lambda model: zo.zo_sgd(
        model, lr=0.05, sampler=zo.sparse(zo.gaussian, 0.5, mask="magnitude", interval=1)
    ),
    "blocks in sequence": lambda model: zo.zo_sgd(
        model, lr=0.05, blocks=zo.blocks_by_layer(model), block_order="sequential"
    ),
}


OTHERS = zo.METHODS.keys() - METHODS.keys() - {"hizoo", "grzo"}
METHODS |= {name: (lambda model, make=zo.METHODS[name]: make(model, 0.01)) for name in sorted(OTHERS)}


@pytest.mark.parametrize("method", METHODS)
def test_steps_are_those_of_layers_in_memory(pair, method):
    models = pair()
    losses = steps(METHODS[method], models)
    assert losses[0] == losses[1]
    assert same_weights(*models)
    assert len(set(losses[0])) > 1


@pytest.mark.parametrize("rounding", list(zo.Rounding))
def test_half_precision_is_rounded_as_in_memory(pair, rounding):
    models = pair(torch.bfloat16)
    losses = steps(lambda model: zo.zo_adam(model, lr=0.01, mu=0.05, rounding=rounding), models)
    assert losses[0] == losses[1]
    assert same_weights(*models)


@pytest.mark.parametrize("depth", [1, 2])
def test_few_layers_are_streamed_as_many_are(pair, depth):
    models = pair(depth=depth)
    losses = steps(METHODS["zo_adam"], models)
    assert losses[0] == losses[1]
    assert same_weights(*models)


def test_a_layer_is_written_when_it_comes_by_and_not_before(pair):
    streamed, _ = pair()
    opt, before = zo.zo_sgd(streamed, lr=0.05), streamed.layers[1].up.weight.detach().clone()
    take(opt, streamed, 1)
    assert torch.equal(streamed.layers[1].up.weight, before)
    with torch.no_grad():
        streamed(IDS)
    settle(streamed)
    assert not torch.equal(streamed.layers[1].up.weight, before)


def test_a_replay_writes_each_layer_once(pair):
    streamed, plain = pair()
    records = []
    opt = zo.zo_adam(plain, lr=0.01)
    opt.on_step = records.append
    take(opt, plain, 4)
    again = zo.zo_adam(streamed, lr=0.01)
    applied = []
    apply = again._deferred.apply
    again._deferred.apply = lambda layer: (applied.append(layer), apply(layer))
    for record in records:
        again.replay_step(record)
    assert same_weights(streamed, plain)
    assert applied == [0, 1, 2]


def test_an_earlier_noise_version_reaches_streamed_tensors(pair):
    models = pair()
    losses = []
    for model in models:
        opt = zo.zo_adam(model, lr=0.01)
        opt.set_noise_version(1)
        losses.append(take(opt, model, 3))
    assert losses[0] == losses[1]
    assert same_weights(*models)


@pytest.mark.parametrize("fails_in", ["the next pass", "its record"])
def test_a_step_that_fails_leaves_no_trace(pair, fails_in):
    streamed, plain = pair()
    opt, other = zo.zo_adam(streamed, lr=0.01), zo.zo_adam(plain, lr=0.01)

    def fail(*_):
        raise RuntimeError("stopped")

    take(opt, streamed, 2), take(other, plain, 2)
    handle = streamed.layers[2].register_forward_pre_hook(fail) if fails_in == "the next pass" else None
    opt.on_step = None if handle else fail
    with pytest.raises(RuntimeError, match="stopped"):
        take(opt, streamed, 1)
    opt.on_step = None
    if handle:
        handle.remove()
    assert take(opt, streamed, 2) == take(other, plain, 2)
    assert same_weights(streamed, plain)


def test_state_survives_a_state_dict(pair):
    streamed, plain = pair()
    opt, other = zo.zo_adam(streamed, lr=0.01), zo.zo_adam(plain, lr=0.01)
    take(opt, streamed, 2), take(other, plain, 2)
    saved = copy.deepcopy(opt.state_dict())
    assert len(saved["state"]) == len(other.state_dict()["state"])
    again = zo.zo_adam(streamed, lr=0.01)
    again.load_state_dict(saved)
    assert take(again, streamed, 2) == take(other, plain, 2)
    assert same_weights(streamed, plain)


def test_a_second_optimizer_begins_at_the_weights_of_the_first(pair):
    models = pair()
    first = steps(METHODS["zo_adam"], models, 2)
    second = steps(METHODS["zo_sgd"], models, 2)
    assert first[0] == first[1] and second[0] == second[1]
    assert same_weights(*models)


def test_two_optimizers_may_take_turns(pair):
    models = pair()
    losses = []
    for model in models:
        one, other = zo.zo_adam(model, lr=0.01), zo.zo_sgd(model, lr=0.05)
        losses.append([take(opt, model, 1) for opt in (one, other, one, other, one)])
    assert losses[0] == losses[1]
    assert same_weights(*models)


def test_directions_that_depend_on_the_state_of_all_tensors_are_refused(pair):
    streamed, _ = pair()
    with pytest.raises(zo.UsageError, match=r"hizoo .* cannot be streamed"):
        zo.hizoo(streamed, lr=0.01)


def test_a_streamed_model_is_not_copied(pair):
    streamed, _ = pair()
    with pytest.raises(zo.UsageError, match="cannot be copied"):
        copy.deepcopy(streamed)


def test_state_lies_in_the_file(pair):
    streamed, _ = pair()
    opt = zo.zo_adam(streamed, lr=0.01)
    take(opt, streamed, 1)
    settle(streamed)
    matrix, vector = streamed.layers[0].up.weight, streamed.layers[0].up.bias
    assert matrix not in opt.state and vector in opt.state
    moments = [v for v in opt._deferred._states[id(matrix)].values() if isinstance(v, torch.Tensor)]
    assert moments and all(is_mapped(v) for v in moments)


def test_a_skipped_step_leaves_nothing_to_apply(pair):
    streamed, _ = pair()
    opt = zo.zo_adam(streamed, lr=0.01)
    before = [p.detach().clone() for p in streamed.parameters()]
    opt.step(lambda: streamed(IDS).sum() * math.nan)
    settle(streamed)
    assert opt.num_skipped == 1
    assert all(map(torch.equal, before, streamed.parameters()))


def test_autograd_through_a_streamed_layer_is_refused(pair):
    streamed, plain = pair()
    assert stream_of(plain) is None
    with pytest.raises(zo.UsageError, match="autograd ran through a streamed layer"):
        streamed(IDS)
