"""Derivative rules written out for forward gradients: attention and layer normalization, each with its tangent.

torch's own rule for attention takes the general way through a safe softmax, in some thirty passes over the matrix of
scores of all examples at once. Here, with S = s Q Kᵀ and P = softmax(S), the tangent of O = P V is

    Ṡ = s (Q̇ Kᵀ + Q K̇ᵀ),   Ṗ = P ∘ (Ṡ - (P ∘ Ṡ) 1 1ᵀ),   Ȯ = Ṗ V + P V̇.

torch's rule for layer normalization takes some twenty passes over the batch. With x̂ = (x - mean)/σ of each row, the
tangent of y = x̂ ∘ w + b is ẏ = (J ẋ) ∘ w + x̂ ∘ ẇ + ḃ, where J = ∂x̂/∂x is symmetric: back-propagation's fused kernel
computes J ẋ in one pass, and the rest is the layer itself with ẇ and ḃ for its parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, repeat

import torch
from torch import Tensor

from zotune.system import limits

Pair = tuple[Tensor | None, Tensor | None]
Triple = tuple[Tensor, Tensor, Tensor]


def attention(
    primals: Triple,
    tangents: Triple,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """As `F.scaled_dot_product_attention`, with its tangent.

    Args:
        primals: query (batch, heads, length, e), key (batch, groups, keys, e), value (batch, groups, keys, v); heads
            are a multiple of groups, and neighbours share one.
        tangents: of these, alike.
        mask: over (batch, heads, length, keys): False or -∞ where a key is not seen; numbers are added to the scores.
        is_causal: position i sees the first i + 1 keys, besides the mask.
        scale: s; 1/√e by default.

    Returns:
        O and Ȯ, (batch, heads, length, v). Half precision is computed in single precision. A position that sees no key
        has zeros.

    >>> q, k, v = torch.randn(3, 2, 4, 5, 8).unbind()
    >>> o, tangent = attention((q, k, v), (q, torch.zeros_like(k), v), is_causal=True)
    >>> torch.allclose(o, torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True), atol=1e-6)
    True
    """
    query, key, _ = primals
    heads, length, keys = query.shape[1], query.shape[2], key.shape[2]
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    mask = _joined(mask, length, keys, query.device) if is_causal else mask
    size = max(1, limits.SCORE_ELEMENTS // max(1, heads * length * keys))
    parts = zip(*(torch.split(t, size) for t in chain(primals, tangents)), strict=True)
    masks = repeat(mask) if mask is None or mask.dim() < 4 or len(mask) == 1 else iter(torch.split(mask, size))
    done = [_of_some(part, its_mask, scale) for part, its_mask in zip(parts, masks, strict=False)]
    one, tangent = (torch.cat(side) if len(done) > 1 else side[0] for side in zip(*done, strict=True))
    return one, tangent


def _joined(mask: Tensor | None, length: int, keys: int, device: torch.device) -> Tensor:
    """A mask that hides what comes later too."""
    seen = torch.ones(length, keys, dtype=torch.bool, device=device).tril()
    if mask is None:
        return seen
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -math.inf)


def _of_some(tensors: tuple[Tensor, ...], mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    dtype, (batch, heads, length, _), groups = tensors[0].dtype, tensors[0].shape, tensors[1].shape[1]
    wide = dtype if dtype == torch.float64 else torch.float32
    # (batch · groups, positions, e): the heads that share a key lie one after the other.
    q, k, v, dq, dk, dv = (t.to(wide).reshape(batch * groups, -1, t.shape[3]) for t in tensors)
    q, dq = q * scale, dq * scale
    scores = torch.bmm(q, k.mT)
    slopes = torch.bmm(dq, k.mT).baddbmm_(q, dk.mT)
    if mask is None:
        p = torch.softmax(scores, dim=-1)
    else:
        p = _masked_softmax(scores.view(batch, heads, length, -1), mask).view_as(scores)
    slopes *= p
    slopes.addcmul_(p, slopes.sum(dim=-1, keepdim=True), value=-1)
    out, tangent = torch.bmm(p, v), torch.bmm(slopes, v).baddbmm_(p, dv)
    shape = (batch, heads, length, v.shape[2])
    return out.to(dtype).view(shape), tangent.to(dtype).view(shape)


def _masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Over the last dimension; zeros where nothing is seen, in place of 0/0."""
    if mask.dtype == torch.bool:
        seen = mask
        scores.masked_fill_(~mask, -math.inf)
    else:
        seen = mask != -math.inf
        scores += mask
    sees = seen.any(dim=-1, keepdim=True)
    # Such rows are not to be infinite throughout: of NaN the product with zero is NaN.
    return torch.softmax(scores.masked_fill_(~sees, 0.0), dim=-1).mul_(sees)


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
