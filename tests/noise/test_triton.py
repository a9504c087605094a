"""The Triton kernels give the bits of the specification, one launch does an update, and no step compiles anew.

`make test` runs them in Triton's interpreter on CPU tensors (`conftest.py` asks for it), `make test-gpu` as they
are on a GPU. What the interpreter cannot show, which instructions a GPU is given, is read off the compiled code.
"""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import zotune as zo
from zotune import noise
from zotune.ledger import LedgerWriter, read
from zotune.ledger.replay import header_of, record_to, replay
from zotune.noise import GAUSSIAN, RADEMACHER, back_ends, eager, spec
from zotune.noise.back_ends import CAPABILITIES, BackEnd
from zotune.noise.spec import MASK
from zotune.optim.record import StepRecord

pytest.importorskip("triton", reason="Triton is not installed: pip install triton (on Linux)")

import triton

from zotune.noise import launch

ON_GPU = os.environ["TRITON_INTERPRET"] == "0"
if not ON_GPU and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
    pytest.skip(
        f"the interpreter of Triton {triton.__version__} knows no loops with this NumPy", allow_module_level=True
    )
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
SEED, TENSOR = 0x9123456789ABCDEF, 0xFEDCBA98DEADBEEF
STREAMS = {RADEMACHER: spec.rademacher, GAUSSIAN: spec.gaussian}
HALVES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
STARTS = [0, 130, 128 * (2**33 + 5) + 77]
each_start = pytest.mark.parametrize("start", STARTS)
each_stream = pytest.mark.parametrize("stream", STREAMS, ids=["rademacher", "gaussian"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
each_rounding = pytest.mark.parametrize("rounding_seed", [None, 2**63 + 3], ids=["nearest", "random"])


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch):
    """The Triton kernels, whatever the device; NumPy says nothing of infinities, as a GPU does not."""
    monkeypatch.setattr(noise, "back_end", lambda device: BackEnd("triton", launch))
    with np.errstate(all="ignore"):
        yield


@pytest.mark.sample(1)
@each_stream
def test_the_tables_of_a_captured_pass_are_rebound_to_other_directions(stream):
    """As a replay does, the second pass sends the tables of the seeds that were captured."""
    out, one = torch.empty(500, device=DEVICE), 0x3F800000  # the bits of 1.0: a seed is told from a scale by its place
    x = torch.randn(300, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    moved, seeds, scales = torch.empty_like(x), (SEED, one), (1.0, -0.5)
    probed = torch.empty_like(x)

    def captured():
        launch.fill(out, stream, SEED, TENSOR, 7)
        launch.add(moved, x, stream, seeds, scales, TENSOR, 0, SEED)
        launch.add(probed, x, stream, seeds[:1], scales[:1], TENSOR, 0, SEED, noise.PROBE)
        return out.cpu().numpy().copy(), torch.cat([moved, probed]).cpu()

    def alone(fill_seed, add_seeds):
        expected = torch.empty_like(x)
        launch.add(expected, x, stream, add_seeds, scales, TENSOR, 0, SEED)  # an update's rounding keeps its own
        first = (add_seeds[:1], scales[:1], TENSOR, 0, add_seeds[0], noise.PROBE)  # a probe's follows its direction
        other = torch.empty_like(x)
        launch.add(other, x, stream, *first)
        return STREAMS[stream](fill_seed, TENSOR, 7, 507), torch.cat([expected, other]).cpu()

    tables = launch.Rebinding()
    for now in ({}, {SEED: 77, one: 2**64 - 1}, {SEED: one, one: SEED}):
        tables.rebind(now)
        with tables:
            noise_, sum_ = captured()
        wanted = alone(now.get(SEED, SEED), tuple(now.get(s, s) for s in seeds))
        assert np.array_equal(noise_, wanted[0]) and torch.equal(sum_, wanted[1]), now
    assert launch.Rebinding.active is None
    assert np.array_equal(captured()[0], alone(SEED, seeds)[0])


@pytest.fixture
def launches(monkeypatch):
    """What is launched: kernel and arguments of each launch, which is carried out."""
    found, right = [], launch._launch

    def note(kernel, *arguments, **constants):
        found.append((kernel.__name__, arguments, constants))
        right(kernel, *arguments, **constants)

    monkeypatch.setattr(launch, "_launch", note)
    return found


def bits(t):
    return t.detach().cpu().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def numbers(n, dtype=torch.float32):
    return torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype).to(DEVICE)


def plain_add(x, stream, seeds, scales, start, rounding_seed, tensor=TENSOR, numbers=spec.random16):
    """x + Σ a u from the reference in NumPy."""
    us = [STREAMS[stream](s, tensor, start, start + x.numel()) for s in seeds]
    total = np.float32(scales[0]) * us[0]
    for a, u in zip(scales[1:], us[1:], strict=True):
        total = total + np.float32(a) * u
    y = x.float().cpu().numpy() + total
    if rounding_seed is None or x.dtype not in HALVES:
        return torch.from_numpy(y).to(x.dtype)
    random = numbers(rounding_seed, tensor, start, start + x.numel())
    return torch.from_numpy(spec.round_stochastically(y, random, HALVES[x.dtype])).view(x.dtype)


@each_stream
@each_start
@pytest.mark.parametrize("n", [1, 4096, 5003])
def test_fill_equals_the_reference_bit_for_bit(stream, start, n):
    memory = torch.full((n + 10_000,), 7.0, device=DEVICE)
    out = memory[5000 : 5000 + n]
    noise.fill(out, stream, SEED, TENSOR, start)
    assert torch.equal(bits(out), bits(torch.from_numpy(STREAMS[stream](SEED, TENSOR, start, start + n))))
    assert bool((memory[:5000] == 7).all() and (memory[5000 + n :] == 7).all())


def test_every_quadrant_and_exponent_of_the_gaussian_is_as_specified():
    n = 60_000
    expected = spec.gaussian(3, 5, 0, n)
    words = spec.words(3, 5, GAUSSIAN, 0, n // 4)
    assert set((words[:, 1::2] + np.uint32(1 << 29)).ravel() >> np.uint32(30)) == {0, 1, 2, 3}
    assert np.abs(expected).max() > 4
    out = torch.empty(n, device=DEVICE)
    noise.fill(out, GAUSSIAN, 3, 5)
    assert torch.equal(bits(out), bits(torch.from_numpy(expected)))


# One of the thresholds is itself a word of the stream, which is not below it.
@each_start
@pytest.mark.parametrize("threshold", [0, 1, int(spec.words(SEED, TENSOR, MASK, 40, 1)[0, 1]), 2**32])
def test_masks_equal_the_reference_bit_for_bit(start, threshold):
    x = numbers(5003)
    out = x.clone()
    noise.mask(out, threshold / 2**32, SEED, TENSOR, start)
    masked = torch.from_numpy(spec.masked(SEED, TENSOR, start, start + 5003, threshold))
    assert torch.equal(bits(out), bits(torch.where(masked, 0.0, x.cpu())))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_round_to_equals_the_reference_bit_for_bit(dtype):
    limits = torch.finfo(dtype)
    y = torch.randn(30_011, generator=torch.Generator().manual_seed(0))
    y[::3] *= limits.tiny
    y[::7] *= limits.max
    y[::11] = 0.0
    y[::13] = -0.0
    y[5:5000:17] *= 1e-40
    edges = [limits.max, limits.tiny, limits.smallest_normal / 2, 1.0, torch.finfo(torch.float32).max, torch.inf]
    y[100:112] = torch.tensor(edges + [-edge for edge in edges])
    if dtype == torch.float16:
        y[200:1000] = torch.linspace(65503, 65537, 800)
        y[1000:3000] = torch.linspace(-3e-7, 3e-7, 2000)
    random = spec.random16(SEED, TENSOR, STARTS[2], STARTS[2] + len(y))
    expected = torch.from_numpy(spec.round_stochastically(y.numpy(), random, HALVES[dtype])).view(dtype)
    out = torch.empty(len(y), dtype=dtype, device=DEVICE)
    noise.round_to(out, y.to(DEVICE), SEED, TENSOR, STARTS[2])
    assert torch.equal(bits(out), bits(expected))


@pytest.mark.sample(2)
@each_dtype
@each_stream
@each_rounding
@pytest.mark.parametrize(("start", "q"), [(0, 3), (130, 1), (STARTS[2], 2)])
def test_add_equals_the_reference_bit_for_bit(dtype, stream, rounding_seed, start, q):
    x, seeds, scales = numbers(4500, dtype), [2**63 + 1, 5, 2**40][:q], [1e-3, -0.37, 2.5e-5][:q]
    expected = plain_add(x, stream, seeds, scales, start, rounding_seed)
    out = torch.full_like(x, torch.nan)
    noise.add(out, x, stream, seeds, scales, TENSOR, start, rounding_seed)
    assert torch.equal(bits(out), bits(expected))
    probed = torch.full_like(x, torch.nan)
    noise.add(probed, x, stream, seeds, scales, TENSOR, start, seeds[0], noise.PROBE)
    assert torch.equal(bits(probed), bits(plain_add(x, stream, seeds, scales, start, seeds[0], TENSOR, spec.probe16)))
    noise.add(x, x, stream, seeds, scales, TENSOR, start, rounding_seed)
    assert torch.equal(bits(x), bits(expected))


@pytest.mark.sample(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@each_stream
@pytest.mark.parametrize(("start", "scale"), [(0, 0.25), (130, -0.0), (STARTS[2], -3e-4)])
def test_axpy_pair_gives_the_bits_of_two_adds(dtype, stream, start, scale):
    x = numbers(1500, dtype)
    x[::9], x[1::9] = 0.0, -0.0
    for axpy_pair, add in ((noise.axpy_pair, noise.add), (eager.axpy_pair, eager.add)):
        plus, minus, expected = (torch.full_like(x, torch.nan) for _ in range(3))
        axpy_pair(plus, minus, x, stream, SEED, scale, TENSOR, start)
        for out, a in ((plus, scale), (minus, -scale)):
            add(expected, x, stream, [SEED], [a], TENSOR, start, SEED, noise.PROBE)
            assert torch.equal(bits(out), bits(expected))


@each_dtype
@each_rounding
def test_add_keeps_the_sign_of_zero_and_takes_scales_of_any_size(dtype, rounding_seed):
    x = torch.tensor([0.0, -0.0] * 50, dtype=dtype, device=DEVICE)
    for scale in (0.0, -0.0, 1e-44, -1e-39, 3e38):
        out = torch.empty_like(x)
        noise.add(out, x, RADEMACHER, [1], [scale], TENSOR, 0, rounding_seed)
        assert torch.equal(bits(out), bits(plain_add(x, RADEMACHER, [1], [scale], 0, rounding_seed)))


def test_float64_weights_are_moved_in_double_precision():
    x = numbers(1000).double()
    out, expected = torch.empty_like(x), torch.empty_like(x)
    noise.add(out, x, GAUSSIAN, [1, 2], [0.1, 0.7], TENSOR, 3)
    eager.add(expected, x, GAUSSIAN, [1, 2], [0.1, 0.7], TENSOR, 3, None)
    assert torch.equal(bits(out), bits(expected))


@pytest.mark.sample(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@each_stream
@pytest.mark.parametrize("width", [131, 1100])
def test_add_rows_equals_add_on_the_whole_matrix(dtype, stream, width):
    x = numbers(10 * width, dtype).view(10, width)
    whole = torch.empty_like(x)
    noise.add(whole.view(-1), x.view(-1), stream, [SEED], [0.125], TENSOR, 0, SEED, noise.PROBE)
    indices = torch.tensor([9, 0, 7, 7], device=DEVICE)
    for add_rows in (noise.add_rows, eager.add_rows):
        rows = x[indices]
        add_rows(rows, indices, stream, SEED, 0.125, TENSOR)
        assert torch.equal(bits(rows), bits(whole[indices]))


@pytest.mark.sample(2)
@each_dtype
@pytest.mark.parametrize(("stream", "shift"), [(RADEMACHER, 0), (GAUSSIAN, 0), (RADEMACHER, 1)])
@each_rounding
def test_many_tensors_are_moved_in_one_launch_and_nothing_beside_them(
    dtype, stream, rounding_seed, shift, launches, monkeypatch
):
    monkeypatch.setattr(launch, "_CHUNK", 1 << 13)  # so that one of the tensors has several chunks
    sizes, ids = [1, 4096, 17, 9003], [1, 2**64 - 1, 2**31, 2**63 + 77]
    memory = numbers(15_000, dtype)
    before, xs, at = memory.clone(), [], 16
    for size in sizes:
        xs.append(memory[at + shift : at + shift + size])
        at += size + 64 - size % 16
    moved = torch.zeros_like(memory, dtype=torch.bool)
    expected = []
    for x, tensor in zip(xs, ids, strict=True):
        moved[x.storage_offset() : x.storage_offset() + x.numel()] = True
        expected.append(plain_add(x, stream, [3, SEED], [0.1, -0.02], 0, rounding_seed, tensor))
    launch._cached_chunks.cache_clear()
    noise.foreach_axpy_(xs, ids, stream, [3, SEED], [0.1, -0.02], rounding_seed)
    assert [name for name, *_ in launches] == ["foreach_axpy_"]
    assert launches[0][2]["ALIGNED"] == (shift == 0)
    for x, y in zip(xs, expected, strict=True):
        assert torch.equal(bits(x), bits(y))
    assert torch.equal(bits(memory[~moved]), bits(before[~moved]))


class Small(nn.Module):
    """An embedding, a norm's gain, two linear layers with biases: each way in which a probe reads a tensor."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(30, 24)
        self.gain = nn.Parameter(torch.ones(24))
        self.up, self.down = nn.Linear(24, 50), nn.Linear(50, 3)
        self.to(DEVICE, dtype)

    def loss(self):
        h = self.tokens(torch.tensor([[1, 5, 5, 29], [0, 2, 7, 1]], device=self.gain.device)).mean(1) * self.gain
        scores = self.down(torch.tanh(self.up(h)))
        return nn.functional.cross_entropy(scores.float(), torch.tensor([0, 2], device=self.gain.device))


METHODS = {
    "sgd": lambda m: zo.zo_sgd(m, lr=0.05),
    "queries": lambda m: zo.zo_sgd(m, lr=0.05, num_queries=3),
    "gaussian, blocks": lambda m: zo.zo_sgd(m, lr=0.05, sampler=zo.gaussian, blocks=zo.blocks_by_size(m, 3)),
    "sparse": lambda m: zo.zo_sgd(m, lr=0.05, sampler=zo.sparse(zo.rademacher, sparsity=0.5)),
    "decay": lambda m: zo.zo_sgd(m, lr=0.05, weight_decay=0.1),
    "adam": lambda m: zo.zo_adam(m, lr=0.01),
    "master": lambda m: zo.zo_sgd(m, lr=0.05, rounding="master"),
}
each_method = pytest.mark.parametrize("method", METHODS)


def trained(method, dtype, on, num_steps=2, path=None):
    """A model after some steps, which are recorded if there is a path."""
    model = Small(dtype).to(on)
    opt = METHODS[method](model)
    if path is None:
        return model, [opt.step(model.loss) for _ in range(num_steps)]
    with LedgerWriter.create(path, header_of(opt)) as writer:
        record_to(writer, opt)
        return model, [opt.step(model.loss) for _ in range(num_steps)]


def same_weights(a, b):
    return all(torch.equal(bits(p), bits(q)) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# Of the interpreter, steps are the slowest; each kernel alone is compared in every precision above.
MORE_RUNS = [
    *((m, torch.bfloat16) for m in METHODS if m != "sparse"),
    *(("sgd", torch.float32), ("sgd", torch.float16), ("adam", torch.float16)),
]


@pytest.mark.parametrize(
    ("method", "dtype"),
    [("sparse", torch.bfloat16), *(pytest.param(*run, marks=pytest.mark.slow) for run in MORE_RUNS)],
)
def test_a_ledger_of_the_cpus_replays_to_the_same_weights(method, dtype, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(noise, "back_end", back_ends.back_end)
        there, losses = trained(method, dtype, "cpu", path=tmp_path / "run.zol")
    assert len(set(losses)) == 2
    here = Small(dtype)
    replay(METHODS[method](here), read(tmp_path / "run.zol"))
    assert same_weights(here, there)
    assert not same_weights(here, Small(dtype))


@pytest.mark.skipif(ON_GPU, reason="a GPU's forward passes are not a CPU's")
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float32, torch.float16))],
    ids=str,
)
def test_whole_steps_are_those_of_the_cpus_kernels_bit_for_bit(dtype, monkeypatch):
    here, losses = trained("sgd", dtype, "cpu", num_steps=1)
    monkeypatch.setattr(noise, "back_end", back_ends.back_end)
    there, expected = trained("sgd", dtype, "cpu", num_steps=1)
    assert losses == expected
    assert same_weights(here, there)


def test_an_update_is_one_launch_its_table_is_made_once_and_steps_differ_in_data_alone(launches):
    model = Small()
    opt = zo.zo_sgd(model, lr=0.05)
    updates, tables = [], set()
    for _ in range(3):
        estimate = opt.estimate(model.loss)
        launches.clear()
        opt.apply(estimate)
        ((name, (_, _, table, terms, q), constants),) = launches
        updates.append((name, q, terms.shape, constants, terms.tolist()))
        tables.add(id(table))
    assert len(tables) == 1
    assert all(update[:4] == ("foreach_axpy_", 1, (3,), updates[0][3]) for update in updates)
    assert len({tuple(update[4]) for update in updates}) == 3


def test_tensors_of_different_dtypes_or_rates_take_a_launch_each(launches):
    model = Small()
    model.gain.data = model.gain.data.bfloat16()
    groups = [{"params": [model.gain, *model.up.parameters()]}, {"params": [*model.down.parameters()], "lr": 0.1}]
    opt = zo.ZerothOrder(model, lr=0.05, params=groups)
    before = copy.deepcopy(model)
    opt.replay_step(record(opt))
    assert [name for name, *_ in launches] == ["foreach_axpy_"] * 3
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before.get_parameter(name))]
    assert moved == ["gain", "up.weight", "up.bias", "down.weight", "down.bias"]


def record(opt):
    return StepRecord(0, 1.0, tuple(group["lr"] for group in opt.param_groups), (1.0,), (0.5,), 2)


def test_the_arguments_of_a_probe_do_not_depend_on_seed_or_scale(launches):
    model = Small()
    tuned, seen = zo.ParameterSet(model), []
    for seed, mu in ((3, 1e-3), (2**63, -1.0)):
        launches.clear()
        with torch.no_grad(), zo.perturbed(tuned, zo.Direction(seed), mu):
            model.loss()
        plain = [[a for a in arguments if not isinstance(a, torch.Tensor)] for _, arguments, _ in launches]
        seen.append(([name for name, *_ in launches], plain, [constants for *_, constants in launches]))
    assert seen[0] == seen[1]
    assert set(seen[0][0]) == {"add", "add_rows"}


def test_the_launches_are_the_functions_that_the_table_names():
    assert all(callable(getattr(launch, function)) for function in CAPABILITIES["triton"])
    assert CAPABILITIES["triton"].keys() == CAPABILITIES["eager"].keys()


def test_a_device_whose_kernels_are_wrong_or_fail_gets_torch_operations(monkeypatch):
    assert launch.is_usable.__wrapped__(DEVICE)
    right = launch.round_half
    with monkeypatch.context() as patch:
        patch.setattr(launch, "round_half", lambda out, y, *rest: (right(out, y, *rest), out[3:4].neg_()))
        with pytest.warns(UserWarning, match="other bits"):
            assert not launch.is_usable.__wrapped__(DEVICE)
    with monkeypatch.context() as patch:
        patch.setattr(launch, "_launch", lambda *_, **__: 1 / 0)
        with pytest.warns(UserWarning, match=r"cannot be used.*division by zero"):
            assert not launch.is_usable.__wrapped__(DEVICE)


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

import triton

from zotune.noise import launch


class Absent:
    "The driver of a GPU that is not here: kernels are compiled for it, with the arguments that they would be given."
    get_current_device = get_current_stream = staticmethod(lambda *_: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))


compiled, found = [], []
driver.set_active(Absent())
triton.knobs.runtime.jit_cache_hook = lambda **about: compiled.append(about["fn"].name)
jit.JITFunction.__getitem__ = lambda kernel, grid: lambda *a, **k: found.append(kernel.warmup(*a, grid=grid, **k))


def step(seed, scale, tensor):
    half, single = torch.zeros(8192, dtype=torch.float16), torch.zeros(8192)
    launch.add(half, half, 1, [seed], [scale], tensor, 0, None)
    launch.axpy_pair(half, half, half, 1, seed, scale, tensor, 0)
    launch.add_rows(half.view(8, 1024), torch.arange(8), 2, seed, scale, tensor)
    launch.foreach_axpy_([half, half[16:]], [tensor, 1], 2, [seed] * 3, [scale] * 3, seed)
    launch.foreach_axpy_([single, single[16:]], [tensor, 1], 1, [seed], [scale], None)
    launch.fill(single, 1, seed, tensor, 2**33)
    launch.mask(single, 2**31, seed, tensor, 4096)
    launch.round_half(half.bfloat16(), single, seed, tensor, 0)


step(7, 0.5, 2**31 + 16)
first = len(compiled)
for seed, scale, tensor in ((1, 1.0, 1), (0, 0.0, 0), (2**64 - 1, -1e-30, 2**32 - 1), (2**31, 3e30, 16)):
    step(seed, scale, tensor)
print(first, len(compiled))
for kernel in found[:first]:
    print(kernel.asm["ptx"])
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """How many kernels a first step has compiled, how many all five, and what a Hopper GPU would run."""
    path = os.pathsep.join([str(Path(noise.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    process = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env={**os.environ, **environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    counts, _, code = process.stdout.partition("\n")
    return *map(int, counts.split()), code


@pytest.mark.slow
def test_other_seeds_scales_and_tensors_compile_nothing(compiled):
    first, all_five, _ = compiled
    assert first == all_five == 8


@pytest.mark.slow
def test_the_compiled_kernels_round_every_operation_as_ieee_754_wants_it(compiled):
    *_, code = compiled
    operations = set(re.findall(r"\b((?:fma|mad|add|sub|mul|div|sqrt|rcp|cvt|ex2|lg2|sin|cos)[.\w]*\.f32[.\w]*)", code))
    assert {"add.rn.f32", "mul.rn.f32", "div.rn.f32", "sqrt.rn.f32", "cvt.rn.f16.f32"} <= operations
    assert not [op for op in operations if op.startswith(("fma", "mad")) or "approx" in op or "ftz" in op]
    # All is rounded to nearest even, but for the truncation of a share; float16 widens exactly.
    assert not [op for op in operations if ".rn" not in op and op not in ("cvt.f32.f16", "cvt.rzi.u32.f32")]


@pytest.mark.slow
def test_the_compiled_kernels_read_and_write_whole_tiles_in_the_widest_pieces(compiled):
    *_, code = compiled
    kernels = code.split(".visible .entry ")[1:]
    assert len(kernels) == 8
    widest = {kernel.partition("(")[0]: set(re.findall(r"st\.global\S*", kernel)) for kernel in kernels}
    assert all("st.global.v4.b32" in stores for name, stores in widest.items() if name != "add_rows"), widest
