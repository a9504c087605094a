"""One tuned tensor: its name and id, and the memory that holds its numbers, which may be offloaded or in shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from zotune.errors import UsageError
from zotune.model.shards import LocalShard, Span, is_distributed, lies_as, like, local, whole
from zotune.noise.checks import FLOATING


@dataclass(frozen=True, eq=False)
class TunedTensor:
    """One tuned tensor: its canonical name, id, parameter, and the modules that own it, with its name in each.

    `shard` is the slice that this process holds; None where it holds all of the tensor. Of a tensor that was read
    whole it is None as well, wherever its numbers lie otherwise.
    """

    name: str
    id: int
    parameter: nn.Parameter
    places: tuple[tuple[nn.Module, str], ...]
    shard: LocalShard | None = None

    @property
    def is_offloaded(self) -> bool:
        """Whether the weights are offloaded: in the model only while a module runs."""
        return self.parameter.is_meta

    @property
    def is_held(self) -> bool:
        """Whether the weights are somewhere in memory."""
        return not self.is_offloaded or held_in_memory(*self.places[0]) is not None

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.storage().device if self.is_offloaded else self.parameter.device

    def storage(self) -> Tensor:
        """The tensor that holds the weights: the parameter's own, or the one it is loaded from when used.

        Of a distributed tensor it holds the numbers of this process.
        """
        if not self.is_offloaded:
            return local(self.parameter).data  # type: ignore[no-any-return]
        stored = held_in_memory(*self.places[0])
        if stored is None:
            raise UsageError(
                f"the tuned tensor {self.name!r} is on the meta device and its weights are not held in memory, "
                "so an update would be lost. Offload the model to the CPU rather than to disk, or freeze this tensor."
            )
        return stored

    def numbers(self) -> Tensor:
        """All numbers of the tensor, gathered where it lies in shards: every process has to call this."""
        return self.storage() if self.shard is None else whole(self.parameter.detach())

    def spans(self, start: int, size: int, most: int) -> Iterator[Span]:
        """Numbers start … start + size - 1 of the storage, in spans of at most `most`; see `zotune.model.shards`."""
        if self.shard is not None:
            yield from self.shard.spans(start, size, most)
            return
        for lo in range(0, size, most):
            yield Span(slice(lo, min(lo + most, size)), start + lo)

    def distributed(self, numbers: Tensor) -> Tensor:
        """A tensor that lies where this one does, of the numbers for this process's part; flat ones get its shape."""
        numbers = numbers.view(local(self.parameter).shape)
        return numbers if self.shard is None else like(self.parameter, numbers)

    def placed(self, value: Tensor) -> Tensor:
        """A tensor of this one's shape, whole or on the processes of any mesh, where this one lies."""
        if self.shard is None or value.shape != self.parameter.shape:
            return self.placed_whole(value)
        if is_distributed(value) and lies_as(value, self.parameter):
            return value
        return self.distributed(self.shard.cut(whole(value)).to(self.device).contiguous())

    def placed_whole(self, value: Tensor) -> Tensor:
        """All of a tensor, whole or on the processes of any mesh, on this one's device."""
        place = self.device if self.is_held else self.parameter.device
        return whole(value).to(place)  # type: ignore[no-any-return]

    def is_loaded_as(self, value: object) -> bool:
        """Whether `value` now stands in the parameter's place in a module: a hook may have loaded or gathered it."""
        return any(owner._parameters.get(attribute) is value for owner, attribute in self.places)


def check_kind(t: TunedTensor) -> None:
    """Refuse a tensor whose numbers the noise cannot be added to where they lie."""
    p: Any = local(t.parameter)
    what = f"the tensor {t.name!r}"
    if not p.is_floating_point():
        raise UsageError(
            f"{what} has dtype {p.dtype}; only floating-point tensors can be tuned. Freeze it, and tune an adapter on "
            "top of it."
        )
    if is_traceable_wrapper_subclass(p):
        raise UsageError(
            f"{what} is a {type(t.parameter.data).__name__}, which only wraps the tensors that hold its numbers "
            "(integers, of a quantised layer); it cannot be tuned. Freeze it, and tune an adapter on top of it."
        )
    if p.dtype not in FLOATING or p.layout is not torch.strided:
        which = f"dtype {p.dtype}" if p.dtype not in FLOATING else f"layout {p.layout}"
        raise UsageError(
            f"{what} has {which}; what can be tuned is dense and of float32, float64, bfloat16 or float16, for a probe "
            "has to fit between two of a dtype's numbers. Convert it, or freeze it and tune an adapter on top of it."
        )


def held_in_memory(module: nn.Module, attribute: str) -> Tensor | None:
    """The tensor that an offloaded parameter is loaded from, if it stays in memory between two uses."""
    stored = _offload_map(module)
    first, second = (None if stored is None else stored[attribute] for _ in range(2))
    if first is None or second is None or first.data_ptr() != second.data_ptr():
        return None
    return first  # type: ignore[no-any-return]


def _offload_map(module: nn.Module) -> Any:
    """Where an offloading hook (that of `accelerate`) keeps a module's weights, if it has one."""
    hook: Any = getattr(module, "_hf_hook", None)
    for candidate in getattr(hook, "hooks", [hook]):
        if getattr(candidate, "weights_map", None) is not None:
            return candidate.weights_map
    return None
