"""Tensors in shards: which numbers of a whole tensor this process holds, where their noise is that of the whole.

A parameter of FSDP2 or of a tensor-parallel plan is a `DTensor`: each process holds a slice of it along one dimension.
An element's noise is that of its index in the whole tensor, so a shard's numbers are cut into *spans* that follow one
another there. A slice of rows is one span. A slice of columns is a run a row: short runs are put into whole rows,
which are computed as those of any tensor and from which the runs are cut again. It takes the noise of the whole rows,
and no kernel needs to know of shards.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from zotune.errors import UsageError
from zotune.system import limits


def is_distributed(value: object) -> bool:
    """Whether a value is a DTensor, which stands for a tensor whose numbers may lie on several processes."""
    module = sys.modules.get("torch.distributed.tensor")  # there is none before it is imported
    return module is not None and isinstance(value, module.DTensor)


def local(value: Any) -> Any:
    """The numbers of a DTensor that this process holds, in the memory where they lie; any other value as it is."""
    return value._local_tensor if is_distributed(value) else value


def like(value: Any, numbers: Tensor) -> Tensor:
    """The DTensor that lies on its processes as `value` does, made of the numbers that this process holds of it."""
    from torch.distributed.tensor import DTensor

    where = {"shape": value.shape, "stride": value.stride(), "run_check": False}
    return DTensor.from_local(numbers, value.device_mesh, value.placements, **where)


def lies_as(one: Any, other: Any) -> bool:
    """Whether two DTensors lie on the same processes in the same way."""
    return bool(one.device_mesh == other.device_mesh and one.placements == other.placements)


def whole(value: Any) -> Any:
    """All numbers of a DTensor, gathered: every process of its mesh has to call this. Any other value as it is."""
    return value.full_tensor() if is_distributed(value) else value


def gathered(tree: Any, *, keep: bool = True) -> Any:
    """A tree (of dicts and lists) with each DTensor in it whole and on the CPU, gathered one after the other.

    Every process of the mesh has to call this; one that does not `keep` them gets None in their place. A DTensor that
    is there twice is gathered once.
    """
    found: dict[int, Tensor | None] = {}

    def gather(value: Any) -> Any:
        if not is_distributed(value):
            return value
        if id(value) not in found:
            numbers = value.detach().full_tensor()
            found[id(value)] = numbers.cpu() if keep else None
        return found[id(value)]

    return tree_map(gather, tree)


@dataclass(frozen=True)
class Span:
    """Some of a shard's flat numbers, as a part of the whole tensor whose numbers follow one another.

    Attributes:
        local: which of the shard's numbers.
        start: the index in the whole tensor of the first number of a `widened` tensor.
        runs: where the numbers are runs of rows: how many rows, the numbers of a row, the first of a run and the run's
            length, and where in the runs `local` begins. None for numbers that follow one another as they are.
    """

    local: slice
    start: int
    runs: tuple[int, int, int, int, int] | None = None

    def widened(self, x: Tensor) -> Tensor:
        """A tensor over the span's numbers as one of numbers that follow one another; others than its own are 0."""
        if self.runs is None:
            return x
        rows, stride, first, run, skipped = self.runs
        wide = x.new_zeros(rows * stride)
        runs = x
        if x.numel() != rows * run:
            runs = x.new_zeros(rows * run)
            runs[skipped : skipped + x.numel()] = x
        wide.view(rows, stride)[:, first : first + run] = runs.view(rows, run)
        return wide

    def narrowed(self, wide: Tensor) -> Tensor:
        """The span's own numbers of a widened tensor."""
        if self.runs is None:
            return wide
        rows, stride, first, run, skipped = self.runs
        size = self.local.stop - self.local.start
        return wide.view(rows, stride)[:, first : first + run].reshape(-1)[skipped : skipped + size]


@dataclass(frozen=True)
class LocalShard:
    """The slice of a tensor that this process holds: indices start … start + size - 1 of dimension `dim`.

    >>> shard = LocalShard(torch.Size([2, 6]), dim=1, start=4, size=2)
    >>> shard.cut(torch.arange(12).view(2, 6)).tolist()
    [[4, 5], [10, 11]]
    >>> [(span.local, span.start) for span in shard.spans(0, 4, most=100)]
    [(slice(0, 4, None), 0)]
    >>> (span,) = shard.spans(1, 2, most=100)
    >>> span.widened(torch.tensor([5, 10])).tolist()
    [0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 10, 0]
    """

    shape: torch.Size
    dim: int
    start: int
    size: int

    def cut(self, value: Tensor) -> Tensor:
        """The slice of a whole tensor."""
        return value.narrow(self.dim, self.start, self.size)

    @cached_property
    def _inner(self) -> int:
        return self.shape[self.dim + 1 :].numel()

    def spans(self, start: int, size: int, most: int) -> Iterator[Span]:
        """The spans of the shard's numbers start … start + size - 1, of at most `most` numbers if a row has no more.

        Their `local` counts from `start`.
        """
        run, stride, first = self.size * self._inner, self.shape[self.dim] * self._inner, self.start * self._inner
        end, lo = start + size, start
        if not size:
            yield Span(slice(0, 0), first)
        while lo < end:
            row = lo // run
            rows = min(max(1, most // stride), -(-end // run) - row)
            if rows == 1 or run >= limits.RUN_ELEMENTS:
                hi = min(end, (row + 1) * run, lo + most)
                yield Span(slice(lo - start, hi - start), row * stride + first + lo - row * run)
            else:
                hi = min(end, (row + rows) * run)
                runs = (rows, stride, first, run, lo - row * run)
                yield Span(slice(lo - start, hi - start), row * stride, runs)
            lo = hi

    def sides(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor] | None:
        """The rows of thin factors (m, r) and (n, r) that the shard of their m × n matrix is the product of.

        None for a slice that is no matrix: that of an inner dimension.
        """
        if self.dim == 0:
            return self.cut(left), right
        return (left, right.narrow(0, self.start, self.size)) if len(self.shape) == 2 else None


def shard_of(name: str, p: Any) -> LocalShard | None:
    """The slice that this process holds of a parameter; None where it holds all of it.

    Raises:
        UsageError: the DTensor is placed otherwise than in slices along one dimension.
    """
    if not is_distributed(p):
        return None
    mesh, coordinate = p.device_mesh, p.device_mesh.get_coordinate()
    cut = [i for i, placement in enumerate(p.placements) if not placement.is_replicate() and mesh.size(i) > 1]
    plain = all(type(p.placements[i]).__name__ == "Shard" for i in cut)
    if coordinate is None or len(cut) > 1 or not plain:
        raise UsageError(
            f"the tensor {name!r} is a DTensor with the placements {tuple(p.placements)} on a mesh of "
            f"{tuple(mesh.shape)} processes{'' if coordinate else ', none of which is this one'}. What can be tuned is "
            "cut along one dimension (Shard) of one dimension of the mesh, or held whole (Replicate): shard the model "
            "by FSDP2 alone, or by a tensor-parallel plan alone."
        )
    if not cut:
        return None
    dim, number, place = p.placements[cut[0]].dim % p.dim(), mesh.size(cut[0]), coordinate[cut[0]]
    chunk = -(-p.shape[dim] // number)
    start = min(place * chunk, p.shape[dim])
    shard = LocalShard(p.shape, dim, start, min(chunk, p.shape[dim] - start))
    if local(p).shape[dim] != shard.size:
        raise UsageError(
            f"the tensor {name!r} is a DTensor of {p.shape[dim]} slices, of which process {place} of {number} holds "
            f"{local(p).shape[dim]}, not the {shard.size} that torch.chunk would give it, so the places of its numbers "
            "are unknown. Distribute it with fully_shard or distribute_tensor."
        )
    return shard


@torch.no_grad()
def assign_(name: str, p: Any, value: Tensor) -> None:
    """Write a whole tensor's numbers into a parameter: into one in shards those that this process holds."""
    shard = shard_of(name, p)
    local(p).copy_(value if shard is None else shard.cut(value))


def mesh_of(model: nn.Module) -> Any:
    """The mesh of the processes that a model lies on; None for a model of this process alone."""
    found: Any = next(filter(is_distributed, model.parameters()), None)
    return None if found is None else found.device_mesh


def is_gathered_by_fsdp(module: nn.Module) -> bool:
    """Whether FSDP2 gathers the parameters of a module for its forward pass."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def is_tensor_parallel(model: nn.Module) -> bool:
    """Whether some module computes with shards, so that processes exchange activations within a forward pass."""
    inside = {id(m) for outer in model.modules() if is_gathered_by_fsdp(outer) for m in outer.modules()}
    return any(id(m) not in inside and any(map(is_distributed, m._parameters.values())) for m in model.modules())


def check_gathers(model: nn.Module) -> None:
    """Refuse a model of which FSDP2 gathers other numbers than those of its parameters, once these are written.

    `fully_shard` keeps memory for each tensor that it finds. What is tied, or put into a module, afterwards has another
    (of slices of equal size the same, by chance).

    Raises:
        UsageError: it is so.
    """
    places = [found for module in model.modules() if is_gathered_by_fsdp(module) for found in _gathered(module)]
    number = Counter(tensor for tensor, _ in {(id(held), id(entry)) for entry, held, _ in places})
    for entry, held, has_run in places:
        if number[id(held)] > 1 or (has_run and entry.sharded_param is not held):
            where = f"{type(entry._module_info.module).__name__}.{entry._module_info.param_name}"
            raise UsageError(
                f"FSDP2 would gather numbers for {where} that an update does not change: the tensor was tied or "
                "replaced after fully_shard. Tie tensors first, and shard modules that share one by one call: "
                "fully_shard([embedding, head]), or fully_shard(model) for all that is outside of the layers."
            )


def _gathered(module: Any) -> Iterator[tuple[Any, Any, bool]]:
    """FSDP2's entries for the parameters that it gathers for a module: each with the parameter that is there now, and
    whether a pass has run.
    """
    for group in module._get_fsdp_state()._fsdp_param_groups:
        for entry in group.fsdp_params:
            info = entry._module_info
            owners = [(info.module, info.param_name), *zip(info.shared_modules, info.shared_param_names, strict=True)]
            for owner, name in owners:
                if is_distributed(held := owner._parameters.get(name)):
                    yield entry, held, group._reset_sharded_params


def reshard(model: nn.Module) -> None:
    """Let FSDP2 drop the weights that it has gathered, so that the model holds its shards, and the next pass reads them
    as they are then.
    """
    for module in model.modules():
        if is_gathered_by_fsdp(module):
            module.reshard()  # type: ignore[operator]


def agreed(mesh: Any, values: Sequence[float]) -> list[float]:
    """The numbers that all processes of a mesh go on with, given each one's own: their mean, where they differ.

    Processes that computed one objective have equal numbers, or some that differ by rounding; those that computed parts
    of a batch have its parts.
    """
    if mesh is None or mesh.size() == 1:
        return list(values)
    import torch.distributed as dist

    group = mesh.get_group() if mesh.ndim == 1 else None
    own = torch.tensor(values, dtype=torch.float64, device=mesh.device_type)
    found = [torch.empty_like(own) for _ in range(mesh.size())]
    dist.all_gather(found, own, group=group)
    return mean_of([row.tolist() for row in found])


def mean_of(rows: Sequence[Sequence[float]]) -> list[float]:
    """The mean of the processes' numbers, column by column; equal numbers stay as they are, to the bit.

    >>> mean_of([[0.1, 1.0], [0.1, 2.0], [0.1, 3.0]])
    [0.1, 2.0]
    """
    columns = zip(*rows, strict=True)
    return [own[0] if all(x == own[0] for x in own) else math.fsum(own) / len(own) for own in columns]
