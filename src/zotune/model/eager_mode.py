"""Probes run uncompiled: code from `torch.compile` calls no torch function that could be given x + a·u for x.

Dynamo can be made to trace how a probe replaces what is read, but it then compiles each function of it, anew for each
probe. And a difference of two losses needs both from the same arithmetic, which compiled and plain code do not share.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within this context compiled code runs as plain Python; earlier compilations stay valid after it."""
    # Where the compiler was never imported (it takes a second), nothing is compiled.
    if "torch._dynamo" not in sys.modules:
        yield
        return
    stance: Any = torch.compiler.set_stance("force_eager")
    with stance:
        yield
