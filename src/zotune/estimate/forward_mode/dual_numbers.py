"""The model with tangents: each tuned tensor is dual, x with the tangent u, while a torch function reads it.

The derivative rules of torch want the whole of u for a tensor, and multiply by tangents that are zero. Those that
matter for a language model's time and memory are written out: linear layers, embeddings, attention, layer norms, the
loss over a vocabulary. Norms are taken in single precision, for their rule overflows in float16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map_only

from zotune.directions.direction import Direction
from zotune.directions.low_rank import add_products
from zotune.estimate.forward_mode.jvp_rules import attention, layer_norm
from zotune.estimate.perturb import OffsetAlong, WeightOffset, pieces
from zotune.model.intercept import ParameterInterceptor
from zotune.model.parameters import ParameterSet, TunedTensor
from zotune.system import limits


class DualParameters(ParameterInterceptor):
    """Within this context each tuned tensor is read as a dual one: x with the tangent `scale` · u, made at that moment.

    It belongs into a `torch.autograd.forward_ad.dual_level()`.
    """

    def __init__(self, tuned: ParameterSet, direction: Direction, scale: float = 1.0) -> None:
        super().__init__(tuned, direction.tensors)
        self._u: WeightOffset = OffsetAlong(direction, scale)

    def read(self, tensor: TunedTensor, value: Tensor) -> Tensor:
        """The whole tensor with its tangent."""
        tangent = torch.zeros(value.shape, dtype=value.dtype, device=value.device)
        flat = tangent.view(-1)
        self._u.move(flat, flat, tensor, 0)
        return dual(value.detach(), tangent)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """Y = x Wᵀ + b and Ẏ = ẋ Wᵀ + x Uᵀ + ḃ, without products of what is zero and without a whole U."""
        tensor = self.find(weight)
        if torch.is_grad_enabled() or weight.dim() != 2 or not 0 < weight.shape[1] <= limits.TANGENT_ELEMENTS:
            return None
        if tensor is None and (tangent_of(weight) is not None or not any(map(self._has_tangent, (input, bias)))):
            return None
        (x, x_tangent), w = unpack(self.replace(input)), weight.detach()
        b, b_tangent = (None, None) if bias is None else unpack(self.replace(bias))
        y = F.linear(x, w, b)
        if x_tangent is not None:
            tangent = F.linear(x_tangent, w, b_tangent)
        else:
            tangent = torch.zeros_like(y) if b_tangent is None else torch.empty_like(y).copy_(b_tangent)
        if tensor is not None:
            self._add_product(tangent.view(-1, y.shape[-1]), x.to(y.dtype).reshape(-1, x.shape[-1]), self.note(tensor))
        return dual(y, tangent)

    def pair(self, args: tuple[Any, ...]) -> tuple[tuple[Any, Tensor | None], tuple[Any, Tensor | None]] | None:
        """Two arguments, each with its tangent; None for other arguments, or where neither has a tangent."""
        if len(args) != 2:
            return None
        one, other = (unpack(self.replace(a)) if isinstance(a, Tensor) else (a, None) for a in args)
        return None if one[1] is None and other[1] is None else (one, other)

    def _has_tangent(self, value: Tensor | None) -> bool:
        return value is not None and (self.find(value) is not None or tangent_of(value) is not None)

    def _add_product(self, out: Tensor, x: Tensor, tensor: TunedTensor) -> None:
        """Out += x Uᵀ, with U made some rows at a time, or by its factors."""
        if (factors := self._u.factors(tensor, out.device)) is not None:
            add_products(out, x, [factors])
            return
        ranges, width = pieces((out.shape[1], x.shape[1]), limits.TANGENT_ELEMENTS), x.shape[1]
        scratch = out.new_empty(ranges[0][1] * width if ranges else 0)
        for lo, hi in ranges:
            piece = scratch[: (hi - lo) * width].zero_()
            self._u.move(piece, piece, tensor, lo * width)
            out[:, lo:hi].addmm_(x, piece.view(hi - lo, width).t())

    def _embedding(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor | None:
        """Look up the distinct rows alone, with their tangents."""
        found = self.lookup(input, weight, max_norm)
        if found is None:
            return None
        tensor, indices, places = found
        rows = weight.detach()[indices]
        tangents = torch.zeros_like(rows)
        self._u.move_rows(tangents, indices, tensor)
        return F.embedding(places, dual(rows, tangents))

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor | None:
        """As `zotune.estimate.forward_mode.jvp_rules.attention`."""
        given, device = (query, key, value), query.device.type
        # Autocast would take the products to half precision that are made in single precision here.
        is_cast = device != "meta" and torch.is_autocast_enabled(device)
        if torch.is_grad_enabled() or dropout_p or is_cast or self._has_tangent(attn_mask):
            return None
        if any(t.dim() != 4 for t in given) or not any(map(self._has_tangent, given)):
            return None
        pairs = [unpack(self.replace(t)) for t in given]
        q, k, v = (primal for primal, _ in pairs)
        dq, dk, dv = (torch.zeros_like(primal) if tangent is None else tangent for primal, tangent in pairs)
        return dual(*attention((q, k, v), (dq, dk, dv), attn_mask, is_causal=is_causal, scale=scale))

    def _layer_norm(
        self,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor | None:
        """As `zotune.estimate.forward_mode.jvp_rules.layer_norm`."""
        # Autocast computes it in single precision, and leaves it there.
        is_cast = input.is_cuda and torch.is_autocast_enabled("cuda")
        if is_cast or not any(map(self._has_tangent, (input, weight, bias))):
            return None
        x, w, b = ((None, None) if t is None else unpack(self.replace(t)) for t in (input, weight, bias))
        primal, tangent = x
        assert primal is not None
        return dual(*layer_norm(primal, tangent, normalized_shape, w, b, eps))

    def _cross_entropy(
        self,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor | None:
        """Some rows of a large vocabulary's logits at a time."""
        unusual = weight is not None or size_average is not None or reduce is not None or target.is_floating_point()
        if unusual or input.dim() != 2 or input.numel() <= limits.LOGIT_ELEMENTS or self.find(input) is not None:
            return None
        rows = max(1, limits.LOGIT_ELEMENTS // input.shape[1])
        each = partial(F.cross_entropy, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing)
        losses = torch.cat(list(map(each, torch.split(input, rows), torch.split(target, rows))))
        if reduction == "none":
            return losses
        return losses.sum() if reduction == "sum" else losses.sum() / (target != ignore_index).sum()


def _product(reading: DualParameters, *args: Any, **kwargs: Any) -> Tensor | None:
    """The product x y with the tangent ẋ y + x ẏ, in one pass less than torch's rule takes."""
    if kwargs or (pair := reading.pair(args)) is None:
        return None
    (x, dx), (y, dy) = pair
    if dx is None or dy is None:
        return dual(x * y, x * dy if dx is None else dx * y)
    return dual(x * y, (dx * y).addcmul_(x, dy) if x.dtype == y.dtype else dx * y + x * dy)


def _sum(reading: DualParameters, *args: Any, **kwargs: Any) -> Tensor | None:
    """The sum x + y, with ẋ + ẏ."""
    if kwargs or (pair := reading.pair(args)) is None:
        return None
    (x, dx), (y, dy) = pair
    total = x + y
    if dx is not None and dy is not None:
        return dual(total, dx + dy)
    tangent = dy if dx is None else dx
    assert tangent is not None
    # A copy: what is done to one dual tensor in place is done to its tangent too.
    return dual(total, tangent.to(total.dtype).expand_as(total).clone())


def _in_single_precision(norm: Callable[..., Tensor]) -> Callable[..., Tensor | None]:
    """A norm's rule for half precision, where its derivative has a factor 1/σ³ that float16 cannot hold."""

    def special(reading: DualParameters, input: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        device = input.device.type
        if input.dtype not in (torch.float16, torch.bfloat16) or (
            device == "cuda" and torch.is_autocast_enabled(device)  # which computes it in single precision itself
        ):
            return None
        given = reading.replace((input, *args)), reading.replace(kwargs)
        wide_args, wide = tree_map_only(Tensor, Tensor.float, given)
        return norm(*wide_args, **wide).to(input.dtype)

    return special


DualParameters.special = {
    F.linear: DualParameters._linear,
    F.embedding: DualParameters._embedding,
    F.scaled_dot_product_attention: DualParameters._attention,
    F.cross_entropy: DualParameters._cross_entropy,
    # Of tangents that are zero torch's rules for these make tensors, by a detour through Python.
    torch.mul: _product,
    Tensor.mul: _product,
    torch.add: _sum,
    Tensor.add: _sum,
    F.layer_norm: DualParameters._layer_norm,
    **{norm: _in_single_precision(norm) for norm in (F.group_norm, F.rms_norm)},
}


def dual(primal: Tensor, tangent: Tensor) -> Tensor:
    """A tensor with a tangent: its shape and dtype."""
    return forward_ad.make_dual(primal, tangent)  # type: ignore[no-any-return, no-untyped-call]


def unpack(value: Tensor) -> tuple[Tensor, Tensor | None]:
    """Primal and tangent; None for a tangent that is absent, or known to be zero."""
    primal, tangent = forward_ad.unpack_dual(value)  # type: ignore[no-untyped-call]
    return primal, None if tangent is None or tangent._is_zerotensor() else tangent


def tangent_of(value: Tensor) -> Tensor | None:
    """The tangent; None if it is absent, or known to be zero."""
    return unpack(value)[1]
