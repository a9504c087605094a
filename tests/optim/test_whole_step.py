"""A step is whole or not at all: an error within it leaves weights, state, counters and ledger as they were before."""

import copy
import signal
from functools import partial

import pytest
import torch
from torch import nn

import zotune as zo
from problems import assert_same_bits
from zotune.apply.transforms import momentum
from zotune.ledger import LedgerWriter, read
from zotune.ledger.replay import header_of, record_to, replay
from zotune.optim.zeroth_order import ZerothOrder
from zotune.system import limits

X = torch.linspace(-1, 1, 6).view(2, 3)


def model_of(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Linear(2, 1))


def sequential(make, **options):
    return lambda m: make(m, 0.05, blocks=zo.blocks_by_layer(m), block_order="sequential", **options)


MAKERS = {
    "sgd": lambda m: zo.zo_sgd(m, 0.05, num_queries=2),
    "cons": lambda m: zo.zo_sgd_cons(m, 0.05),
    "window": lambda m: zo.zo_sgd_mmt(m, 0.05, window=3),
    "sequential sgd": sequential(zo.zo_sgd, reuse_prefix=False),
    "sequential adam": sequential(zo.zo_adam),
    "sequential cons": sequential(zo.zo_sgd_cons),
    "sequential window": sequential(zo.zo_adam, window=2),
}


class Failing:
    """The loss of a model, and an error in its n-th evaluation from now on."""

    def __init__(self, model):
        self.model, self.error, self.left = model, None, -1

    def fail_in(self, n, error):
        self.error, self.left = error, n

    def __call__(self):
        if self.left == 0:
            self.left = -1
            raise self.error
        self.left -= 1
        return self.model(X).square().sum()


def everything(opt):
    return copy.deepcopy(opt.state_dict())


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), MemoryError()], ids=repr)
def test_an_error_in_any_evaluation_undoes_the_step(name, error, tmp_path):
    base, model, undisturbed = model_of(), model_of(), model_of()
    opt, other = MAKERS[name](model), MAKERS[name](undisturbed)
    other.step(f := lambda: undisturbed(X).square().sum())
    passes = other.num_forwards
    other.step(f)
    loss = Failing(model)
    with LedgerWriter.create(tmp_path / "run.zol", header_of(opt)) as writer:
        record_to(writer, opt)
        opt.step(loss)
        before, weights = everything(opt), copy.deepcopy(model)
        for n in range(0, passes, 2):
            loss.fail_in(n, error)
            with pytest.raises(type(error)):
                opt.step(loss)
            assert_same_bits(model, weights)
            assert same(everything(opt), before)
            assert writer.num_steps == 1
        opt.step(loss)
    assert_same_bits(model, undisturbed)
    assert opt.num_forwards == other.num_forwards
    replay(MAKERS[name](base), read(tmp_path / "run.zol"))
    assert_same_bits(model, base)


def failing_transform(gradient, state, *, fails):
    if gradient.numel() == 8 and fails[0]:
        raise MemoryError
    return momentum(gradient, state, beta=0.9)


def test_an_error_in_the_middle_of_the_write_puts_written_tensors_back():
    model, fails = model_of(), [False]
    opt = ZerothOrder(model, 0.05, transform=partial(failing_transform, fails=fails), weight_decay=0.1)
    for steps in range(2):  # without a state, and with one
        before, weights = everything(opt), copy.deepcopy(model)
        fails[0] = True
        with pytest.raises(MemoryError):
            opt.step(lambda: model(X).square().sum())
        assert_same_bits(model, weights)
        assert same(everything(opt), before)
        assert opt.num_steps == steps
        fails[0] = False
        opt.step(lambda: model(X).square().sum())


def test_a_step_that_cannot_be_recorded_is_undone():
    model = model_of()
    weights, opt = copy.deepcopy(model), zo.zo_adam(model, 0.1)

    def full(record):
        raise OSError("the disk is full")

    opt.on_step = full
    with pytest.raises(OSError, match="full"):
        opt.step(lambda: model(X).square().sum())
    assert_same_bits(model, weights)
    assert (opt.num_steps, opt.num_forwards, len(opt.state)) == (0, 0, 0)


def interrupting(gradient, state):
    signal.raise_signal(signal.SIGINT)
    return gradient, state


def test_a_signal_during_the_write_waits_until_the_step_is_whole_and_recorded():
    model, records = model_of(), []
    opt = ZerothOrder(model, 0.05, transform=interrupting)
    opt.on_step = records.append
    with pytest.raises(KeyboardInterrupt):
        opt.step(lambda: model(X).square().sum())
    assert opt.num_steps == len(records) == 1
    twin = model_of()
    zo.zo_sgd(twin, 0.05).step(lambda: twin(X).square().sum())
    assert_same_bits(model, twin)


@pytest.mark.parametrize("evaluation", [2, 3, 4])
def test_of_blocks_too_large_to_be_kept_those_that_moved_are_recorded(evaluation, monkeypatch, tmp_path):
    monkeypatch.setattr(limits, "UNDO_BYTES", 40)
    base, model = model_of(), model_of()
    make = MAKERS["sequential sgd"]
    opt, loss = make(model), Failing(model)
    with LedgerWriter.create(tmp_path / "run.zol", header_of(opt)) as writer:
        record_to(writer, opt)
        loss.fail_in(evaluation, RuntimeError("broken"))
        with pytest.raises(RuntimeError, match="broken") as raised:
            opt.step(loss)
        assert "stay updated" in raised.value.__notes__[0]
        assert opt.num_steps == opt.num_skipped == writer.num_steps == 1
        opt.step(loss)
    assert not torch.equal(model[0].weight, base[0].weight)
    replay(make(base), read(tmp_path / "run.zol"))
    assert_same_bits(model, base)


def test_after_a_write_that_could_not_be_undone_the_optimizer_refuses_to_go_on(monkeypatch):
    monkeypatch.setattr(limits, "UNDO_BYTES", 0)
    model, fails = model_of(), [True]
    opt = ZerothOrder(model, 0.05, transform=partial(failing_transform, fails=fails))
    state = everything(opt)
    with pytest.raises(MemoryError) as raised:
        opt.step(lambda: model(X).square().sum())
    assert "could not be undone" in raised.value.__notes__[0]
    fails[0] = False
    with pytest.raises(zo.RunError, match="could not be undone"):
        opt.step(lambda: model(X).square().sum())
    model.load_state_dict(model_of().state_dict())
    opt.load_state_dict(state)
    opt.step(lambda: model(X).square().sum())
    assert opt.num_steps == 1


class FailingSGD(torch.optim.SGD):
    """A first-order optimizer that fails after it has moved its weights."""

    fails = False

    def step(self, closure=None):
        super().step(closure)
        if self.fails:
            raise MemoryError


def test_both_parts_of_a_hybrid_step_are_undone():
    lower, upper = nn.Linear(3, 4), nn.Linear(4, 1)
    first = FailingSGD(upper.parameters(), lr=0.1, momentum=0.9)
    opt = zo.Hybrid(zo.zo_sgd_mmt(lower, 0.05), first)

    def loss():
        return upper(torch.tanh(lower(X))).square().sum()

    opt.step(loss)
    before, weights = copy.deepcopy(opt.state_dict()), [copy.deepcopy(m.state_dict()) for m in (lower, upper)]
    calls = []

    def broken():
        calls.append(0)
        if len(calls) == 2:
            raise RuntimeError
        return loss()

    for error, closure in ((MemoryError, loss), (RuntimeError, broken)):
        FailingSGD.fails = error is MemoryError
        with pytest.raises(error):
            opt.step(closure)
        FailingSGD.fails = False
        assert same(opt.state_dict(), before)
        assert all(same(m.state_dict(), w) for m, w in zip((lower, upper), weights, strict=True))
    assert all(p.grad is None for p in upper.parameters())
