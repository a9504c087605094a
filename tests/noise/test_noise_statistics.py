"""The noise has the distribution it claims: moments, tails, independence, and rounding without bias.

Seeds are fixed, so nothing here is left to chance; bounds are five standard errors, so that the numbers
frozen by the seeds had a chance of about one in a million each to be refused.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from zotune import noise
from zotune.noise import GAUSSIAN, RADEMACHER, spec

N, SIGMAS = 1 << 20, 5.0
HALVES = [torch.bfloat16, torch.float16]
each_half = pytest.mark.parametrize("dtype", HALVES, ids=str)
each_stream = pytest.mark.parametrize("stream", [RADEMACHER, GAUSSIAN], ids=["rademacher", "gaussian"])


def sample(stream, seed=11, tensor=5, n=N):
    out = torch.empty(n)
    noise.fill(out, stream, seed, tensor)
    return out.numpy().astype(np.float64)


def rounded(values, dtype, repeats):
    """Each value rounded at random `repeats` times: shape (values, repeats), as float64."""
    y = torch.as_tensor(values, dtype=torch.float32).repeat_interleave(repeats)
    out = torch.empty(len(y), dtype=dtype)
    noise.round_to(out, y, 1234, 9)
    return out.double().view(-1, repeats).numpy()


def neighbours(value, dtype):
    """The representable numbers next below and above a float32 number, found by torch's own conversion."""
    near = torch.tensor(value, dtype=torch.float32).to(dtype)
    if float(near) == value:
        return value, value
    side = torch.tensor(math.inf if float(near) < value else -math.inf, dtype=dtype)
    return tuple(sorted((float(near), float(torch.nextafter(near, side)))))


@pytest.mark.parametrize(
    ("order", "moment", "variance"), [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)]
)
def test_gaussian_moments(order, moment, variance):
    error = (sample(GAUSSIAN) ** order).mean() - moment
    assert abs(error) < SIGMAS * math.sqrt(variance / N)


def test_gaussian_passes_the_kolmogorov_smirnov_test():
    for seed in range(3):
        assert stats.kstest(sample(GAUSSIAN, seed), "norm").pvalue > 1e-3
    for part in range(4):  # cosine and sine of either word pair, on their own
        assert stats.kstest(sample(GAUSSIAN)[part::4], "norm").pvalue > 1e-3


@pytest.mark.parametrize("bound", [1.0, 2.0, 3.0, 4.0, 4.5])
@pytest.mark.parametrize("side", [-1, 1])
def test_gaussian_tails_hold_what_they_should(bound, side):
    u = np.concatenate([sample(GAUSSIAN, seed) for seed in range(4)])
    count = int((side * u > bound).sum())
    low, high = stats.binom.interval(1 - 1e-6, len(u), stats.norm.sf(bound))
    assert low <= count <= high


def test_gaussian_radius_and_angle_are_independent():
    pairs = sample(GAUSSIAN).reshape(-1, 2)
    squares = pairs**2 - 1
    assert abs((squares[:, 0] * squares[:, 1]).mean()) < SIGMAS * 2 / math.sqrt(len(pairs))


def test_rademacher_is_plus_or_minus_one_in_balance_at_every_bit_position():
    u = sample(RADEMACHER)
    assert set(np.unique(u)) == {-1.0, 1.0}
    assert abs(u.mean()) < SIGMAS / math.sqrt(N)
    by_position = u.reshape(-1, 128).mean(0)
    assert np.abs(by_position).max() < SIGMAS / math.sqrt(N / 128)
    assert stats.kstest(by_position * math.sqrt(N / 128), "norm").pvalue > 1e-3


def test_rademacher_runs_have_geometric_lengths():
    changes = np.flatnonzero(np.diff(sample(RADEMACHER)))
    lengths = np.bincount(np.diff(changes), minlength=12)[1:12]
    expected = lengths.sum() * 0.5 ** np.arange(1, 12)
    assert stats.chisquare(lengths[:10], expected[:10] * lengths[:10].sum() / expected[:10].sum()).pvalue > 1e-3


def test_gaussian_is_box_muller_of_the_words_in_double_precision():
    words = noise.spec.words(11, 5, GAUSSIAN, 0, N // 4).reshape(-1, 2).astype(np.float64)
    radius, angle = np.sqrt(-2 * np.log((words[:, 0] + 0.5) / 2**32)), 2 * np.pi * words[:, 1] / 2**32
    error = np.abs(sample(GAUSSIAN).reshape(-1, 2) - radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1))
    # A uniform number near 1 is rounded to a multiple of 2⁻²⁴, which matters where the radius is near 0.
    assert (error <= 1e-6 + 2.0**-25 / np.maximum(radius, 2.0**-12.5)[:, None]).all()
    assert np.median(error) < 1e-7


@each_stream
@pytest.mark.parametrize("lag", [1, 2, 3, 4, 32, 64, 128, 1024])
def test_neighbouring_elements_are_uncorrelated(stream, lag):
    u = sample(stream)
    assert abs((u[lag:] * u[:-lag]).mean()) < SIGMAS / math.sqrt(N - lag)


@each_stream
def test_tensors_and_seeds_are_uncorrelated_pairwise(stream):
    keys = [(0, 0), (0, 1), (1, 0), (1, 1), (2**32, 0), (0, 2**31), (2**63, 1)]
    u = np.stack([sample(stream, seed, tensor, 1 << 18) for seed, tensor in keys])
    correlation = u @ u.T / u.shape[1] - np.eye(len(keys)) * (u**2).mean(1)
    assert np.abs(correlation).max() < SIGMAS / math.sqrt(u.shape[1])


@each_half
@pytest.mark.parametrize(
    "value", [1.001, -1.001, 0.3, 1 / 3, -2.7182817, 123.456, 6.1e-5 * 1.00037, 1e-4, -0.02000001, 3e4 * 1.0001]
)
def test_stochastic_rounding_has_the_right_mean(dtype, value):
    value = float(np.float32(value))
    low, high = neighbours(value, dtype)
    got = rounded([value], dtype, 1 << 16)[0]
    assert set(np.unique(got)) == {low, high}
    share = (value - low) / (high - low)
    error = math.sqrt(share * (1 - share) / len(got))
    assert abs((got == high).mean() - share) < SIGMAS * error + 2**-16


@pytest.mark.parametrize("value", [1e-6, -1e-6, 3.3e-7, 2.0e-8, -5.9e-8, 6.0e-5])
def test_stochastic_rounding_has_the_right_mean_among_subnormal_float16(value):
    got = rounded([value], torch.float16, 1 << 16)[0]
    gap = 2.0**-24
    assert abs(got.mean() - float(np.float32(value))) < gap * (SIGMAS * 0.5 / math.sqrt(len(got)) + 2**-16)
    assert len(np.unique(got)) == 2


@each_half
def test_stochastic_rounding_saturates_at_the_largest_finite_number(dtype):
    largest = torch.finfo(dtype).max
    beyond = [largest * 1.0005, -largest * 1.0005] if dtype == torch.float16 else [3.4e38, -3.4e38]
    got = rounded([largest, -largest, *beyond], dtype, 1000)
    assert (got == np.array([[largest], [-largest], [largest], [-largest]])).all()


@each_half
def test_stochastic_rounding_never_changes_a_representable_number(dtype):
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    every = every[torch.isfinite(every)]
    for seed in range(3):
        out = torch.empty_like(every)
        noise.round_to(out, every.float(), seed, 9)
        assert torch.equal(out.view(torch.int16), every.view(torch.int16))


@each_half
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(value=st.floats(-65504, 65504, width=32), seed=st.integers(0, 2**64 - 1))
def test_stochastic_rounding_gives_a_neighbour(dtype, value, seed):
    out = torch.empty(64, dtype=dtype)
    noise.round_to(out, torch.full((64,), value), seed, 9)
    assert set(out.double().tolist()) <= set(neighbours(value, dtype))


def test_rounding_noise_is_uniform_and_apart_from_the_directions():
    random = noise.spec.random16(11, 5, 0, N)
    assert stats.chisquare(np.bincount(random >> 8, minlength=256)).pvalue > 1e-3
    assert stats.chisquare(np.bincount(random & 255, minlength=256)).pvalue > 1e-3
    centred = (random - 32767.5) / (65536 / math.sqrt(12))
    for stream in (RADEMACHER, GAUSSIAN):
        assert abs((centred * sample(stream)).mean()) < SIGMAS / math.sqrt(N)


@pytest.mark.parametrize("share", [1 / 2, 1 / 16, 1 / 64])
def test_roundings_of_probes_are_unbiased_and_pairwise_unrelated(share):
    """Of each element of a block, over blocks, for a chance to round up: of its own, and with each other's."""
    blocks = 40_000
    numbers = spec.probe16(11, 3, 0, 128 * blocks).reshape(blocks, 128)
    up = (numbers >= 65536 * (1 - share)) - share
    spread = math.sqrt(share * (1 - share) / blocks)
    assert np.abs(up.mean(0)).max() < 5 * spread
    correlation = (up.T @ up) / (blocks * share * (1 - share))
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 5.5 / math.sqrt(blocks)


def test_roundings_of_probes_have_nothing_to_do_with_the_direction():
    n = 1 << 20
    up = (spec.probe16(11, 3, 0, n) >= 65536 - 4096) - 1 / 16
    for u in (spec.rademacher(11, 3, 0, n), spec.gaussian(11, 3, 0, n)):
        assert abs(np.mean(up * u)) < 5 * math.sqrt(1 / 16 * 15 / 16 / n)
        assert abs(np.mean(up * (u * u - np.mean(u * u)))) < 5 * math.sqrt(3 / 16 / n)
