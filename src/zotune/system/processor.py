"""What this machine's processor computes in instructions of its own, and what torch emulates on it."""

from __future__ import annotations

import platform
from collections.abc import Callable

import torch

_INTEL = ("x86_64", "AMD64")


def emulates(dtype: torch.dtype) -> bool:
    """Return whether this processor has no instruction for products of `dtype`, so that torch emulates them.

    Emulated products of half precision take several times as long as those of float32. Nothing is said against a
    processor that cannot be asked: only x86 processors can.

    Args:
        dtype: the precision of the matrices.

    >>> emulates(torch.float32)
    False
    """
    if platform.machine() not in _INTEL:
        return False
    # Private names: torch has no public ones (2.11 to 2.15).
    has: dict[torch.dtype, Callable[[], bool]] = {
        torch.bfloat16: lambda: torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype in has and not has[dtype]()
