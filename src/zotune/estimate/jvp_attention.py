"""Attention and its tangent: scaled dot products, differentiated along tangents of query, key and value.

torch's own rule takes the general way through a safe softmax, in some thirty passes over the matrix of scores, all
examples' at once. Here it is written out: with S = s Q Kᵀ and P = softmax(S), of O = P V the tangent is

    Ṡ = s (Q̇ Kᵀ + Q K̇ᵀ),   Ṗ = P ∘ (Ṡ - (P ∘ Ṡ) 1 1ᵀ),   Ȯ = Ṗ V + P V̇.
"""

from __future__ import annotations

import math
from itertools import chain, repeat

import torch
from torch import Tensor

Triple = tuple[Tensor, Tensor, Tensor]

# Scores at a time, in whole examples: 4 MiB in single precision.
_SCORES = 1 << 20


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
    size = max(1, _SCORES // max(1, heads * length * keys))
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
