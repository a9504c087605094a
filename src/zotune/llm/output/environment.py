"""Versions and machine, which every result records."""

from __future__ import annotations

import platform

import torch

import zotune
from zotune.system.libraries import library_version


def environment() -> dict[str, str]:
    """Return versions and machine, which every result records."""
    libraries = ("transformers", "peft")
    return {
        "zotune": zotune.__version__,
        "torch": torch.__version__,
        **{name: library_version(name) for name in libraries},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_threads": str(torch.get_num_threads()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
