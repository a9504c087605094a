"""Where activations are kept between forward passes: in memory up to a bound, then in a file up to another.

The file is mapped into memory and has no name from the moment it is made, so that whatever ends the
process, the operating system removes it.
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
    """A place for tensors."""

    def get(self, key: Key) -> Tensor | None:
        """What was kept under `key`."""

    def put(self, key: Key, value: Tensor) -> bool:
        """Keep `value` where there is room; whether there was."""


class Memory:
    """Tensors where they are, at most `max_bytes` of them.

    >>> memory = Memory(max_bytes=8)
    >>> memory.put((1,), torch.ones(2)), memory.put((2,), torch.ones(1))
    (True, False)
    """

    def __init__(self, max_bytes: int) -> None:
        self._room = max_bytes
        self._kept: dict[Key, Tensor] = {}

    def get(self, key: Key) -> Tensor | None:
        """What was kept under `key`."""
        return self._kept.get(key)

    def put(self, key: Key, value: Tensor) -> bool:
        """Keep a copy of `value` where there is room; whether there was."""
        if value.nbytes > self._room:
            return False
        self._room -= value.nbytes
        self._kept[key] = value.clone()
        return True


class File:
    """Tensors in a nameless file of at most `max_bytes` in `folder`; they come back bit for bit, on their device.

    >>> file = File(max_bytes=8, folder=Path(tempfile.gettempdir()))
    >>> file.put((1,), torch.tensor([0.5], dtype=torch.bfloat16)), file.get((1,))
    (True, tensor([0.5000], dtype=torch.bfloat16))
    """

    def __init__(self, max_bytes: int, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it is closed with this object
        weakref.finalize(self, self._file.close)
        # No block is taken on the disk before something is written there.
        os.ftruncate(self._file.fileno(), max_bytes)
        self._map = mmap.mmap(self._file.fileno(), max_bytes)
        self._end, self._max_bytes = 0, max_bytes
        self._places: dict[Key, tuple[int, torch.Size, torch.dtype, torch.device]] = {}

    def get(self, key: Key) -> Tensor | None:
        """What was kept under `key`."""
        if key not in self._places:
            return None
        start, shape, dtype, device = self._places[key]
        return (
            torch.frombuffer(self._map, dtype=dtype, count=shape.numel(), offset=start).view(shape).clone().to(device)
        )

    def put(self, key: Key, value: Tensor) -> bool:
        """Write `value` where there is room; whether there was."""
        if self._end + value.nbytes > self._max_bytes:
            return False
        numbers: Any = value.cpu().contiguous().view(-1).view(torch.uint8).numpy()
        try:
            # Written, not mapped: on a full disk a write fails, a mapped store would kill the process.
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
        # Whatever the precision, the next tensor begins where any type may.
        self._end += -(-value.nbytes // 8) * 8
        return True


class Kept:
    """Several tiers as one: what the first has no room for goes to the next."""

    def __init__(self, tiers: Sequence[Tier] = ()) -> None:
        self._tiers = tuple(tiers)

    def get(self, key: Key) -> Tensor | None:
        """What was kept under `key`, in whichever tier."""
        return next((found for tier in self._tiers if (found := tier.get(key)) is not None), None)

    def put(self, key: Key, value: Tensor) -> bool:
        """Keep `value` in the first tier with room; whether there was any."""
        return any(tier.put(key, value) for tier in self._tiers)
