"""Values that differ between the copies of a computation, as `torch.func.vmap` carries them.

Under `vmap` code sees a tensor of one copy, and torch follows through each operation which tensors differ between the
copies: PyTorch defines, for every operation, a batching rule that equals a loop over the copies, or refuses. zotune
computes a few operations on all copies at once by kernels of its own, so it takes the stacked numbers out of such a
tensor, and puts them in. torch has these two conversions under a private name alone; they are called here and nowhere
else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._C import _functorch


def each_copy(compute: Callable[[int], Tensor], copies: int) -> Tensor:
    """The result of `compute` in each copy: shape (copies, *shape of one).

    Args:
        compute: is called once, with the level of `vmap` that carries the copies.
        copies: how many there are.

    Raises:
        RuntimeError, ValueError, …: as `vmap`, where an operation has no meaning for all copies at once, such as a
            number that is read off a tensor, or a random draw.

    >>> each_copy(lambda level: with_copies(torch.tensor([1.0, 2.0]), level) * 3, 2)
    tensor([3., 6.])
    """

    def compute_one(_: Tensor) -> Tensor:
        level = _functorch.maybe_current_level()
        assert level is not None
        return compute(level)

    with _without_warnings_of_loops():
        found: Tensor = torch.func.vmap(compute_one, randomness="error")(torch.arange(copies))
    return found


def with_copies(stacked: Tensor, level: int) -> Tensor:
    """The tensor of one copy whose numbers in all copies are `stacked`: (copies, *shape) to a tensor of `shape`."""
    return _functorch._add_batch_dim(stacked, 0, level)


def stacked_copies(value: Tensor, level: int) -> Tensor | None:
    """The numbers in all copies, (copies, *shape); None where they do not differ between the copies."""
    if not _functorch.is_batchedtensor(value) or _functorch.maybe_get_level(value) != level:
        return None
    dim = _functorch.maybe_get_bdim(value)
    stacked: Tensor = _functorch.get_unwrapped(value)
    return stacked.movedim(dim, 0) if dim else stacked


def is_innermost(level: int) -> bool:
    """Whether no other transformation of `torch.func` runs inside the copies, such as the objective's own `vmap`."""
    return _functorch.maybe_current_level() == level


@contextmanager
def _without_warnings_of_loops() -> Iterator[None]:
    """An operation without a batching rule runs once a copy, as it does where no pass is shared: no news for a user."""
    _functorch._set_vmap_fallback_warning_enabled(False)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        _functorch._set_vmap_fallback_warning_enabled(True)  # type: ignore[attr-defined]
