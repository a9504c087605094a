"""One ledger, the same bits: whatever makes the noise, in slices of whatever size, on however many threads."""

import hashlib
import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

import reference_kernels
import zotune as zo
from zotune.ledger import LedgerWriter, read
from zotune.ledger.replay import header_of, record_to, replay
from zotune.ledger.stream import Trace
from zotune.noise import back_ends, native
from zotune.noise.back_ends import EAGER, NATIVE, BackEnd
from zotune.system import limits

# What makes the noise; a further kind of kernels is a further line. NumPy's have the functions of torch operations.
BACK_ENDS = {"C": NATIVE, "NumPy": BackEnd("eager", reference_kernels), "torch": EAGER}
KIBI = 1 << 10

SHAPES = ((700, 500), (4099,))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
METHODS = {
    "zo_sgd": lambda m: zo.zo_sgd(m, lr=2e-2, num_queries=2, seed=3),
    "zo_adam": lambda m: zo.zo_adam(m, lr=2e-2, sampler=zo.gaussian, weight_decay=0.1, seed=3),
    "zo_muon": lambda m: zo.zo_muon(m, lr=2e-2, rank=5, interval=3, vector_lr=1e-2, num_queries=2, seed=3),
    "mopi": lambda m: zo.mopi(m, lr=2e-2, rank=6, interval=3, top=3, num_queries=1, weight_decay=0.1, seed=3),
    "lozo": lambda m: zo.lozo(m, lr=2e-2, interval=3, beta=0.9, seed=3),
    "zo_sgd, masks": lambda m: zo.zo_sgd(m, lr=2e-2, sampler=zo.sparse(zo.gaussian, 0.3, group="layer"), seed=3),
}


class Weights(nn.Module):
    """A matrix and a vector, larger than what kernels take at a time."""

    def __init__(self, dtype):
        super().__init__()
        values = [torch.linspace(-1, 1, int(np.prod(shape))).view(shape).to(dtype) for shape in SHAPES]
        self.matrix, self.vector = map(nn.Parameter, values)

    def loss(self):
        return sum((p.float() - 0.3).square().mean() for p in self.parameters())


def digest(module):
    """All numbers of a module in one."""
    found = hashlib.blake2b(digest_size=16)
    for p in module.parameters():
        found.update(p.detach().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def replayed(method, dtype, path):
    """A digest of what the whole model's replay gives."""
    return digest(replay(METHODS[method](Weights(DTYPES[dtype])), read(path)).tuned.model)


def streamed(method, dtype, path, size=None):
    """A digest of what the replay of each tensor alone gives."""
    model = Weights(DTYPES[dtype])
    trace = Trace(METHODS[method](Weights(DTYPES[dtype]).to("meta")), read(path))
    for name, p in model.named_parameters():
        trace.apply(name, p.detach().view(-1), size)
    return digest(model)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """By method and dtype: a ledger's path, and a digest of the run's weights."""
    found = {}
    for method, make in METHODS.items():
        for dtype, torch_dtype in DTYPES.items():
            path = tmp_path_factory.mktemp("runs") / "a.zol"
            model = Weights(torch_dtype)
            opt = make(model)
            with LedgerWriter.create(path, header_of(opt)) as writer:
                record_to(writer, opt)
                for _ in range(5):
                    opt.step(model.loss)
            found[method, dtype] = path, digest(model)
            assert digest(model) != digest(Weights(torch_dtype))
    return found


each_run = pytest.mark.parametrize("method", METHODS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


@each_run
@each_dtype
@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_whatever_makes_the_noise(recorded, method, dtype, back_end, monkeypatch):
    if back_end == "C" and native.library() is None:
        pytest.skip("this installation has no C kernels")
    path, expected = recorded[method, dtype]
    monkeypatch.setattr(back_ends, "cpu", lambda: BACK_ENDS[back_end])
    assert replayed(method, dtype, path) == expected
    assert streamed(method, dtype, path) == expected


@pytest.mark.sample(3)
@each_run
@each_dtype
@pytest.mark.parametrize("size", [16 * KIBI, 60 * KIBI, 1 * KIBI * KIBI, 16 * KIBI * KIBI])
@pytest.mark.parametrize("threads", [1, 2])
def test_whatever_the_size_of_a_slice_and_the_number_of_threads(recorded, method, dtype, size, threads, monkeypatch):
    path, expected = recorded[method, dtype]
    elements = size // DTYPES[dtype].itemsize
    monkeypatch.setattr(limits, "UPDATE_ELEMENTS", elements)
    monkeypatch.setattr(native, "_THREAD_ELEMENTS", 1 << 10)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert replayed(method, dtype, path) == expected
        assert streamed(method, dtype, path, elements) == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_whatever_the_threads_of_a_process_are(recorded, start):
    runs = [[method, dtype, str(path), expected] for (method, dtype), (path, expected) in recorded.items()]
    settings = [("0", "1"), ("0", "2"), ("1", "1"), ("1", "2")]
    processes = [start(__file__, json.dumps(runs), ZOTUNE_NATIVE=c, OMP_NUM_THREADS=omp) for c, omp in settings]
    for process, setting in zip(processes, settings, strict=True):
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        found = json.loads(out)
        assert found["threads"] == int(setting[1])
        assert found["uses_c"] == (setting[0] == "1" and native.library() is not None)
        assert found["different"] == []


if __name__ == "__main__":
    different = [run[:2] for run in json.loads(sys.argv[1]) if {replayed(*run[:3]), streamed(*run[:3])} != {run[3]}]
    uses_c = back_ends.cpu() is NATIVE
    sys.stdout.write(json.dumps({"different": different, "threads": torch.get_num_threads(), "uses_c": uses_c}))
