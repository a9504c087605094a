"""How the matrices of a streamed layer come to where they are used: in place, on a CPU, or copied to a device.

On a CPU the mapped file itself is read and written: the kernel fetches the pages of the next layer while one runs, and
those of a layer that has run are given back. On a device a thread copies the next layer into pinned memory and a second
stream from there to the device, so that neither the disk nor the bus waits for the other.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from zotune.model.mapped_memory import populate, prefetch, release

Matrices = Sequence[Sequence[nn.Parameter]]


class InPlace:
    """Layers that run on the CPU, from mapped memory."""

    def __init__(self, matrices: Matrices) -> None:
        self._matrices = matrices

    def renew(self) -> None:
        """Take notice that matrices lie elsewhere now."""

    def wait(self) -> None:
        """There is nothing to wait for: what was written is in the file."""

    def prefetch(self, index: int) -> None:
        """Begin to read a layer."""
        for p in self._matrices[index]:
            prefetch(p.data)

    def load(self, index: int, *, writes: bool) -> None:
        """Read a layer, to be written too with `writes`."""
        for p in self._matrices[index]:
            populate(p.data, writes=writes)

    def unload(self, index: int, *, wrote: bool) -> None:
        """Give back the memory of a layer; what was written stays in its file."""
        for p in self._matrices[index]:
            release(p.data)


class ToDevice:
    """Layers that run on a device: two at a time are there, the one that runs and the next.

    One thread makes all copies in the order in which they are asked for, so a layer that was written is in its file
    before it is read again.

    Args:
        matrices: the parameters of each layer, with their numbers on the CPU.
        device: where they run. Without streams, as on a CPU in a test, each copy is made at once.
    """

    def __init__(self, matrices: Matrices, device: torch.device) -> None:
        self._matrices, self._device = matrices, device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        largest = max(sum(_aligned(p.nbytes) for p in of_layer) for of_layer in matrices)
        self._pinned = torch.empty(largest, dtype=torch.uint8, pin_memory=self._stream is not None)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="zotune-layers")
        self._coming: dict[int, Future[list[Tensor]]] = {}
        self._going: list[Future[None]] = []
        # Reached when the device has run the layer before: the host, which is ahead of it, must not bring in more.
        self._has_run: torch.cuda.Event | None = None
        self.renew()

    def renew(self) -> None:
        """Take notice that matrices lie elsewhere now."""
        self.wait()
        self._homes = [[p.data for p in of_layer] for of_layer in self._matrices]

    def wait(self) -> None:
        """Wait until all that was written is in the file, and forget what was read ahead: it may be written now."""
        concurrent.futures.wait(list(self._coming.values()))
        for written in self._going:
            written.result()
        self._coming.clear()
        self._going.clear()

    def prefetch(self, index: int) -> None:
        """Begin to copy a layer to the device."""
        if index not in self._coming:
            self._coming[index] = self._worker.submit(self._upload, index, self._has_run)

    def load(self, index: int, *, writes: bool) -> None:
        """Wait until a layer is on the device, and let its parameters be there."""
        self.prefetch(index)
        for p, copy in zip(self._matrices[index], self._coming.pop(index).result(), strict=True):
            if self._stream is not None:
                copy.record_stream(torch.cuda.current_stream(self._device))
            p.data = copy

    def unload(self, index: int, *, wrote: bool) -> None:
        """Let a layer's parameters be on the CPU again, with what was written to them."""
        copies = [p.data for p in self._matrices[index]]
        if self._stream is not None:
            self._has_run = torch.cuda.current_stream(self._device).record_event()
        if wrote:
            for copied in [copied for copied in self._going if copied.done()]:
                copied.result()
                self._going.remove(copied)
            self._going.append(self._worker.submit(self._download, index, copies, self._has_run))
        for p, home in zip(self._matrices[index], self._homes[index], strict=True):
            p.data = home

    @torch.no_grad()
    def _upload(self, index: int, has_run: torch.cuda.Event | None) -> list[Tensor]:
        if self._stream is None:
            return [home.to(self._device, copy=True) for home in self._homes[index]]
        if has_run is not None:
            has_run.synchronize()
        copies = []
        with torch.cuda.stream(self._stream):
            for home, staging in self._staged(index):
                copies.append(staging.copy_(home).to(self._device, non_blocking=True))
                release(home)
        self._stream.synchronize()
        return copies

    @torch.no_grad()
    def _download(self, index: int, copies: Sequence[Tensor], has_run: torch.cuda.Event | None) -> None:
        if self._stream is None or has_run is None:
            for copy, home in zip(copies, self._homes[index], strict=True):
                home.copy_(copy)
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(has_run)
            for copy, (_, staging) in zip(copies, self._staged(index), strict=True):
                staging.copy_(copy, non_blocking=True)
        self._stream.synchronize()
        for home, staging in self._staged(index):
            home.copy_(staging)
            release(home)

    def _staged(self, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        """A layer's matrices, each with its place in the pinned memory."""
        start = 0
        for home in self._homes[index]:
            yield home, self._pinned[start : start + home.nbytes].view(home.dtype).view(home.shape)
            start += _aligned(home.nbytes)


def _aligned(size: int) -> int:
    return -(-size // 64) * 64
