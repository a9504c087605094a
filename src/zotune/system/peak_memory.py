"""How much memory this process has taken at its peak."""

from __future__ import annotations

import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch


def peak_memory(device: torch.device | str = "cpu") -> int:
    """The most bytes that this process has held at once: on the GPU for a CUDA device, else resident in RAM.

    On Linux the kernel's high-water mark of the process image (VmHWM), which, unlike `ru_maxrss`, does
    not inherit the size of the process that started this one.

    >>> peak_memory() > 10 * 1024**2
    True
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def resident_memory() -> int:
    """Bytes of this process that are resident in RAM now; where the kernel does not say (not Linux), its peak."""
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        return peak_memory()
    return int(statm.read_text().split()[1]) * resource.getpagesize()


def free_memory() -> int:
    """Bytes of RAM that a process could still take (Linux; elsewhere all there is)."""
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def forget_peak() -> None:
    """Reset the kernel's high-water mark, which `peak_memory` reads, to the resident bytes of now (Linux, if
    permitted).
    """
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
