"""What the kernels may be given: they follow raw pointers, so whatever is wrong must be said before they do.

A kernel reads plain, dense, contiguous memory of one device. A tensor that stands for something else (a shard of a
distributed tensor, integers with a scale, a shape without numbers) has an address too, or none at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from zotune.errors import UsageError

_PLAIN = frozenset({Tensor, nn.Parameter})
_INT64 = frozenset({torch.int64})
SINGLE = frozenset({torch.float32})
HALF = frozenset({torch.bfloat16, torch.float16})
FLOATING = frozenset({torch.float32, torch.float64}) | HALF


def check_alike(kernel: str, x: Tensor, *others: Tensor, dtypes: frozenset[torch.dtype] = FLOATING) -> None:
    """Check tensors that a kernel goes through side by side: each is readable, of one dtype, device and size.

    Two of them are the same memory, or share none.

    Raises:
        UsageError: with what a tensor is, and what it should be.
    """
    check_readable(kernel, x, dtypes)
    for other in others:
        check_readable(kernel, other, dtypes)
        if other.dtype != x.dtype or other.device != x.device or other.numel() != x.numel():
            raise _refusal(kernel, f"{_words(other)} does not go with {_words(x)}: dtype, device and size must agree")
    check_overlap(kernel, (x, *others))


def check_readable(kernel: str, x: Tensor, dtypes: frozenset[torch.dtype] = FLOATING) -> None:
    """Check that the numbers of a tensor lie in memory one after the other, in a dtype that the kernel reads.

    Raises:
        UsageError: they do not.
    """
    if type(x) not in _PLAIN or torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise _refusal(
            kernel,
            f"a {type(x).__name__} stands for numbers that lie elsewhere (in shards, in other dtypes, in a batch of "
            "torch.func.vmap, or nowhere). Tune plain tensors: the local ones of a distributed model, or an adapter",
        )
    if x.layout is not torch.strided or x.is_nested:
        raise _refusal(kernel, f"{_words(x)} has the layout {x.layout}; call to_dense() first, or freeze it")
    if x.dtype not in dtypes:
        allowed = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        raise _refusal(kernel, f"{_words(x)} is given where {allowed} is read; convert it, or freeze it")
    if not x.is_contiguous():
        raise _refusal(kernel, f"{_words(x)} has gaps between its numbers (stride {x.stride()}); call contiguous()")
    if x.is_meta:
        return
    if x.is_neg() or x._is_zerotensor():
        raise _refusal(kernel, f"{_words(x)} is a view of numbers that are computed when they are read; clone it")
    if not x.data_ptr() and x.numel():
        raise _refusal(
            kernel,
            f"the memory of {_words(x)} was freed, as sharding wrappers free it between two passes. Gather the "
            "parameters while steps are taken",
        )


def check_overlap(kernel: str, tensors: Sequence[Tensor]) -> None:
    """Check that any two tensors are the same memory or have none in common.

    Raises:
        UsageError: two overlap in part, so that one would be read after it was written as the other.
    """
    if tensors[0].is_meta:
        return
    spans = [(x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()) for x in tensors]
    for i, (begin, end) in enumerate(spans):
        for other in spans[:i]:
            if other != (begin, end) and begin < other[1] and other[0] < end:
                raise _refusal(kernel, "two of its tensors share a part of their memory; copy one of them")


def check_span(kernel: str, start: int, seeds: Sequence[int], scales: Sequence[float]) -> None:
    """Check where a slice begins, and that each seed has its scale.

    Raises:
        UsageError: a start is negative, or the numbers of seeds and scales differ or are 0.
    """
    if start < 0 or not seeds or len(seeds) != len(scales):
        raise _refusal(kernel, f"it starts at {start} with {len(seeds)} seeds and {len(scales)} scales")


def check_rows(kernel: str, rows: Tensor, indices: Tensor) -> None:
    """Check a matrix of gathered rows and the number that each has in the whole matrix.

    Raises:
        UsageError: they do not go together.
    """
    check_readable(kernel, rows)
    check_readable(kernel, indices, _INT64)
    if rows.dim() != 2 or indices.shape != rows.shape[:1] or indices.device != rows.device:
        raise _refusal(kernel, f"{_words(indices)} does not number the rows of {_words(rows)}")


def check_factors(
    kernel: str, x: Tensor, factors: Sequence[tuple[Tensor, Tensor]], scales: Sequence[float], rows: int, columns: int
) -> None:
    """Check thin factors of matrices: left (≥ rows, r) and right (columns, r), float32, on the device of x, of one r.

    Raises:
        UsageError: they do not fit the matrix.
    """
    if not factors or len(factors) != len(scales):
        raise _refusal(kernel, f"there are {len(factors)} pairs of factors and {len(scales)} scales")
    rank = factors[0][0].shape[-1]
    for left, right in factors:
        for side in (left, right):
            check_readable(kernel, side, SINGLE)
        fits = left.dim() == 2 and left.shape[0] >= rows and left.shape[1] == rank and right.shape == (columns, rank)
        if not fits or rank < 1 or not left.device == right.device == x.device:
            raise _refusal(
                kernel,
                f"the factors {_words(left)} and {_words(right)} are not those of {rows} rows of {columns} columns",
            )


def check_states(kernel: str, x: Tensor, states: Iterable[Tensor]) -> None:
    """Check an optimizer's state: float32, on the device of x and as large as x.

    Raises:
        UsageError: it is not.
    """
    for state in states:
        check_readable(kernel, state, SINGLE)
        if state.device != x.device or state.numel() != x.numel():
            raise _refusal(kernel, f"the state {_words(state)} does not belong to {_words(x)}; load the state again")
        check_overlap(kernel, (x, state))


def refuse(kernel: str, what: str) -> UsageError:
    """An error of a kernel's arguments."""
    return _refusal(kernel, what)


def _refusal(kernel: str, what: str) -> UsageError:
    return UsageError(f"the noise's {kernel} cannot be computed: {what}.")


def _words(x: Tensor) -> str:
    return f"a tensor of {str(x.dtype).removeprefix('torch.')}, shape {tuple(x.shape)}, on {x.device}"
