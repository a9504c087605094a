"""What a probe must not do: move a weight, touch a buffer, a mode, a random state, or copy the model.

And what it must not let pass: a tuned tensor that the objective never read.
"""

import numpy as np
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import zotune as zo
from zotune.system import limits

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)


class Everything(nn.Module):
    """An embedding tied to the head, norms with and without state, dropout, a plain parameter, a used-twice layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(13, 8)
        self.fc = nn.Linear(8, 8)
        self.batch_norm = nn.BatchNorm1d(8)
        self.norm = nn.LayerNorm(8)
        self.dropout = nn.Dropout(0.5)
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.batch_norm(self.fc(self.fc(self.embed(ids))).flatten(0, 1))
        return self.head(self.norm(self.dropout(x) * self.gain))


class Allocations(TorchDispatchMode):
    """Bytes of new storages made by torch operations: the largest, and the most alive at once."""

    def __init__(self, *known):
        super().__init__()
        self.largest = self.peak = 0
        self._alive = {t.untyped_storage()._cdata: (StorageWeakRef(t.untyped_storage()), 0) for t in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        for t in tree_leaves(out):
            storage = t.untyped_storage() if isinstance(t, torch.Tensor) else None
            if storage is not None and storage._cdata not in given and storage._cdata not in self._alive:
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out


def bits(t):
    return t.detach().contiguous().reshape(-1).view(torch.uint8).clone()


def snapshot(model):
    return {name: bits(t) for name, t in model.state_dict().items()}


def assert_same(before, after):
    assert before.keys() == after.keys()
    for name, saved in before.items():
        assert torch.equal(saved, after[name]), name


def everything(dtype=torch.float32):
    torch.manual_seed(0)
    model, ids = Everything().to(dtype), torch.tensor([[1, 5, 5], [12, 0, 7]])
    return model, lambda: model(ids).float().square().mean()


@each_dtype
@pytest.mark.parametrize("sampler", [zo.rademacher, zo.gaussian], ids=str)
@pytest.mark.parametrize("num_estimates", [30, pytest.param(260, marks=pytest.mark.slow)])
def test_weights_and_buffers_are_bit_identical_after_many_probes(dtype, sampler, num_estimates):
    model, loss = everything(dtype)
    before = snapshot(model)
    opt = zo.zo_sgd(model, lr=0.1, mu=1e-2, sampler=sampler, num_queries=2)
    for step in range(num_estimates):
        opt.num_steps = step  # other directions each time
        opt.estimate(loss)
        if step % 10 == 0:
            with pytest.raises(ZeroDivisionError):
                opt.estimate(lambda: loss() / (1 // 0))
    assert opt.num_forwards >= 4 * num_estimates
    assert_same(before, snapshot(model))


def test_a_closure_that_writes_into_a_tuned_tensor_does_not_move_it():
    model = nn.Linear(4, 4)
    before = snapshot(model)

    def closure():
        model.weight.mul_(2.0)
        model.weight.data.zero_()
        model.bias[0] = 5.0
        return model(torch.ones(1, 4)).sum()

    zo.zo_sgd(model, lr=0.1).estimate(closure)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("raises", [False, True])
def test_modules_are_in_eval_mode_during_probes_and_as_before_after_them(raises):
    model, loss = everything()
    model.norm.eval()
    flags, seen = [m.training for m in model.modules()], []

    def closure():
        seen.append([m.training for m in model.modules()])
        if raises and len(seen) == 2:
            raise KeyError("on the way")
        return loss()

    for difference in (zo.central_difference, zo.forward_difference):
        seen.clear()
        opt = zo.zo_sgd(model, lr=0.1, difference=difference)
        if raises:
            with pytest.raises(KeyError, match="on the way"):
                opt.estimate(closure)
        else:
            opt.estimate(closure)
        assert len(seen) == 2
        assert not np.any(seen)
        assert [m.training for m in model.modules()] == flags


def test_dropout_is_inactive_so_that_an_estimate_is_repeatable():
    model, loss = everything()
    opt = zo.zo_sgd(model, lr=0.1)
    assert opt.estimate(loss) == opt.estimate(loss)


def test_global_random_states_are_bit_identical_after_a_step():
    model, loss = everything(torch.bfloat16)
    opt = zo.zo_sgd(model, lr=0.1, num_queries=3, sampler=zo.gaussian)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    opt.step(loss)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


def test_no_perturbation_is_left_after_an_exception_however_deep():
    model = nn.Linear(3, 2)
    x, u = torch.ones(1, 3), zo.Direction(1)
    plain = model(x)
    for depth in (1, 2, 3):
        with pytest.raises(ArithmeticError):
            nested(model, u, depth)
        assert torch.equal(model(x), plain)
    with pytest.raises(ArithmeticError):
        zo.zo_sgd(model, lr=0.1).step(lambda: nested(model, u, 2))
    assert torch.equal(model(x), plain)
    assert torch.is_grad_enabled()


def nested(model, u, depth):
    with zo.perturbed(model, u, 1.0):
        if depth == 0:
            raise ArithmeticError
        nested(model, u, depth - 1)


@pytest.mark.parametrize("difference", [zo.central_difference, zo.forward_difference])
def test_no_graph_and_no_gradient_is_made(difference):
    model, loss = everything()
    opt = zo.zo_sgd(model, lr=0.1, difference=difference)

    def closure():
        value = loss()
        assert not value.requires_grad
        return value

    opt.step(closure)
    assert all(p.grad is None for p in model.parameters())


def test_a_tuned_tensor_that_is_not_read_is_an_error_that_names_it():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    opt = zo.zo_sgd(model, lr=0.1)
    with pytest.raises(
        zo.UnreadTensorError, match=r"1 of 3 tuned tensors were not read.*: 1\.weight\..*requires_grad_"
    ):
        opt.step(lambda: model[0](torch.ones(1, 2)).sum())
    with pytest.raises(zo.UnreadTensorError, match=r"3 of 3 .*: 0\.weight, 0\.bias, 1\.weight\."):
        opt.step(lambda: 1.0)
    model[1].requires_grad_(False)
    assert zo.zo_sgd(model, lr=0.1).step(lambda: model[0](torch.ones(1, 2)).sum()) != 0


def test_the_names_of_many_unread_tensors_are_abridged():
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(4)))
    with pytest.raises(zo.UnreadTensorError, match=r"0\.weight, 0\.bias, 1\.weight, 1\.bias, 2\.weight and 3 more"):
        zo.zo_sgd(model, lr=0.1).step(lambda: 1.0)


def test_a_copy_of_the_weights_made_earlier_is_not_a_read():
    model = nn.Linear(2, 2, bias=False)
    copied = model.weight.detach().clone()
    with pytest.raises(zo.UnreadTensorError, match="weight"):
        zo.zo_sgd(model, lr=0.1).step(lambda: copied.sum())


@pytest.mark.parametrize(
    "look",
    [
        lambda w: w.shape,
        lambda w: (w.size(), w.size(0), w.dim(), w.numel(), len(w), w.stride(), w.ndim),
        lambda w: (w.dtype, w.device, w.is_floating_point(), torch.is_floating_point(w), w.element_size()),
        lambda w: (w.data_ptr(), w.requires_grad, w.is_leaf, w.grad, w.is_contiguous(), hash(w), w.nbytes),
    ],
)
def test_looking_at_a_tensors_metadata_is_not_a_read(look):
    model = nn.Linear(2, 2, bias=False)

    def closure():
        look(model.weight)
        return 1.0

    with pytest.raises(zo.UnreadTensorError, match="weight"):
        zo.zo_sgd(model, lr=0.1).step(closure)


def test_looking_at_the_direction_itself_within_a_probe_is_not_a_read():
    model, u = nn.Linear(2, 2, bias=False), zo.Direction(1)
    expected = u.of(model, "weight")
    with pytest.raises(zo.UnreadTensorError, match="weight"), zo.perturbed(model, u, 1.0):
        assert torch.equal(u.of(model, "weight"), expected)


def test_an_exception_of_the_closure_is_not_hidden_by_an_unread_tensor():
    with pytest.raises(LookupError, match="mine"), zo.perturbed(nn.Linear(2, 2), zo.Direction(1), 1.0):
        raise LookupError("mine")


def test_frozen_tensors_and_buffers_are_read_as_they_are():
    model = nn.Sequential(
        nn.Linear(2, 2).requires_grad_(False), nn.BatchNorm1d(2, affine=False), nn.Linear(2, 2)
    ).eval()
    x = torch.ones(3, 2)
    with torch.no_grad():
        expected = model[:2](x)
        with zo.perturbed(model, zo.Direction(1), 0.5):
            assert torch.equal(model[:2](x), expected)
            model[2](x)


@pytest.mark.parametrize("sampler", [zo.rademacher, zo.gaussian], ids=str)
def test_linear_layers_and_embeddings_need_no_more_than_the_scratch(monkeypatch, sampler):
    monkeypatch.setattr(limits, "PERTURBED_ELEMENTS", 2048)
    model = nn.Sequential(nn.Embedding(500, 64), *(nn.Linear(64, 64) for _ in range(20)))
    ids = torch.arange(4)
    with torch.no_grad(), Allocations(*model.parameters()) as made, zo.perturbed(model, zo.Direction(1, sampler), 0.1):
        model(ids)
    assert made.largest <= 4 * 2048
    assert made.peak <= 4 * (2048 + 10 * 4 * 64)  # the scratch and a few activations; the model is 4 * 115,000


def test_other_layers_need_no_more_than_their_largest_tensor():
    model = nn.Sequential(*(nn.Conv1d(32, 32, 9, padding=4) for _ in range(10)))
    x, largest = torch.ones(1, 32, 4), max(p.nbytes for p in model.parameters())
    with torch.no_grad(), Allocations(*model.parameters(), x) as plain:
        model(x)
    with torch.no_grad(), Allocations(*model.parameters(), x) as made, zo.perturbed(model, zo.Direction(1), 0.1):
        model(x)
    assert made.largest <= max(largest, plain.largest)
    assert made.peak <= plain.peak + 1.1 * largest
