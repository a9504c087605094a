"""The states of torch's own random generators, which zotune reads and never moves on."""

from __future__ import annotations

import torch
from torch import Tensor


def generator_states() -> tuple[Tensor, ...]:
    """The states of the generators of the CPU and of all GPUs in use; none while a CUDA graph is captured."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return (torch.default_generator.get_state(),)
    if torch.cuda.is_current_stream_capturing():
        return ()
    return torch.default_generator.get_state(), *torch.cuda.get_rng_state_all()


def is_same_state(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    """Whether two results of `generator_states` are equal; one that could not be read equals any other.

    >>> before = generator_states()
    >>> _ = torch.rand(1)
    >>> is_same_state(before, before), is_same_state(before, generator_states())
    (True, False)
    """
    return not one or not other or all(map(torch.equal, one, other))
