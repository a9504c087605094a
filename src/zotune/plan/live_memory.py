"""How much memory a computation takes, found on the `meta` device: every tensor has its size there and no numbers.

The computation runs as it would, and the bytes of all tensors that are alive at once are counted. What a
fused attention kernel keeps to itself is left out, as the kernel leaves it out.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_of(compute: Callable[[], object], *, fused: bool = True) -> int:
    """Bytes of the tensors that `compute` makes, at their most. `fused`: attention runs a fused kernel.

    >>> def compute():
    ...     a = torch.empty(1000, dtype=torch.float32, device="meta")
    ...     b = (a + 1) * 2
    ...     del b
    ...     return a.sum()
    >>> peak_of(compute)
    12000
    """
    return peaks_of(compute, lambda: 0, fused=fused)[0]


def peaks_of(
    compute: Callable[[], object], beside: Callable[[], int], *, fused: bool = True, own_pages: int = 0
) -> tuple[int, int]:
    """As `peak_of`, and what `beside` said at that moment.

    Tensors of less than `own_pages` bytes lie in a heap that does not become smaller: it counts with its greatest size,
    and half of that again for the holes that small tensors leave where larger ones lay.
    """
    live = _Live(beside, own_pages)
    with Assumed(), live, fused_attention() if fused else nullcontext():
        compute()
    return live.peak, live.beside_peak


class Assumed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within this context a model on `meta` may ask for a number: conditions hold, anything else is 0.

    What models ask is whether a mask masks nothing or positions are those of one sequence, which here they are.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return args[0].dtype == torch.bool
        return func(*args, **(kwargs or {}))


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that are made while it is active."""

    def __init__(self, beside: Callable[[], int], own_pages: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._beside, self._own_pages = beside, own_pages
        self._large = self._small = self._heap = 0
        self.peak: int = 0
        self.beside_peak: int = 0
        self._known: set[int] = set()

    @property
    def now(self) -> int:
        """Bytes that are taken."""
        return self._large + self._heap * 3 // 2

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._reach(self.now)
        given = {_key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        if func in _WITH_A_COPY:
            self._reach(self.now + args[0].numel() * args[0].element_size())
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and _key(t) not in given | self._known:
                self._count(t)
        # Gradients of several uses are added up in place, but not under a mode: the first goes once the sum is there.
        if func is not torch.ops.aten.add.Tensor or torch._C._current_graph_task_id() == -1:
            self._reach(self.now)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = _key(tensor), storage.nbytes()
        self._known.add(key)
        self._change(size, 1)
        weakref.finalize(storage, self._forget, key, size)

    def _reach(self, now: int) -> None:
        if now > self.peak:
            self.peak, self.beside_peak = now, self._beside()

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._change(size, -1)

    def _change(self, size: int, sign: int) -> None:
        """So many bytes are there from now on, or no longer."""
        if size < self._own_pages:
            self._small += sign * size
            self._heap = max(self._heap, self._small)
        else:
            self._large += sign * size


# Operations that make a copy of what they are given and let it go before they return.
_WITH_A_COPY = (torch.ops.aten.logsumexp.default,)


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _Attention(torch.autograd.Function):
    """The memory of a fused attention kernel: its output and, for a backward pass, what it was given.

    Queries are (…, heads, length, size). The kernels lay out their output as (…, length, heads, size), so that heads
    can be joined without a copy; with it comes a number for each head and position, by which weights are made again.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        *batch, heads, length, _ = query.shape
        out = query.new_empty((*batch, length, heads, value.shape[-1])).transpose(-2, -3)
        sums = query.new_empty((*batch, heads, length), dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Within this context scaled dot-product attention makes its output and no matrix of scores.

    The function itself is replaced: a mode would not be there when checkpointed layers run again.
    """
    own = F.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        return _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]

    F.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own
