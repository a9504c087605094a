"""The peak memory of a computation, counted on the `meta` device, where tensors have sizes but no data.

The computation runs as usual, and the bytes of all tensors that are alive at the same time are counted. Attention can
be counted as a fused kernel, which does not store the matrix of scores.
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
    """Peak bytes of the tensors that `compute` allocates; with `fused`, attention runs as a fused kernel.

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
    """Peak bytes as `peak_of`, and the value of `beside` at the moment of the peak.

    Tensors smaller than `own_pages` bytes lie in a heap that never shrinks: it counts with its largest size, plus half
    of it for the gaps between small tensors (fragmentation).
    """
    live = _Live(beside, own_pages)
    with FakeScalars(), live, fused_attention() if fused else nullcontext():
        compute()
    return live.peak, live.beside_peak


class FakeScalars(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which `.item()` works on `meta`: boolean tensors give True, all others 0.

    Models ask whether a mask has no masked position and whether positions are those of one sequence; both are true for
    the batches here.
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
        """Bytes that are allocated."""
        return self._large + self._heap * 3 // 2

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._reach(self.now)
        inputs = {_key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        if func in _WITH_A_COPY:
            self._reach(self.now + args[0].numel() * args[0].element_size())
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and _key(t) not in inputs | self._known:
                self._count(t)
        # Autograd adds gradients of several uses in place, but not under a dispatch mode, where the first gradient is
        # freed once the sum exists; the moment with both does not count.
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
        """Add (`sign` 1) or remove (`sign` -1) an allocation of `size` bytes."""
        if size < self._own_pages:
            self._small += sign * size
            self._heap = max(self._heap, self._small)
        else:
            self._large += sign * size


# Operations that copy their input and free the copy before they return.
_WITH_A_COPY = (torch.ops.aten.logsumexp.default,)


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _Attention(torch.autograd.Function):
    """The memory of a fused attention kernel: its output and the tensors saved for a backward pass.

    Queries have shape (…, heads, length, size). The kernels store their output as (…, length, heads, size), so that
    heads can be joined without a copy, and one float32 per head and position, from which a backward pass recomputes the
    attention weights.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, sums = _attention_results(query, value)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attention_results(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    *batch, heads, length, _ = query.shape
    out = query.new_empty((*batch, length, heads, value.shape[-1])).transpose(-2, -3)
    return out, query.new_empty((*batch, heads, length), dtype=torch.float32)


@contextmanager
def fused_attention() -> Iterator[None]:
    """A context in which scaled dot-product attention allocates its output but no matrix of scores.

    The function itself is replaced, because a dispatch mode is not active when checkpointed layers run again.
    """
    original = F.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return _attention_results(query, value)[0]
        return _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]

    F.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original
