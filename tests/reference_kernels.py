"""The noise's specification in NumPy behind the interface of the CPU's kernels: slow, plain, what they must equal."""

import numpy as np

from zotune.noise import reference

FILLS = {reference.RADEMACHER: reference.rademacher, reference.GAUSSIAN: reference.gaussian}
FLOAT, BFLOAT16, FLOAT16, DOUBLE = range(4)


def fill(out, stream, seed, tensor_id, start):
    out[:] = FILLS[stream](seed, tensor_id, start, start + out.size)


def mask(out, threshold, seed, tensor_id, start):
    out[reference.masked(seed, tensor_id, start, start + out.size, threshold)] = 0


def add(out, x, kind, stream, seeds, scales, rounding_seed, tensor_id, start):
    of = np.float64 if kind == DOUBLE else np.float32
    total = None
    for seed, scale in zip(seeds, scales, strict=True):
        part = of(scale) * FILLS[stream](seed, tensor_id, start, start + x.size).astype(of)
        total = part if total is None else total + part
    moved = widened(x, kind) + total
    if kind in (FLOAT, DOUBLE):
        out[:] = moved
    elif rounding_seed is None:
        out[:] = nearest(moved, kind)
    else:
        round_half(out, moved, kind, rounding_seed, tensor_id, start)


def add_both(plus, minus, x, kind, stream, seed, scale, tensor_id, start):
    for out, a in ((plus, scale), (minus, -scale)):
        add(out, x, kind, stream, [seed], [a], None, tensor_id, start)


def add_rows(rows, indices, kind, stream, seed, scale, tensor_id):
    for row, index in zip(rows, indices, strict=True):
        add(row, row, kind, stream, [seed], [scale], None, tensor_id, int(index) * row.size)


def round_half(out, y, kind, rounding_seed, tensor_id, start):
    random = reference.random16(rounding_seed, tensor_id, start, start + y.size)
    out[:] = reference.round_stochastically(y, random, "bfloat16" if kind == BFLOAT16 else "float16")


def widened(x, kind):
    """16-bit numbers, given as their bits, in single precision."""
    if kind == BFLOAT16:
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x.view(np.float16).astype(np.float32) if kind == FLOAT16 else x


def nearest(y, kind):
    """The bits of finite numbers rounded to nearest, ties to even."""
    if kind == FLOAT16:
        return y.astype(np.float16).view(np.uint16)
    bits = y.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
