"""Storage of cached activations: in memory up to a limit, then in a file up to another limit.

The file is mapped into memory and has no name, so the operating system removes it however the process ends.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

Key = tuple[int, ...]


class Tier(Protocol):
    """A storage of tensors by key."""

    def get(self, key: Key) -> Tensor | None:
        """Return the tensor of `key`, or None."""

    def put(self, key: Key, value: Tensor) -> bool:
        """Store `value` if there is room; return whether there was."""


class MemoryTier:
    """Copies of tensors on their device, at most `max_bytes` in all.

    >>> memory = MemoryTier(max_bytes=8)
    >>> memory.put((1,), torch.ones(2)), memory.put((2,), torch.ones(1))
    (True, False)
    """

    def __init__(self, max_bytes: int) -> None:
        self._room = max_bytes
        self._tensors: dict[Key, Tensor] = {}

    def get(self, key: Key) -> Tensor | None:
        """Return the tensor of `key`, or None."""
        return self._tensors.get(key)

    def put(self, key: Key, value: Tensor) -> bool:
        """Store a copy of `value` if there is room; return whether there was."""
        if value.nbytes > self._room:
            return False
        self._room -= value.nbytes
        self._tensors[key] = value.clone()
        return True


class FileTier:
    """Tensors in an unnamed file of at most `max_bytes` in `folder`; `get` returns the same bits on the same device.

    >>> file = FileTier(max_bytes=8, folder=Path(tempfile.gettempdir()))
    >>> file.put((1,), torch.tensor([0.5], dtype=torch.bfloat16)), file.get((1,))
    (True, tensor([0.5000], dtype=torch.bfloat16))
    """

    def __init__(self, max_bytes: int, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it is closed with this object
        weakref.finalize(self, self._file.close)
        # A block of the disk is allocated only when data is written to it.
        os.ftruncate(self._file.fileno(), max_bytes)
        self._map = mmap.mmap(self._file.fileno(), max_bytes)
        self._end, self._max_bytes = 0, max_bytes
        self._places: dict[Key, tuple[int, torch.Size, torch.dtype, torch.device]] = {}

    def get(self, key: Key) -> Tensor | None:
        """Return the tensor of `key`, or None."""
        if key not in self._places:
            return None
        start, shape, dtype, device = self._places[key]
        return (
            torch.frombuffer(self._map, dtype=dtype, count=shape.numel(), offset=start).view(shape).clone().to(device)
        )

    def put(self, key: Key, value: Tensor) -> bool:
        """Write `value` if there is room; return whether there was."""
        if self._end + value.nbytes > self._max_bytes:
            return False
        numbers: Any = value.cpu().contiguous().view(-1).view(torch.uint8).numpy()
        try:
            # A write to a full disk fails; a store to mapped memory would kill the process.
            written, more = 0, -1
            while more and written < value.nbytes:  # Linux writes at most 2 GiB at a time
                more = os.pwrite(self._file.fileno(), numbers.data[written:], self._end + written)
                written += more
        except OSError:
            written = 0
        if written < value.nbytes:
            self._max_bytes = self._end
            return False
        self._places[key] = (self._end, value.shape, value.dtype, value.device)
        # The next tensor starts at an offset that suits every dtype.
        self._end += -(-value.nbytes // 8) * 8
        return True


class ActivationStore:
    """Several tiers as one store: a tensor goes to the first tier that has room."""

    def __init__(self, tiers: Sequence[Tier] = ()) -> None:
        self._tiers = tuple(tiers)

    def get(self, key: Key) -> Tensor | None:
        """Return the tensor of `key` from the tier that holds it, or None."""
        return next((value for tier in self._tiers if (value := tier.get(key)) is not None), None)

    def put(self, key: Key, value: Tensor) -> bool:
        """Store `value` in the first tier with room; return whether there was one."""
        return any(tier.put(key, value) for tier in self._tiers)
