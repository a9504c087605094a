"""The noise is the one of its specification, bit for bit, wherever and however it is made.

`noise.spec` is held against the published vectors of Philox and against numbers frozen here, so that
the specification cannot drift; every kernel is then held against the reference.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zotune import noise
from zotune.noise import GAUSSIAN, RADEMACHER, eager, spec

pytestmark = pytest.mark.usefixtures("kernels")

SEED, TENSOR = 0x0123456789ABCDEF, 0x89ABCDEFDEADBEEF
STREAMS = {RADEMACHER: spec.rademacher, GAUSSIAN: spec.gaussian}
HALVES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
STARTS = [0, 1, 5, 127, 1023, 2**32 + 3, 2**41 + 77]
each_stream = pytest.mark.parametrize("stream", STREAMS, ids=["rademacher", "gaussian"])
each_length = pytest.mark.parametrize("n", [1, 7, 770, 1023, 100_003])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
each_half = pytest.mark.parametrize("dtype", HALVES, ids=str)
quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)
u32, u64 = (st.integers(0, 2**bits - 1) for bits in (32, 64))


def bits(t):
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def filled(stream, n, start=0, seed=SEED, tensor=TENSOR):
    out = torch.full((n,), torch.nan)
    noise.fill(out, stream, seed, tensor, start)
    return out


def plain_add(x, stream, seeds, scales, start, rounding_seed):
    """x + Σ a u from the reference in NumPy; x is a tensor of any dtype, and so is the result."""
    kind = np.float64 if x.dtype == torch.float64 else np.float32
    us = [STREAMS[stream](s, TENSOR, start, start + x.numel()).astype(kind) for s in seeds]
    total = kind(scales[0]) * us[0]
    for a, u in zip(scales[1:], us[1:], strict=True):
        total = total + kind(a) * u
    y = (x.double().numpy() if kind is np.float64 else x.float().numpy()) + total
    if rounding_seed is None or x.dtype not in HALVES:
        return torch.from_numpy(y).to(x.dtype)
    random = spec.random16(rounding_seed, TENSOR, start, start + x.numel())
    return torch.from_numpy(spec.round_stochastically(y, random, HALVES[x.dtype])).view(x.dtype)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    words = spec.philox(tuple(np.array([c], np.uint32) for c in counter), key)
    assert tuple(int(w[0]) for w in words) == expected


def test_counter_and_key_are_where_the_specification_says():
    zero = np.zeros(1, np.uint32)
    block = 2**33 + 5
    counter = [zero + np.uint32(c) for c in (block & 0xFFFFFFFF, TENSOR >> 32, TENSOR & 0xFFFFFFFF, GAUSSIAN + 512)]
    expected = spec.philox(tuple(counter), (SEED & 0xFFFFFFFF, SEED >> 32))
    assert spec.words(SEED, TENSOR, GAUSSIAN, block, 1).tolist() == [[int(w[0]) for w in expected]]


def test_golden_values_of_specification_version_2():
    assert noise.NOISE_VERSION == 2
    start = 2**40 + 30
    signs = "".join("-+"[int(s > 0)] for s in spec.rademacher(SEED, TENSOR, start, start + 40))
    assert signs == "+-+-+----+---+-++++-+---++++--------++--"
    normals = spec.gaussian(SEED, TENSOR, start, start + 6).view(np.uint32)
    assert normals.tolist() == [0xBF18BDF1, 0xBFA6D7DE, 0x3EAA2BB9, 0x3E8E4A09, 0xBFB1FA14, 0x3F36DC9D]
    assert spec.random16(SEED, TENSOR, start, start + 6).tolist() == [55892, 2783, 41511, 39764, 39255, 15692]
    assert spec.probe16(SEED, TENSOR, start, start + 6).tolist() == [45423, 1420, 27174, 33404, 39634, 45864]
    assert spec.masked(SEED, TENSOR, start, start + 12, 1 << 31).tolist() == [False] * 4 + [True] * 6 + [False] * 2
    assert noise.derive_seed(SEED, 3, 2, 1) == 0x31FB8CCC8466087C


def test_ids_of_32_bits_give_the_golden_values_of_version_1():
    """What version 1 gave for this id and place, in the last blocks that it had in common with version 2."""
    tensor, start = 0xDEADBEEF, 2**33 + 30
    signs = "".join("-+"[int(s > 0)] for s in spec.rademacher(SEED, tensor, start, start + 40))
    assert signs == "+-+-++--+--++--+--+++--++--+++++-+---++-"
    normals = spec.gaussian(SEED, tensor, start, start + 6).view(np.uint32)
    assert normals.tolist() == [0xBE44C656, 0x3FA9378C, 0xBED8D16F, 0xBFF9E923, 0x3F3443BD, 0x3F43070B]
    assert spec.random16(SEED, tensor, start, start + 6).tolist() == [1447, 48292, 47654, 21344, 60471, 2624]
    masked = spec.masked(SEED, tensor, start, start + 12, 1 << 31)
    assert masked.astype(int).tolist() == [0, 1, 1, 0, 0, 0, 1, 1, 1, 0, 1, 1]


def test_the_two_versions_of_an_id_share_the_lower_half_and_large_models_have_no_two_alike():
    names = [f"model.layers.{i}.mlp.experts.{j}.{k}" for i in range(94) for j in range(128) for k in ("up", "down")]
    ids = [spec.tensor_id(name) for name in names]
    assert len(set(ids)) == len(ids)
    assert all(spec.tensor_id(name, version=1) == i & 0xFFFFFFFF for name, i in zip(names[:99], ids, strict=False))
    # Each half is as a random one: so are their 64 bits together.
    for shift in (0, 32):
        ones = np.array([[i >> shift >> bit & 1 for bit in range(32)] for i in ids]).mean(0)
        assert np.abs(ones - 0.5).max() < 5 * 0.5 / np.sqrt(len(ids))
    halves = np.array([[i & 0xFFFFFFFF, i >> 32] for i in ids], float)
    assert abs(np.corrcoef(halves.T)[0, 1]) < 5 / np.sqrt(len(ids))


@pytest.mark.parametrize("start", [0, 5, 128 * (2**33 + 5) + 77])
def test_numbers_for_the_rounding_of_probes_are_as_the_specification_says(start):
    """Element by element, in Python's integers."""
    for j in range(start, start + 300, 7):
        word = int(spec.words(SEED, TENSOR, spec.PROBE, j // 128, 1)[0, j % 128 // 32])
        expected = ((word & 0xFFFF) * (j % 32) + (word >> 16)) % 2**16
        assert spec.probe16(SEED, TENSOR, j, j + 1).tolist() == [expected]
    made = eager._slice(spec.PROBE, SEED, TENSOR, start, 1000, torch.device("cpu"))
    assert made.tolist() == spec.probe16(SEED, TENSOR, start, start + 1000).tolist()


@each_stream
@each_length
@pytest.mark.parametrize("start", STARTS)
def test_fill_equals_the_reference_bit_for_bit(stream, n, start):
    expected = torch.from_numpy(STREAMS[stream](SEED, TENSOR, start, start + n))
    assert torch.equal(bits(filled(stream, n, start)), bits(expected))
    made = torch.full((n,), torch.nan)
    eager.fill(made, stream, SEED, TENSOR, start)
    assert torch.equal(bits(made), bits(expected))


@each_dtype
@each_stream
@each_length
@pytest.mark.parametrize("rounding_seed", [None, 99], ids=["nearest", "stochastic"])
def test_add_equals_the_reference_bit_for_bit(dtype, stream, n, rounding_seed):
    start, seeds, scales = 2**32 + 5, [1, 2**63 + 1, 3], [1e-3, -0.37, 2.5e-5]
    x = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
    expected = plain_add(x, stream, seeds, scales, start, rounding_seed)
    for add in (noise.add, eager.add):
        out = torch.full_like(x, torch.nan)
        add(out, x, stream, seeds, scales, TENSOR, start, rounding_seed)
        assert torch.equal(bits(out), bits(expected))
        inplace = x.clone()
        add(inplace, inplace, stream, seeds, scales, TENSOR, start, rounding_seed)
        assert torch.equal(bits(inplace), bits(expected))


@each_dtype
@pytest.mark.parametrize("rounding_seed", [None, 5])
def test_add_keeps_the_sign_of_zero_alike_on_every_path(dtype, rounding_seed):
    x = torch.tensor([0.0, -0.0] * 50, dtype=dtype)
    expected = plain_add(x, RADEMACHER, [1], [0.0], 0, rounding_seed)
    for add in (noise.add, eager.add):
        out = torch.empty_like(x)
        add(out, x, RADEMACHER, [1], [0.0], TENSOR, 0, rounding_seed)
        assert torch.equal(bits(out), bits(expected))


@each_dtype
@each_stream
@pytest.mark.parametrize("rounding_seed", [None, 99], ids=["nearest", "stochastic"])
def test_foreach_axpy_equals_add_for_each(dtype, stream, rounding_seed):
    xs = [torch.randn(n).to(dtype) for n in (1, 770, 70_001, 5)]
    expected = [x.clone() for x in xs]
    for tensor_id, x in enumerate(expected):
        noise.add(x, x, stream, (SEED, 3), (0.5, -2.0), TENSOR + tensor_id, 0, rounding_seed)
    noise.foreach_axpy_(xs, [TENSOR + k for k in range(4)], stream, (SEED, 3), (0.5, -2.0), rounding_seed)
    for x, y in zip(xs, expected, strict=True):
        assert torch.equal(bits(x), bits(y))


@each_dtype
@each_stream
def test_add_rows_equals_add_on_the_whole_matrix(dtype, stream):
    x = torch.linspace(-2, 2, 40 * 131).to(dtype).view(40, 131)
    whole = torch.empty_like(x)
    noise.add(whole.view(-1), x.view(-1), stream, [SEED], [0.125], TENSOR, 0, SEED, noise.PROBE)
    indices = torch.tensor([39, 0, 17, 1])
    rows = x[indices]
    noise.add_rows(rows, indices, stream, SEED, 0.125, TENSOR)
    assert torch.equal(bits(rows), bits(whole[indices]))
    y = x[indices].to(noise.compute_dtype(dtype))
    sums = torch.stack([y[i] + 0.125 * filled(stream, 131, 131 * k, SEED, TENSOR) for i, k in enumerate(indices)])
    rows = x[indices]
    noise.round_rows(rows, sums, indices, SEED, TENSOR)
    assert torch.equal(bits(rows), bits(whole[indices]))


@quick
@given(st.sampled_from(list(STREAMS)), u64, u64, st.integers(0, 2**42), st.integers(1, 400), st.integers(1, 400))
def test_noise_does_not_depend_on_how_a_tensor_is_cut(stream, seed, tensor, start, first, second):
    whole = filled(stream, first + second, start, seed, tensor)
    second_part = filled(stream, second, start + first, seed, tensor)  # made in the other order
    first_part = filled(stream, first, start, seed, tensor)
    assert torch.equal(bits(whole), bits(torch.cat([first_part, second_part])))
    assert torch.equal(bits(whole), bits(torch.from_numpy(STREAMS[stream](seed, tensor, start, start + len(whole)))))


@each_stream
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_noise_does_not_depend_on_the_number_of_threads(stream, dtype):
    n, threads = (1 << 18) + 4321, torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out = torch.ones(n, dtype=dtype)
            noise.add(out, out, stream, [SEED], [0.01], TENSOR, 3, rounding_seed=8)
            results.append(torch.cat([bits(filled(stream, n, 3)).long(), bits(out).long()]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@each_stream
def test_noise_does_not_depend_on_dtype(stream):
    u = filled(stream, 4000)
    for dtype in (torch.float32, torch.float64, *HALVES):
        zero = torch.zeros(4000, dtype=dtype)
        noise.add(zero, zero, stream, [SEED], [1.0], TENSOR)
        assert torch.equal(zero, u.to(dtype))


def test_noise_leaves_global_random_states_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    for stream in STREAMS:
        noise.fill(torch.empty(1000), stream, SEED, TENSOR)
    x = torch.ones(1000, dtype=torch.bfloat16)
    noise.add(x, x, GAUSSIAN, [1], [0.1], TENSOR, rounding_seed=3)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


def test_seeds_are_words_of_philox_over_arrays():
    for seed, path in ((0, ()), (7, (3,)), (2**64 - 1, (2**32 - 1, 0, 5)), (1 << 40, (1, 2, 3))):
        counter = [np.array([part], np.uint32) for part in (*path, 0, 0, 0)[:3]]
        w = spec.philox((*counter, np.array([spec.SEEDS], np.uint32)), (seed & 0xFFFFFFFF, seed >> 32))
        assert noise.derive_seed(seed, *path) == int(w[0][0]) | int(w[1][0]) << 32
    for path in ((2**32,), (-1,)):
        with pytest.raises(ValueError, match="path of a seed"):
            noise.derive_seed(0, *path)


def test_derived_seeds_are_distinct():
    paths = [(step, query, purpose) for step in range(50) for query in range(8) for purpose in range(3)]
    seeds = {noise.derive_seed(seed, *path) for seed in (0, 1, 2**32, 2**63) for path in paths}
    assert len(seeds) == 4 * len(paths)
    assert all(0 <= s < 2**64 for s in seeds)
    assert len({s >> 32 for s in seeds}) > 0.99 * len(seeds)
    assert len({s & 0xFFFFFFFF for s in seeds}) > 0.99 * len(seeds)


@each_half
def test_round_to_equals_the_reference_bit_for_bit(dtype):
    tiny = torch.finfo(dtype).tiny
    y = torch.randn(100_003, generator=torch.Generator().manual_seed(0))
    y[::3] *= tiny
    y[::7] *= torch.finfo(dtype).max
    y[::11] = 0.0
    y.clamp_(-torch.finfo(torch.float32).max, torch.finfo(torch.float32).max)
    for start in (13, 2**41 + 77):
        random = spec.random16(SEED, TENSOR, start, start + len(y))
        expected = torch.from_numpy(spec.round_stochastically(y.numpy(), random, HALVES[dtype])).view(dtype)
        for round_to in (noise.round_to, eager.round_half):
            out = torch.empty(len(y), dtype=dtype)
            round_to(out, y, SEED, TENSOR, start)
            assert torch.equal(bits(out), bits(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
def test_round_to_without_a_seed_rounds_to_nearest(dtype):
    y = torch.linspace(-3, 3, 1001)
    out = torch.empty(1001, dtype=dtype)
    noise.round_to(out, y, None, TENSOR)
    assert torch.equal(out, y.to(dtype))


def plain_mask(x, threshold, seed, tensor, start):
    return torch.where(torch.from_numpy(spec.masked(seed, tensor, start, start + len(x), threshold)), 0.0, x)


@quick
@given(
    u64,
    u32,
    st.sampled_from(STARTS) | st.integers(0, 2**42),
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**32]) | u32,
)
def test_masks_are_the_references_bit_for_bit_however_a_tensor_is_cut(seed, tensor, start, first, second, threshold):
    x = torch.linspace(1, 2, first + second)
    expected = plain_mask(x, threshold, seed, tensor, start)
    whole, cut, made = x.clone(), x.clone(), x.clone()
    noise.mask(whole, threshold / 2**32, seed, tensor, start)
    noise.mask(cut[first:], threshold / 2**32, seed, tensor, start + first)
    noise.mask(cut[:first], threshold / 2**32, seed, tensor, start)
    eager.mask(made, threshold, seed, tensor, start)
    for masked in (whole, cut, made):
        assert torch.equal(bits(masked), bits(expected))


def test_masks_do_not_depend_on_the_number_of_threads():
    n, threads, results = (1 << 20) + 4321, torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            out = torch.ones(n)
            noise.mask(out, 0.3, SEED, TENSOR, 3)
            results.append(out)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)
    assert torch.equal(results[0], plain_mask(torch.ones(n), round(0.3 * 2**32), SEED, TENSOR, 3))


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_masked_share_is_the_sparsity_within_four_sigma(sparsity):
    n = 200_000
    out = torch.ones(n)
    noise.mask(out, sparsity, SEED, TENSOR)
    assert abs(float((out == 0).double().mean()) - sparsity) <= 4 * np.sqrt(sparsity * (1 - sparsity) / n)
    neighbours = torch.corrcoef(torch.stack([out[:-1], out[1:]]))[0, 1] if 0 < sparsity < 1 else torch.tensor(0.0)
    assert abs(neighbours) < 5 / np.sqrt(n)
