"""h of the paper's equation (2): what happens to a gradient estimate before it is applied.

A transform is a pure function (part of ĝ for one tensor, that tensor's state) → part of the step. Its
state is created in it, in float32 whatever the weights' dtype, and lives in the optimizer's `state`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Transform = Callable[[Tensor, dict[str, Any]], Tensor]


def identity(gradient: Tensor, state: dict[str, Any]) -> Tensor:
    """h(ĝ) = ĝ: ZO-SGD. Needs no ĝ in memory: the optimizer adds its terms to the weights in one pass."""
    return gradient
