"""Several probes in one forward pass: the batch is repeated, and each copy of it meets its own perturbed weights.

The probes of one step differ in nothing but the weights. Run side by side, a probe's two ends read W and make u
once, what is not tuned is computed for all copies at once, and a small adapter's copies are one batched product.
A copy is a contiguous share of the first dimension of whatever depends on the batch: a tensor that meets a perturbed
one is cut there, and what comes of a perturbed tensor alone is kept once a copy. Where a model mixes examples, or
carries them elsewhere than along the first dimension, that is not so; `is_separable` finds out by trying.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from zotune import noise
from zotune.directions.low_rank import linear
from zotune.directions.samplers import Factors
from zotune.estimate.perturb import WeightOffset, antithetic_pair, largest_piece, nbytes, piece_elements, pieces
from zotune.model import matmul as gemm
from zotune.model.intercept import METADATA, Interceptor
from zotune.model.parameters import ParameterSet, TunedTensor
from zotune.system import limits

# Each number of their result depends on the numbers at its own place alone.
_ELEMENTWISE: frozenset[Any] = frozenset(
    (torch.mul, torch.add, torch.sub, torch.div, Tensor.mul, Tensor.add, Tensor.sub, Tensor.div)
)


# What arguments of a function may be that hold tensors.
_LOOKED_INTO = (list, tuple, dict)


class NotSeparableError(Exception):
    """Some computation mixes the copies of a batch."""


class side_by_side(Interceptor):  # noqa: N801 - a context manager reads like a verb
    """Within this context the i-th of equal shares of a batch meets the tuned tensors with the i-th offset.

    Args:
        tuned: the tuned tensors of a model.
        offsets: of the same tensors; as many as there are copies of the batch.

    Raises:
        NotSeparableError: within the context, where a result would mix the copies.
        UnreadTensorError: as `ParameterInterceptor`.

    Extra memory: as `zotune.estimate.perturb.perturbed_by`, once for each offset, and all vectors, up to 16 MiB.
    """

    def __init__(self, tuned: ParameterSet, offsets: Sequence[WeightOffset]) -> None:
        super().__init__(tuned, offsets[0].tensors)
        self._offsets, self._copies = tuple(offsets), len(offsets)
        self._ends = antithetic_pair(offsets)
        self._factors_of_u: dict[torch.device, dict[int, Factors]] = {}
        self._keeps = nbytes(tuned, self.chosen) * self._copies <= limits.CACHED_BYTES
        self._kept: dict[int, Tensor] = {}
        self._vectors_are_to_come = not self._offloaded
        self._derived: dict[int, list[Tensor]] = {}
        self._derived_bytes = 0
        self._scratch: Tensor | None = None
        # Identities of what differs from copy to copy. What was derived is kept, so that nothing else gets its own.
        self._differing = {id(t.parameter) for t in tuned if t.id in self.chosen}
        self._constant = frozenset(map(id, chain(tuned.model.parameters(), tuned.model.buffers())))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._scratch = None
        self._factors_of_u.clear()
        self._kept.clear()
        self._derived.clear()
        super().__exit__(kind, error, trace)

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in METADATA or not (self._differs(args) or (kwargs and self._differs(kwargs))):
            return gemm.linear(*args, **kwargs) if func is F.linear else func(*args, **kwargs)
        special = self.special.get(func)
        result = None if special is None else special(self, *args, **kwargs)
        return self._apart(func, args, kwargs) if result is None else result

    def _differs(self, value: Any) -> bool:
        """Whether `value` holds a tensor that differs between the copies."""
        if isinstance(value, (list, tuple)):
            # Written out, for every function of a forward pass waits for it.
            for item in value:
                if id(item) in self._differing or (isinstance(item, _LOOKED_INTO) and self._differs(item)):
                    return True
                if self._offloaded and self.find(item) is not None:
                    return True
            return False
        if isinstance(value, dict):
            return self._differs(tuple(value.values()))
        return id(value) in self._differing or (bool(self._offloaded) and self.find(value) is not None)

    def _apart(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """Call the function with each copy's own arguments and join the results."""
        leaves, structure = tree_flatten((args, kwargs))
        own = [self._values(leaf) if isinstance(leaf, Tensor) and self._differs(leaf) else None for leaf in leaves]
        shared = [values is None and self._is_of_the_batch(leaf) for leaf, values in zip(leaves, own, strict=True)]
        if func in _ELEMENTWISE and len(leaves) == 2 and any(shared):
            joined = self._elementwise(func, leaves, own)
            if joined is not None:
                return joined
        sizes = {leaf.shape[0] for leaf, is_shared in zip(leaves, shared, strict=True) if is_shared}
        for i, leaf in enumerate(leaves):
            if shared[i]:
                own[i] = list(leaf.tensor_split(self._copies))
            elif (values := own[i]) is not None:
                own[i] = self._shares(leaf, values, sizes)
        results = []
        for copy in range(self._copies):
            each = [leaf if values is None else values[copy] for leaf, values in zip(leaves, own, strict=True)]
            its_args, its_kwargs = tree_unflatten(each, structure)
            try:
                results.append(func(*its_args, **its_kwargs))
            except (RuntimeError, IndexError) as error:
                raise NotSeparableError(f"a copy's own arguments do not fit together: {error}") from error
        return _joined(results) if any(shared) else self._derive(results)

    def _shares(self, leaf: Tensor, values: list[Tensor], sizes: set[int]) -> list[Tensor]:
        """Each copy's share of a value that perturbed tensors gave for the whole batch, such as virtual tokens."""
        if id(leaf) not in self._derived or leaf.dim() < 3 or leaf.shape[0] not in sizes:
            return values
        return [value.tensor_split(self._copies)[copy] for copy, value in enumerate(values)]

    def _elementwise(
        self, func: Callable[..., Any], leaves: list[Any], own: list[list[Tensor] | None]
    ) -> Tensor | None:
        """The same in one call, where each copy's vector meets the batch along its last dimensions."""
        if sum(values is not None for values in own) != 1:
            return None
        place = 0 if own[0] is not None else 1
        values, batch = own[place], leaves[1 - place]
        assert values is not None
        if values[0].dim() >= batch.dim():
            return None
        ones = (1,) * (batch.dim() - values[0].dim())
        pair = [batch.unflatten(0, (self._copies, -1))] * 2
        pair[place] = torch.stack(values).view(self._copies, *ones, *values[0].shape)
        result: Tensor = func(*pair)
        return result.flatten(0, 1)

    def _is_of_the_batch(self, value: Any) -> bool:
        """Whether `value` appears to hold a share for each copy."""
        return (
            isinstance(value, Tensor)
            and value.dim() >= 2
            and value.shape[0] % self._copies == 0
            and id(value) not in self._constant
        )

    def _derive(self, results: list[Any]) -> Any:
        """Keep the copies' values that were computed from perturbed tensors alone; the first copy's tensor represents
        them.
        """
        if all(isinstance(result, (tuple, list)) for result in results):
            return type(results[0])(self._derive(list(parts)) for parts in zip(*results, strict=True))
        if not all(isinstance(result, Tensor) for result in results):
            raise NotSeparableError("a number was read off a perturbed tensor")
        num_bytes = sum(r.numel() * r.element_size() for r in results)
        self._derived_bytes += num_bytes
        if num_bytes > limits.DERIVED_BYTES or self._derived_bytes > limits.ALL_DERIVED_BYTES:
            raise NotSeparableError("what is made of perturbed tensors alone would take much memory")
        self._derived[id(results[0])] = results
        self._differing.add(id(results[0]))
        return results[0]

    def _values(self, value: Tensor) -> list[Tensor]:
        """Each copy's own version of a tensor."""
        if id(value) in self._derived:
            return self._derived[id(value)]
        return list(self._perturbed(self._noted(value), value))

    def _noted(self, value: Tensor) -> TunedTensor:
        """The tuned tensor that `value` is, recorded as read."""
        tensor = self.find(value)
        assert tensor is not None
        return self.note(tensor)

    def _perturbed(self, tensor: TunedTensor, value: Tensor) -> Tensor:
        """The whole tensor perturbed, once a copy: (copies, *shape)."""
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

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        if torch.is_grad_enabled() or weight.dim() != 2 or self._differs(input) or not self._is_of_the_batch(input):
            return None
        if bias is not None and bias.shape != weight.shape[:1]:  # one that is broadcast
            return None
        tensor = self.find(weight)
        if tensor is not None and (factors := self._factors(tensor, weight.device)) is not None:
            self.note(tensor)
            own = None if bias is None or not self._differs(bias) else self._stacked(bias)
            out = linear(input, weight.detach(), bias if own is None else None, factors, own)
        elif 0 < weight.shape[1] <= piece_elements(weight.device.type):
            out = self._product(input.reshape(self._copies, -1, input.shape[-1]), weight, bias, tensor)
        else:
            return None
        return out.view(*input.shape[:-1], weight.shape[0])

    def _bias(self, bias: Tensor) -> Tensor:
        """(copies or 1, 1, out)."""
        return (self._stacked(bias) if self._differs(bias) else bias[None]).unsqueeze(1)

    def _stacked(self, value: Tensor) -> Tensor:
        """Each copy's own version of a tensor: (copies, *shape)."""
        if id(value) in self._derived:
            return torch.stack(self._derived[id(value)])
        return self._perturbed(self._noted(value), value)

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

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None, tensor: TunedTensor | None) -> Tensor:
        """Each copy's product with its own weights, plus bias: (copies, rows, out). `tensor` is the tuned tensor, if
        any.
        """
        own = None if bias is None else self._bias(bias)
        if tensor is None and not self._differs(weight):
            if own is None or x.dtype not in noise.HALF:
                out = gemm.linear(x, weight)
                return out if own is None else out.add_(own)
            # The sum is rounded once: a small difference of biases would be lost in a product that was rounded before.
            return torch.stack([F.linear(rows, weight, b) for rows, b in zip(x, own[:, 0], strict=True)])
        if tensor is None:
            return gemm.products(x, self._stacked(weight), own)
        self.note(tensor)
        if self._keeps:
            return gemm.products(x, self._perturbed(tensor, weight), own)
        return self._by_pieces(x, tensor, weight.detach(), own)

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
        found = self.lookup(input, weight, max_norm)
        if found is None:
            return None
        tensor, indices, places = found
        each = self._rows(tensor, weight, indices)
        if not self._is_of_the_batch(input):
            derived: Tensor = self._derive([F.embedding(places, rows) for rows in each])
            return derived
        shares = places.tensor_split(self._copies)
        return torch.cat([F.embedding(share, rows) for share, rows in zip(shares, each, strict=True)])

    def _rows(self, tensor: TunedTensor, weight: Tensor, indices: Tensor) -> list[Tensor]:
        """Some rows of a matrix, perturbed for each copy."""
        found = []
        for offset in self._offsets:
            rows = F.embedding(indices, weight.detach())
            offset.move_rows(rows, indices, tensor)
            found.append(rows)
        return found


side_by_side.special = {F.linear: side_by_side._linear, F.embedding: side_by_side._embedding}


def _joined(results: list[Any]) -> Any:
    """Concatenate the copies' results (tensors, or tuples of tensors) along the first dimension."""
    if all(isinstance(result, Tensor) and result.dim() for result in results):
        return torch.cat(results)
    if all(isinstance(result, tuple) for result in results):
        return type(results[0])(_joined(list(parts)) for parts in zip(*results, strict=True))
    raise NotSeparableError("a result has no dimension along which the copies could lie")
