"""The kernels of `native.c`, built at their first use where there is a C compiler.

They give the bits of the numba kernels, several times faster, and need none of numba's hundred
megabytes. The library is kept in the cache, named by everything that it depends on. It is used only
after it has reproduced the specification on a sample; without a compiler, or with `ZOTUNE_NATIVE=0`,
numba's kernels are used instead.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from zotune.cache import cache_folder
from zotune.noise import reference

_SOURCE = Path(__file__).with_name("native.c")
# No fused multiply-add and no fast-math: each would change bits. errno and traps nobody reads.
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")

# Does its work for elements lo … hi - 1.
Kernel = Callable[[int, int], None]

_u64, _i64, _u32, _int, _p = (ctypes.c_uint64, ctypes.c_int64, ctypes.c_uint32, ctypes.c_int, ctypes.c_void_p)
_SIGNATURES = {
    "zotune_fill": (_p, _int, _u64, _u32, _u64, _i64, _i64),
    "zotune_add": (_p, _p, _int, _int, _int, _p, _p, _int, _u64, _u32, _u64, _i64, _i64),
    "zotune_add_rows": (_p, _p, _i64, _i64, _i64, _int, _int, _u64, ctypes.c_double, _u32),
    "zotune_mask": (_p, _u64, _u64, _u32, _u64, _i64, _i64),
    "zotune_round": (_p, _p, _int, _u64, _u32, _u64, _i64, _i64),
}


@cache
def library() -> Any:
    """The loaded library; None where it cannot be built, or does not reproduce the specification."""
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None or os.environ.get("ZOTUNE_NATIVE") == "0":
        return None
    try:
        loaded = ctypes.CDLL(str(_build(compiler)))
    except (OSError, subprocess.SubprocessError):
        return None
    for name, types in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = types, None
    return loaded if _reproduces_the_specification(loaded) else None


def _build(compiler: str) -> Path:
    """The library's path in the cache, compiled if it is not there."""
    source = _SOURCE.read_bytes()
    parts = (source, " ".join((compiler, *_FLAGS)).encode(), platform.machine().encode(), _processor())
    path = cache_folder() / "native" / f"noise-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Built aside and renamed, so that two processes at once leave one whole file.
        with tempfile.TemporaryDirectory(dir=path.parent) as aside:
            built = Path(aside) / path.name
            command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(built), "-lm"]
            subprocess.run(command, capture_output=True, check=True, timeout=120)
            built.rename(path)
    return path


def _processor() -> bytes:
    """What `-march=native` depends on, for caches that several machines share."""
    info = Path("/proc/cpuinfo")
    lines = info.read_bytes().splitlines() if info.is_file() else []
    return next((line for line in lines if line.startswith((b"flags", b"Features"))), platform.processor().encode())


def _reproduces_the_specification(loaded: Any) -> bool:
    """Both samplers, the mask and both kinds of rounding, on a sample that begins and ends within blocks."""
    seed, tensor_id, start, n = 2**63 + 5, 7, 130, 1500
    samplers = ((reference.RADEMACHER, reference.rademacher), (reference.GAUSSIAN, reference.gaussian))
    for stream, specified in samplers:
        out = np.empty(n, np.float32)
        loaded.zotune_fill(_at(out), stream, seed, tensor_id, start, 0, n)
        if not np.array_equal(out, specified(seed, tensor_id, start, start + n)):
            return False
    expected = np.where(reference.masked(seed, tensor_id, start, start + n, 1 << 30), np.float32(0), out)
    loaded.zotune_mask(_at(out), 1 << 30, seed, tensor_id, start, 0, n)
    if not np.array_equal(out, expected):
        return False
    random = reference.random16(seed, tensor_id, start, start + n)
    for kind, dtype in ((1, "bfloat16"), (2, "float16")):
        bits = np.empty(n, np.uint16)
        loaded.zotune_round(_at(bits), _at(out), kind, seed, tensor_id, start, 0, n)
        if not np.array_equal(bits, reference.round_stochastically(out, random, dtype)):
            return False
    return True


def _at(array: Any) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def fill(out: Any, stream: int, seed: int, tensor_id: int, start: int) -> Kernel:
    """As `cpu.fill`."""
    run, to = library().zotune_fill, _at(out)
    return lambda lo, hi: run(to, stream, seed, tensor_id, start, lo, hi)


def add(
    out: Any,
    x: Any,
    kind: int,
    stream: int,
    seeds: Sequence[int],
    scales: Sequence[float],
    rounding_seed: int | None,
    tensor_id: int,
    start: int,
) -> Kernel:
    """As `cpu.add`."""
    q = len(seeds)
    u, a = (_u64 * q)(*seeds), (ctypes.c_double * q)(*scales)
    run, to, of = library().zotune_add, _at(out), _at(x)
    # Single and double precision are not rounded further.
    random = None if kind in (0, 3) else rounding_seed
    rest = (random is not None, random or 0, tensor_id, start)
    return lambda lo, hi: run(to, of, kind, stream, q, u, a, *rest, lo, hi)


def add_rows(rows: Any, indices: Any, kind: int, stream: int, seed: int, scale: float, tensor_id: int) -> None:
    """As `cpu.add_rows`."""
    count, width = rows.shape
    size = (_at(rows), _at(indices), count, width, rows.strides[0])
    library().zotune_add_rows(*size, kind, stream, seed, scale, tensor_id)


def round_half(out: Any, y: Any, kind: int, rounding_seed: int, tensor_id: int, start: int) -> Kernel:
    """As `cpu.round_half`."""
    run, to, of = library().zotune_round, _at(out), _at(y)
    return lambda lo, hi: run(to, of, kind, rounding_seed, tensor_id, start, lo, hi)


def mask(out: Any, threshold: int, seed: int, tensor_id: int, start: int) -> Kernel:
    """As `cpu.mask`."""
    run, to = library().zotune_mask, _at(out)
    return lambda lo, hi: run(to, threshold, seed, tensor_id, start, lo, hi)
