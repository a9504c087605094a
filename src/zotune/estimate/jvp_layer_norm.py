"""Layer normalization and its tangent.

torch's own rule takes some twenty passes over the batch. With x̂ = (x - mean)/σ of each row, of y = x̂ ∘ w + b the
tangent is ẏ = (J ẋ) ∘ w + x̂ ∘ ẇ + ḃ, where J = ∂x̂/∂x is symmetric: J ẋ is what back-propagation makes of ẋ, in one
pass, and the rest is the layer itself with ẇ and ḃ for its parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Pair = tuple[Tensor | None, Tensor | None]


def layer_norm(
    x: Tensor, tangent: Tensor | None, shape: Sequence[int], weight: Pair, bias: Pair, eps: float
) -> tuple[Tensor, Tensor]:
    """As `F.layer_norm`, with its tangent.

    Args:
        x: (…, *shape).
        tangent: ẋ, alike; None for zero.
        shape: of what is normalized.
        weight: w and ẇ, of that shape; None for one, and for zero.
        bias: b and ḃ, of that shape; None for zero.
        eps: what is added to σ².

    Returns:
        y and ẏ, like x. Half precision is computed in single precision: 1/σ may be too much for float16.

    >>> x, w = torch.randn(5, 8), torch.randn(8)
    >>> y, tangent = layer_norm(x, x, (8,), (w, None), (None, None), eps=0.0)
    >>> bool(tangent.abs().max() < 1e-5)  # the length of a row does not matter
    True
    """
    half = x.dtype in (torch.float16, torch.bfloat16)
    wide, dx, w, dw, b, db = (t.float() if half and t is not None else t for t in (x, tangent, *weight, *bias))
    assert wide is not None
    y, mean, rstd = torch.native_layer_norm(wide, shape, w, b, eps)
    found = None
    if dx is not None:
        back, wanted = torch.ops.aten.native_layer_norm_backward, (True, False, False)
        found = back(dx.contiguous(), wide, shape, mean, rstd, None, None, wanted)[0]
        found = found if w is None else found * w
    if dw is not None:
        rest = torch.native_layer_norm(wide, shape, dw, db, eps)[0]
        found = rest if found is None else found + rest
    elif db is not None:
        found = db.expand_as(y) if found is None else found + db
    found = torch.zeros_like(y) if found is None else found
    return y.to(x.dtype), found.to(x.dtype)
