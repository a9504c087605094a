"""On a real GPU, end to end: `make test-gpu` runs this, with `test_triton.py`; without one it is left out."""

import copy
import os
import warnings

import pytest
import torch
from torch import nn

import zotune as zo
from zotune import noise
from zotune.estimate.cuda_graph import CUDAGraphDifference
from zotune.ledger import LedgerWriter, read
from zotune.ledger.replay import header_of, record_to, replay
from zotune.model.mapped_memory import ScratchFile
from zotune.model.streaming import LayerStream, settle

pytestmark = pytest.mark.skipif(
    os.environ["TRITON_INTERPRET"] != "0" or not torch.cuda.is_available(), reason="needs a GPU: make test-gpu"
)

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


class Small(nn.Module):
    """An embedding, two linear layers with biases, and data that lie on the device beforehand."""

    def __init__(self, device, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.up, self.down = nn.Embedding(300, 64), nn.Linear(64, 200), nn.Linear(200, 5)
        self.register_buffer("x", torch.randint(0, 300, (8, 16)))
        self.register_buffer("y", torch.randint(0, 5, (8,)))
        self.to(device, dtype)

    def losses(self, x, y):
        scores = self.down(torch.tanh(self.up(self.tokens(x).mean(1))))
        return nn.functional.cross_entropy(scores.float(), y, reduction="none")

    def loss(self):
        return self.losses(self.x, self.y).mean()


def bits(model):
    return [p.detach().cpu().view({2: torch.int16, 4: torch.int32}[p.element_size()]) for p in model.parameters()]


def test_a_gpu_gets_the_triton_kernels():
    assert noise.back_end(torch.device("cuda", 0)).name == "triton"


@each_dtype
@pytest.mark.parametrize("sampler", [zo.rademacher, zo.gaussian], ids=str)
def test_a_ledger_written_on_a_gpu_replays_on_a_cpu_to_the_same_bits(dtype, sampler, tmp_path):
    there = Small("cuda", dtype)
    opt = zo.zo_sgd(there, lr=1e-4, sampler=sampler)
    with LedgerWriter.create(tmp_path / "run.zol", header_of(opt)) as writer:
        record_to(writer, opt)
        losses = [opt.step(there.loss) for _ in range(20)]
    assert len(set(losses)) > 15
    here = Small("cpu", dtype)
    replay(zo.zo_sgd(here, lr=1e-4, sampler=sampler), read(tmp_path / "run.zol"))
    assert all(map(torch.equal, bits(here), bits(there)))


@each_dtype
def test_probes_leave_the_weights_as_they_were(dtype):
    model = Small("cuda", dtype)
    before = bits(model)
    zo.zo_sgd(model, lr=0.1).estimate(model.loss)
    assert all(map(torch.equal, before, bits(model)))


@pytest.mark.parametrize("num_queries", [1, 4])
@pytest.mark.parametrize("is_batched", [False, True])
def test_the_host_waits_for_a_step_once(num_queries, is_batched):
    model = Small("cuda")
    loss = zo.batched(model.losses, model.x, model.y) if is_batched else model.loss
    opt = zo.zo_sgd(model, lr=1e-4, num_queries=num_queries)
    opt.step(loss)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            opt.step(loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1, [str(wait.message) for wait in waits]


def test_later_steps_compile_nothing(monkeypatch):
    import triton

    model, compiled = Small("cuda"), []
    opt = zo.zo_sgd(model, lr=0.05)
    opt.step(model.loss)
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **about: compiled.append(about["repr"]))
    for _ in range(20):
        opt.param_groups[0]["lr"] *= 0.9
        opt.step(model.loss)
    assert compiled == []


@each_dtype
def test_a_run_by_the_command_line_finishes_on_a_gpu(dtype, zotune, rows_file, tmp_path):
    precision = str(dtype).removeprefix("torch.")
    options = ["--device", "cuda", "--dtype", precision, "--max-steps", 3, "--num-dev", 3, "--tuning", "full"]
    said = zotune(
        *("train", "--model", "random:llama-tiny", "--train-file", rows_file, "--output-dir", tmp_path / "out"),
        *options,
    )
    assert said.code == 0, said.err
    verified = zotune("ledger", "verify", tmp_path / "out", "--device", "cpu")
    assert verified.code == 0, verified.err


@each_dtype
@pytest.mark.parametrize("sampler", [zo.rademacher, zo.gaussian], ids=str)
def test_a_captured_graph_gives_the_bits_of_the_passes_that_it_repeats(dtype, sampler):
    here, there = Small("cuda", dtype), Small("cuda", dtype)
    probe = CUDAGraphDifference(there.losses, there.x, there.y, mu=1e-2)
    options = {"lr": 1e-3, "sampler": sampler, "num_queries": 2}
    plain = zo.zo_sgd(here, mu=1e-2, **options)
    graphed = zo.ZerothOrder(there, estimator=probe, **options)
    for seed in range(6):
        torch.manual_seed(seed)
        x, y = torch.randint(0, 300, (8, 16), device="cuda"), torch.randint(0, 5, (8,), device="cuda")
        assert graphed.step(probe.on(x, y)) == plain.step(zo.batched(here.losses, x, y))
    assert all(map(torch.equal, bits(here), bits(there)))


def test_an_objective_that_reads_numbers_of_the_gpu_is_refused_as_a_graph():
    model = Small("cuda")

    def losses(x, y):
        found = model.losses(x, y)
        return found * (2.0 if found.sum().item() > 0 else 1.0)

    probe = CUDAGraphDifference(losses, model.x, model.y, mu=1e-2)
    with pytest.raises(zo.UsageError, match="cannot be captured"):
        zo.ZerothOrder(model, lr=1e-3, estimator=probe).step(probe.on(model.x, model.y))


class Block(nn.Module):
    """A layer with a norm, which stays on the device, and matrices, which come to it from a file."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def streamed_and_resident(dtype, folder, width=256, depth=8):
    """A model whose layers lie in a file, and a copy of it on the device."""
    torch.manual_seed(0)
    streamed = nn.Sequential(*(Block(width) for _ in range(depth))).to(dtype)
    resident = copy.deepcopy(streamed).to(DEVICE)
    scratch = ScratchFile(folder)
    for p in streamed.parameters():
        p.data = scratch.copy(p.data) if p.dim() > 1 else p.data
    LayerStream(streamed, scratch, DEVICE)
    return streamed, resident


DEVICE = torch.device("cuda", 0)


def closure_of(model, dtype, width=256):
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    return lambda: model(x).float().square().mean()


@each_dtype
@pytest.mark.parametrize("method", [zo.zo_sgd, zo.zo_adam], ids=lambda method: method.__name__)
def test_layers_that_come_from_a_file_are_tuned_as_those_on_the_gpu(method, dtype, tmp_path):
    streamed, resident = streamed_and_resident(dtype, tmp_path)
    opt, reference, records = method(streamed, lr=1e-3), method(resident, lr=1e-3), []
    opt.on_step = records.append
    for _ in range(10):
        expected = reference.estimate(closure_of(resident, dtype)).loss
        assert opt.step(closure_of(streamed, dtype)) == pytest.approx(
            expected, rel=1e-5 if dtype.itemsize == 4 else 1e-2
        )
        reference.replay_step(records[-1])
    settle(streamed)
    assert all(map(torch.equal, bits(streamed), bits(resident)))


def test_two_layers_that_come_from_a_file_are_on_the_gpu_at_a_time(tmp_path):
    streamed, _ = streamed_and_resident(torch.float32, tmp_path, width=1024)
    opt, closure = zo.zo_sgd(streamed, lr=1e-3), closure_of(streamed, torch.float32, width=1024)
    a_layer = sum(p.nbytes for p in streamed[0].parameters())
    opt.step(closure)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    opt.step(closure)
    # Besides the layer that runs and the next one: the one that is on its way back, or a perturbed piece.
    assert torch.cuda.max_memory_allocated() - before < 4 * a_layer
