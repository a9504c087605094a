"""Several probes in one forward pass: each copy of the computation meets its own perturbed weights.

The probes of one step differ in nothing but the weights. Run side by side, a probe's two ends read W and make u
once, what does not depend on a tuned tensor is computed once for all copies, and a small adapter's copies are one
batched product. Which values differ between the copies is known, not guessed: the objective runs once under
`torch.func.vmap` over the perturbed weights, and torch follows each operation (`zotune.estimate.copies`). So a model
may mix its examples as it likes. An objective that has no meaning for all copies at once, because it reads a number
off a tensor or chooses rows by one, is refused.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from zotune import noise
from zotune.directions.low_rank import linear
from zotune.directions.samplers import Factors
from zotune.errors import UnreadTensorError
from zotune.estimate.copies import each_copy, is_innermost, stacked_copies, with_copies
from zotune.estimate.perturb import WeightOffset, antithetic_pair, largest_piece, nbytes, piece_elements, pieces
from zotune.model import matmul as gemm
from zotune.model.intercept import ParameterInterceptor, SpecialCase
from zotune.model.parameters import ParameterSet, TunedTensor
from zotune.system import limits


class NotSeparableError(Exception):
    """The objective has no meaning for several copies of the weights at once; the message says why."""


class copied(ParameterInterceptor, ABC):  # noqa: N801 - named as `perturbed_by`
    """The objective in several copies of the computation, each with tuned tensors of its own, from one forward pass.

    Subclasses say what a copy's tensors are. Arguments and exceptions are those of `ParameterInterceptor`, and `copies`
    says how many there are.
    """

    def __init__(self, tuned: ParameterSet, chosen: frozenset[int] | None, copies: int) -> None:
        super().__init__(tuned, chosen)
        self._copies, self._level = copies, 0

    @abstractmethod
    def _perturbed(self, tensor: TunedTensor, value: Tensor) -> Tensor:
        """The whole tensor perturbed, once a copy: (copies, *shape)."""

    @abstractmethod
    def _own_product(
        self, x: Tensor, tensor: TunedTensor, weight: Tensor, bias: Tensor | None, own: Tensor | None
    ) -> Tensor | None:
        """Each copy's product of its (rows, in) with its own weights, plus `bias` or its `own`: (copies, rows, out).

        None where it has to be made of the whole perturbed tensor.
        """

    def evaluate(self, objective: Callable[[], Tensor]) -> Tensor:
        """The values of `objective` at x plus each offset: (copies, *shape of one value). It is called once.

        Raises:
            NotSeparableError: an operation of the objective has no meaning for all copies at once.
            UnreadTensorError: a chosen tensor was not read.
        """

        def within(level: int) -> Tensor:
            self._level = level
            with self:
                return objective()

        try:
            return each_copy(within, self._copies)
        except (UnreadTensorError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            # An error of the objective's own is raised again by the probes that then run one after the other.
            raise NotSeparableError(str(error).splitlines()[0] if str(error) else type(error).__name__) from error

    def read(self, tensor: TunedTensor, value: Tensor) -> Tensor:
        """The whole tensor plus its offset in each copy."""
        return with_copies(self._perturbed(tensor, value), self._level)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        if torch.is_grad_enabled() or weight.dim() != 2 or not is_innermost(self._level):
            return None
        if bias is not None and bias.shape != weight.shape[:1]:  # one that is broadcast
            return None
        tensor, x = self.find(weight), self._stacked(input)
        if tensor is None and self._stacked(weight) is not None:
            return None
        own = None if bias is None else self._stacked(bias)
        if tensor is None and x is None and own is None:
            return gemm.linear(input, weight, bias)
        if x is None:
            x = input.expand(self._copies, *input.shape)
        if own is not None:
            bias = None
        rows = x.reshape(self._copies, -1, x.shape[-1])
        out = self._product(rows, weight.detach(), bias, own, tensor)
        if out is None:
            return None
        return with_copies(out.view(*x.shape[:-1], weight.shape[0]), self._level)

    def _stacked(self, value: Tensor) -> Tensor | None:
        """A value's numbers in all copies, (copies, *shape); None where they do not differ."""
        tensor = self.find(value)
        if tensor is not None:
            return self._perturbed(self.note(tensor), value)
        return stacked_copies(value, self._level)

    def _product(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, own: Tensor | None, tensor: TunedTensor | None
    ) -> Tensor | None:
        """As `_own_product`; `tensor` is None for weights that are the same in all copies."""
        if tensor is None:
            if own is not None and x.dtype in noise.HALF:
                # The sum is rounded once: a small difference of biases would be lost in a product rounded before.
                return torch.stack([F.linear(rows, weight, b) for rows, b in zip(x, own, strict=True)])
            out = gemm.linear(x, weight, bias)
            return out if own is None else out.add_(own.unsqueeze(1))
        return self._own_product(x, tensor, weight, bias, own)

    def _in_turn(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor | None:
        """The function of each copy's own arguments: of a norm, whose factors `vmap` would apply after it has rounded.

        In half precision it rounds once, as where no pass is shared.
        """
        leaves, structure = tree_flatten((args, kwargs))
        own = [self._stacked(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves]
        if all(each is None for each in own) or not is_innermost(self._level):
            return None
        results = []
        for copy in range(self._copies):
            pairs = zip(leaves, own, strict=True)
            its_args, its_kwargs = tree_unflatten([x if each is None else each[copy] for x, each in pairs], structure)
            results.append(function(*its_args, **its_kwargs))
        return with_copies(torch.stack(results), self._level)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> Tensor | None:
        """Attention treats each entry of its leading dimensions alone, so the copies may lie along the first one."""
        each = [self._stacked(x) for x in (query, key, value)]
        shapes = {x.shape[0] for x in (query, key, value)}
        if all(x is None for x in each) or query.dim() != 4 or len(shapes) != 1 or not is_innermost(self._level):
            return None
        pairs = zip((query, key, value), each, strict=True)
        q, k, v = (self._joined(x, own) for x, own in pairs)
        if attn_mask is not None:
            own_mask = self._stacked(attn_mask)
            if own_mask is not None or (attn_mask.dim() == 4 and attn_mask.shape[0] != 1):
                if attn_mask.dim() != 4 or attn_mask.shape[0] != query.shape[0]:
                    return None
                attn_mask = self._joined(attn_mask, own_mask)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, **kwargs)
        return with_copies(out.view(self._copies, -1, *out.shape[1:]), self._level)

    def _joined(self, value: Tensor, own: Tensor | None) -> Tensor:
        """The copies of (n, …), which are its `own` (copies, n, …) if it has any: (copies · n, …)."""
        return (value.expand(self._copies, *value.shape) if own is None else own).flatten(0, 1)


def _in_turn(function: Callable[..., Tensor]) -> SpecialCase:
    return lambda copies, *args, **kwargs: copies._in_turn(function, *args, **kwargs)


copied.special = {
    F.linear: copied._linear,
    F.scaled_dot_product_attention: copied._attention,
    **{norm: _in_turn(norm) for norm in (F.layer_norm, F.rms_norm, F.group_norm)},
}


class side_by_side(copied):  # noqa: N801 - named as `perturbed_by`
    """The objective at several offsets of the tuned tensors, from one forward pass.

    Args:
        tuned: the tuned tensors of a model.
        offsets: of the same tensors; one a copy.

    Extra memory: as `zotune.estimate.perturb.perturbed_by`, once for each offset, and all vectors, up to 16 MiB.
    """

    def __init__(self, tuned: ParameterSet, offsets: Sequence[WeightOffset]) -> None:
        super().__init__(tuned, offsets[0].tensors, len(offsets))
        self._offsets = tuple(offsets)
        self._ends = antithetic_pair(offsets)
        self._factors_of_u: dict[torch.device, dict[int, Factors]] = {}
        self._keeps = nbytes(tuned, self.chosen) * self._copies <= limits.CACHED_BYTES
        self._kept: dict[int, Tensor] = {}
        self._vectors_are_to_come = not tuned.is_loaded_by_hooks
        self._scratch: Tensor | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._scratch = None
        self._factors_of_u.clear()
        self._kept.clear()
        super().__exit__(kind, error, trace)

    def _perturbed(self, tensor: TunedTensor, value: Tensor) -> Tensor:
        """As `copied._perturbed`."""
        if value.dim() == 1 and self._vectors_are_to_come:
            self._vectors_are_to_come = False
            self._keep_vectors(value.dtype)
        if tensor.id in self._kept:
            return self._kept[tensor.id]
        source = value.detach().contiguous()
        out = source.new_empty((self._copies, *source.shape))
        self._move(list(out.view(self._copies, -1)), source.view(-1), tensor, 0)
        if self._keeps:
            self._kept[tensor.id] = out
        return out

    def _keep_vectors(self, dtype: torch.dtype) -> None:
        """Perturb all vectors of one dtype in one call: for many small tensors the calls take most of the time.

        Not on a GPU, where many tensors need a table on the device: a pass captured as a graph must not wait for it.
        """
        chosen = (t for t in self.tuned if t.id in self.chosen)
        found = [t for t in chosen if t.parameter.dim() == 1 and t.parameter.dtype == dtype]
        ids, sizes = [t.id for t in found], [t.parameter.numel() for t in found]
        small = sum(sizes) * dtype.itemsize * self._copies <= limits.CACHED_BYTES
        if self._ends is None or not small or any(t.parameter.device.type != "cpu" for t in found):
            return
        u, a = self._ends
        if (kernel := u.kernel(ids[0])) is not None:
            both = torch.cat([t.parameter.detach() for t in found]).repeat(2, 1)
            for end, scale in zip(both, (a, -a), strict=True):
                noise.foreach_axpy_(torch.split(end, sizes), ids, kernel, [u.seed], [scale], u.seed, noise.PROBE)
            self._kept.update(zip(ids, torch.split(both, sizes, dim=1), strict=True))

    def _move(self, outs: Sequence[Tensor], x: Tensor, tensor: TunedTensor, start: int) -> None:
        """Write the perturbed x for each copy: flat slices from element `start` on."""
        if self._ends is not None:
            u, a = self._ends
            if (kernel := u.kernel(tensor.id)) is not None:
                noise.axpy_pair(outs[0], outs[1], x, kernel, u.seed, a, tensor.id, start)
                return
        for out, offset in zip(outs, self._offsets, strict=True):
            offset.move(out, x, tensor, start)

    def _piece(self, tensor: TunedTensor, value: Tensor, lo: int, hi: int) -> Tensor:
        """Rows lo … hi - 1 of a matrix perturbed for each copy, in a shared scratch: (copies, hi - lo, columns)."""
        rows = value[lo:hi]
        scratch = self._scratch
        if scratch is None or scratch.dtype != value.dtype or scratch.device != value.device:
            size = largest_piece(self.tuned, self.chosen, piece_elements(value.device.type))
            self._scratch = scratch = value.new_empty(self._copies * size)
        piece = scratch[: self._copies * rows.numel()]
        self._move(piece.view(self._copies, -1).unbind(), rows.reshape(-1), tensor, lo * value.shape[1])
        return piece.view(self._copies, *rows.shape)

    def _own_product(
        self, x: Tensor, tensor: TunedTensor, weight: Tensor, bias: Tensor | None, own: Tensor | None
    ) -> Tensor | None:
        """As `copied._own_product`. None where a row of the matrix is larger than a piece."""
        if (factors := self._factors(tensor, weight.device)) is not None:
            self.note(tensor)
            return linear(x, weight, bias, factors, own)
        if not 0 < weight.shape[1] <= piece_elements(weight.device.type):
            return None
        self.note(tensor)
        each = own.unsqueeze(1) if own is not None else None if bias is None else bias.view(1, 1, -1)
        if self._keeps:
            return gemm.products(x, self._perturbed(tensor, weight), each)
        return self._by_pieces(x, tensor, weight, each)

    def _factors(self, tensor: TunedTensor, device: torch.device) -> list[Factors] | None:
        """The thin factors of each copy's offset; None where an offset is not of low rank."""
        if self._ends is not None:
            u, a = self._ends
            if device not in self._factors_of_u:
                self._factors_of_u[device] = u.all_factors(self.chosen, device)
            both = self._factors_of_u[device].get(tensor.id) or u.factors(tensor.id, device)
            rounding = u.seed, tensor.id
            return both if both is None else [Factors(both.left, both.right, end, rounding) for end in (a, -a)]
        found = [offset.factors(tensor, device) for offset in self._offsets]
        return None if None in found else [f for f in found if f is not None]

    def _by_pieces(self, x: Tensor, tensor: TunedTensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Each copy's product with its own perturbed weights, piece by piece: (copies, rows, out)."""
        ranges = pieces(weight.shape, piece_elements(weight.device.type))
        if len(ranges) == 1:
            return gemm.products(x, self._piece(tensor, weight, 0, weight.shape[0]), bias)
        out = x.new_empty((*x.shape[:-1], weight.shape[0]))
        for lo, hi in ranges:
            own = None if bias is None else bias[..., lo:hi]
            out[..., lo:hi] = gemm.products(x, self._piece(tensor, weight, lo, hi), own)
        return out

    def _embedding(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor | None:
        found = self.lookup(input, weight, max_norm) if is_innermost(self._level) else None
        if found is None:
            return None
        tensor, indices, places = found
        each = []
        for offset in self._offsets:
            rows = F.embedding(indices, weight.detach())
            offset.move_rows(rows, indices, tensor)
            each.append(F.embedding(places, rows))
        return with_copies(torch.stack(each), self._level)


side_by_side.special = {**copied.special, F.embedding: side_by_side._embedding}
