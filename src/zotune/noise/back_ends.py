"""The back ends of the noise: which functions each has, for which dtypes, and which of them serves a device.

All of them give the bits of `spec.py`. Torch operations can do everything that has no substitute; the kernels of a
device replace them where they are usable, and add functions for which the callers have a slower way of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Final

import torch

from zotune.noise import checks, eager, native

Dtypes = frozenset[torch.dtype]

SINGLE: Final[Dtypes] = checks.SINGLE
HALF: Final[Dtypes] = checks.HALF
DOUBLE: Final[Dtypes] = frozenset({torch.float64})

# By back end and function: the dtypes of the weights, or of the output, that the function takes.
CAPABILITIES: Final[Mapping[str, Mapping[str, Dtypes]]] = {
    "native": {
        "fill": SINGLE,
        "mask": SINGLE,
        "round_half": HALF,
        "add": HALF | SINGLE | DOUBLE,
        "axpy_pair": HALF | SINGLE | DOUBLE,
        "foreach_axpy_": HALF | SINGLE | DOUBLE,
        "add_rows": HALF | SINGLE | DOUBLE,
        "add_products": HALF | SINGLE | DOUBLE,
        "low_rank_matmul_add_": HALF | SINGLE,
        "step": HALF | SINGLE,
    },
    "triton": {
        "fill": SINGLE,
        "mask": SINGLE,
        "round_half": HALF,
        "add": HALF | SINGLE,
        "axpy_pair": HALF | SINGLE,
        "foreach_axpy_": HALF | SINGLE,
        "add_rows": HALF | SINGLE,
    },
    "eager": {
        "fill": SINGLE,
        "mask": SINGLE,
        "round_half": HALF,
        "add": HALF | SINGLE | DOUBLE,
        "axpy_pair": HALF | SINGLE | DOUBLE,
        "foreach_axpy_": HALF | SINGLE | DOUBLE,
        "add_rows": HALF | SINGLE | DOUBLE,
    },
}


@dataclass(frozen=True)
class BackEnd:
    """A name of the table of capabilities, and the module that holds the functions."""

    name: str
    kernels: ModuleType

    def has(self, function: str, dtype: torch.dtype) -> bool:
        """Whether there is such a function for tensors of a dtype.

        >>> EAGER.has("add", torch.float64), EAGER.has("step", torch.float32)
        (True, False)
        """
        return dtype in CAPABILITIES[self.name].get(function, ())


EAGER = BackEnd("eager", eager)
NATIVE = BackEnd("native", native)


def back_end(device: torch.device) -> BackEnd:
    """The one that serves a device's tensors."""
    return cpu() if device.type == "cpu" else accelerator(device)


@cache
def cpu() -> BackEnd:
    """The C kernels where the installation has them, else torch operations. Decided at the first use."""
    return EAGER if native.library() is None else NATIVE


@cache
def accelerator(device: torch.device) -> BackEnd:
    """Triton's kernels on a GPU where they work, else torch operations. Decided at the first use."""
    if device.type == "cuda" and find_spec("triton") is not None:
        from zotune.noise import launch

        if launch.is_usable(device):
            return BackEnd("triton", launch)
    return EAGER
