"""How much memory a computation takes, found on the `meta` device: every tensor has its size there and no numbers.

The computation runs as it would, and the bytes of all tensors that are alive at once are counted. What a
fused attention kernel keeps to itself is left out, as the kernel leaves it out.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_of(compute: Callable[[], object]) -> int:
    """Bytes of the tensors that `compute` makes, at their most.

    >>> def compute():
    ...     a = torch.empty(1000, dtype=torch.float32, device="meta")
    ...     b = (a + 1) * 2
    ...     del b
    ...     return a.sum()
    >>> peak_of(compute)
    12000
    """
    live = _Live()
    with Assumed(), live, _fused_attention():
        compute()
    return live.peak


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

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {_key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and _key(t) not in given | self._known:
                self._count(t)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = _key(tensor), storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _Attention(torch.autograd.Function):
    """The memory of a fused attention kernel: its output; for a backward pass also what it was given."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        query, key, value, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@contextmanager
def _fused_attention() -> Iterator[None]:
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
