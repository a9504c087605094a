"""The noise's specification in NumPy behind the interface of the CPU's kernels: slow, plain, what they must equal."""

import numpy as np
import torch

from zotune.noise import spec

NUMBERS = {spec.ROUNDING: spec.random16, spec.PROBE: spec.probe16}
FILLS = {spec.RADEMACHER: spec.rademacher, spec.GAUSSIAN: spec.gaussian}
NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


def fill(out, stream, seed, tensor_id, start):
    out.numpy()[:] = FILLS[stream](seed, tensor_id, start, start + out.numel())


def mask(out, threshold, seed, tensor_id, start):
    out.numpy()[spec.masked(seed, tensor_id, start, start + out.numel(), threshold)] = 0


def add(out, x, stream, seeds, scales, tensor_id, start, rounding_seed, rounding=spec.ROUNDING):
    of = np.float64 if x.dtype == torch.float64 else np.float32
    total = None
    for seed, scale in zip(seeds, scales, strict=True):
        part = of(scale) * FILLS[stream](seed, tensor_id, start, start + x.numel()).astype(of)
        total = part if total is None else total + part
    moved = widened(x) + total
    if x.dtype in NAMES and rounding_seed is not None:
        round_half(out, torch.from_numpy(moved), rounding_seed, tensor_id, start, rounding)
    else:
        array_of(out)[:] = nearest(moved, x.dtype) if x.dtype in NAMES else moved


def axpy_pair(plus, minus, x, stream, seed, scale, tensor_id, start):
    for out, a in ((plus, scale), (minus, -scale)):
        add(out, x, stream, [seed], [a], tensor_id, start, seed, spec.PROBE)


def foreach_axpy_(xs, tensor_ids, stream, seeds, scales, rounding_seed, rounding=spec.ROUNDING):
    for x, tensor_id in zip(xs, tensor_ids, strict=True):
        add(x, x, stream, seeds, scales, tensor_id, 0, rounding_seed, rounding)


def add_rows(rows, indices, stream, seed, scale, tensor_id):
    for row, index in zip(rows, indices.tolist(), strict=True):
        add(row, row, stream, [seed], [scale], tensor_id, index * row.numel(), seed, spec.PROBE)


def round_half(out, y, rounding_seed, tensor_id, start, rounding=spec.ROUNDING):
    random = NUMBERS[rounding](rounding_seed, tensor_id, start, start + y.numel())
    array_of(out)[:] = spec.round_stochastically(y.numpy(), random, NAMES[out.dtype])


def array_of(t):
    """A NumPy view; 16-bit numbers as their bits."""
    return (t.view(torch.uint16) if t.dtype in NAMES else t).numpy()


def widened(t):
    """16-bit numbers in single precision."""
    x = array_of(t)
    if t.dtype == torch.bfloat16:
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x.view(np.float16).astype(np.float32) if t.dtype == torch.float16 else x


def nearest(y, dtype):
    """The bits of finite numbers rounded to nearest, ties to even."""
    if dtype == torch.float16:
        return y.astype(np.float16).view(np.uint16)
    bits = y.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
