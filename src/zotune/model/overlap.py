"""Whether tensors share numbers in memory, which an update of one would then change in the other."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def first_overlap(tensors: Iterable[tuple[str, Tensor]]) -> tuple[str, str] | None:
    """The names of two of the named tensors that have a number in common, of one with itself, or None.

    Views that only interleave, such as columns of one matrix, have none in common.

    >>> x = torch.zeros(4, 6)
    >>> first_overlap([("left", x[:, :3]), ("right", x[:, 3:])])
    >>> first_overlap([("left", x[:, :4]), ("right", x[:, 3:])])
    ('left', 'right')
    """
    spans = []
    for name, tensor in tensors:
        if not tensor.numel():
            continue
        if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
            return name, name
        spans.append((tensor.data_ptr(), tensor.data_ptr() + _extent(tensor), name, tensor))
    spans.sort(key=lambda span: span[:3])
    reaching: list[tuple[int, str, Tensor]] = []
    for begin, end, name, tensor in spans:
        reaching = [other for other in reaching if other[0] > begin]
        for _, other_name, other in reaching:
            if _share_bytes(other, tensor):
                return other_name, name
        reaching.append((end, name, tensor))
    return None


def _extent(tensor: Tensor) -> int:
    """Bytes from the tensor's first number to the end of its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _share_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors whose spans of memory meet have a byte in common; `other` begins no earlier."""
    if _is_dense(one) and _is_dense(other):
        return True
    begin = one.data_ptr()
    taken = torch.zeros(max(_extent(one), other.data_ptr() - begin + _extent(other)), dtype=torch.bool, device="cpu")
    _bytes_of(taken, one, 0).fill_(True)
    return bool(_bytes_of(taken, other, other.data_ptr() - begin).any())


def _is_dense(tensor: Tensor) -> bool:
    return _extent(tensor) == tensor.numel() * tensor.element_size()


def _bytes_of(memory: Tensor, tensor: Tensor, start: int) -> Tensor:
    """The tensor's bytes as a view of `memory`, a flag a byte."""
    size = tensor.element_size()
    return memory.as_strided((*tensor.shape, size), (*(s * size for s in tensor.stride()), 1), start)
