"""Tensors in files that are mapped into memory: their numbers take memory only while somebody reads or writes them.

The kernel reads a page of such a tensor when it is first touched, and `release` gives it back: what was written stays
in the file. A tensor of any other memory is left alone by all functions here.
"""

from __future__ import annotations

import bisect
import ctypes
import json
import math
import mmap
import os
import tempfile
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zotune.errors import NotWrittenError

# By first address, the ranges of addresses that this module has mapped. Elsewhere `release` would erase numbers.
_STARTS: list[int] = []
_ENDS: dict[int, int] = {}
_PAGE = mmap.PAGESIZE
# madvise: read ahead; give back; map all pages now for reading, or for writing (Linux 5.14).
_WILLNEED, _DONTNEED, _POPULATE_READ, _POPULATE_WRITE = 3, 4, 22, 23
# The safetensors format's names of dtypes.
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
}


class ScratchFile:
    """A file without a name in a folder, in which tensors lie; it is gone however the process ends.

    Args:
        folder: an existing folder on a disk.

    Raises:
        NotWrittenError: the folder cannot be written.

    >>> file = ScratchFile(Path(tempfile.gettempdir()))
    >>> x = file.empty((2,), torch.float32).fill_(0.5)
    >>> release(x)
    >>> x
    tensor([0.5000, 0.5000])
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._end = folder, 0
        self._starts: set[int] = set()
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it is closed with this object
        except OSError as error:
            raise NotWrittenError(f"no file can be written in {str(folder)!r}: {error.strerror or error}.") from None
        weakref.finalize(self, self._file.close)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a new tensor of zeros in the file.

        Raises:
            NotWrittenError: the disk is full.
        """
        numel = math.prod(shape)
        if not numel:
            return torch.empty(shape, dtype=dtype)
        size = -(-numel * dtype.itemsize // _PAGE) * _PAGE
        try:
            # Room is reserved now: a store to mapped memory on a full disk would kill the process.
            os.posix_fallocate(self._file.fileno(), self._end, size)
            region = mmap.mmap(self._file.fileno(), size, offset=self._end)
        except OSError as error:
            raise NotWrittenError(
                f"the offload folder {str(self.folder)!r} has no room for {size / 1e6:.0f} MB more: "
                f"{error.strerror or error}. Make room, or choose another --offload-folder."
            ) from None
        self._end += size
        flat = torch.frombuffer(region, dtype=dtype, count=numel)
        _register(region, flat.data_ptr(), size)
        self._starts.add(flat.data_ptr())
        return flat.view(shape)

    def copy(self, x: Tensor) -> Tensor:
        """Return a copy of a tensor in the file; neither takes memory afterwards if `x` is mapped too."""
        out = self.empty(tuple(x.shape), x.dtype).copy_(x)
        release(out)
        release(x)
        return out

    def kept(self, x: Tensor) -> Tensor:
        """Return a tensor as it is if it is mapped from a file, else a copy in this file."""
        return x if is_mapped(x) else self.copy(x)

    def holds(self, x: Tensor) -> bool:
        """Whether a tensor begins where one of this file's does, while that one lives."""
        return x.data_ptr() in self._starts and is_mapped(x)


def mapped_safetensors(path: Path) -> dict[str, Tensor]:
    """Map the tensors of a safetensors file, by name, so that they can be read and not written.

    A tensor that does not begin at a multiple of its dtype's size is left out.

    Raises:
        OSError, ValueError: the file cannot be read, or is none.
    """
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        size = os.fstat(file.fileno()).st_size
        if header_size > size - 8:
            raise ValueError(f"{path} is no safetensors file")
        header = json.loads(file.read(header_size))
        region = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    found, first = {}, 8 + header_size
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        whole = torch.frombuffer(region, dtype=torch.uint8)
    _register(region, whole.data_ptr(), size)
    for name, entry in header.items():
        dtype = _DTYPES.get(entry.get("dtype"))
        if dtype is None:
            continue
        lo, hi = (first + offset for offset in entry["data_offsets"])
        if lo < hi <= size and lo % dtype.itemsize == 0:
            found[name] = whole[lo:hi].view(dtype).view(entry["shape"])
    return found


def register_memmap(array: np.ndarray[Any, Any]) -> None:
    """Let the functions of this module know a file that NumPy has mapped, and of which nothing is written.

    Args:
        array: a `np.memmap`, or a view of one.
    """
    base: Any = array
    while base is not None and not isinstance(base, np.memmap):
        base = base.base
    # A view of a memmap is one too; the whole of the file belongs to the one that nothing is under.
    while base is not None and isinstance(base.base, np.memmap):
        base = base.base
    if base is not None and base.ctypes.data not in _ENDS:
        _register(base._mmap, base.ctypes.data, base.nbytes)


def is_mapped(x: Tensor) -> bool:
    """Whether a tensor lies in a file that this module has mapped."""
    return _range(x) is not None


def release(x: Tensor) -> None:
    """Give back the memory that a mapped tensor takes; what was written to it stays in its file."""
    _advise(x, _DONTNEED)


def prefetch(x: Tensor) -> None:
    """Ask the kernel to read a mapped tensor from its file, and go on at once."""
    _advise(x, _WILLNEED)


def populate(x: Tensor, *, writes: bool) -> None:
    """Bring a whole mapped tensor into memory at once, which is faster than page by page."""
    _advise(x, _POPULATE_WRITE if writes else _POPULATE_READ)


def _register(region: mmap.mmap, start: int, size: int) -> None:
    bisect.insort(_STARTS, start)
    _ENDS[start] = start + size
    weakref.finalize(region, _forget, start)


def _forget(start: int) -> None:
    _STARTS.remove(start)
    del _ENDS[start]


def _range(x: Tensor) -> tuple[int, int] | None:
    """The addresses of a mapped tensor."""
    if not _STARTS or x.device.type != "cpu" or not x.is_contiguous() or not x.numel():
        return None
    start = x.data_ptr()
    at = bisect.bisect_right(_STARTS, start) - 1
    end = start + x.nbytes
    return (start, end) if at >= 0 and end <= _ENDS[_STARTS[at]] else None


def _advise(x: Tensor, advice: int) -> None:
    if (found := _range(x)) is None:
        return
    # Neighbours share the first and the last page; none of the kinds of advice changes what they hold.
    start, end = found[0] // _PAGE * _PAGE, found[1]
    # Advice that a kernel does not know has no effect.
    _madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)


_libc = ctypes.CDLL(None, use_errno=True)
_madvise = getattr(_libc, "madvise", lambda *_: 0)
