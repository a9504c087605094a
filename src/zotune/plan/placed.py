"""What a placement of the weights, or slices of them, change in a prediction: which bytes a device holds, which not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from zotune.llm.config.step import ModelOptions
from zotune.llm.models.placement.device_map import CPU, Placement, is_placed, placement_of
from zotune.llm.models.placement.plans import plan_of, replace_layer_number
from zotune.model.layers import stack_of
from zotune.plan.memory import Memory


@dataclass(frozen=True)
class Places:
    """Where the weights of a run lie.

    Attributes:
        weights: bytes of the weights by place, those of the checkpoint on "disk" among them.
        layer: bytes of the largest layer that visits the memory of the device, and how many do at a time.
        layers_at_once: how many such layers are there at a time.
        written: bytes that the run writes beside the checkpoint: copies of the layers that are tuned, or converted.
        state: bytes of the state of their updates.
        folder: where they are written; None for the memory of the CPU.
    """

    weights: dict[str, int]
    layer: int
    layers_at_once: int
    written: int
    state: int
    folder: str | None

    def to_json(self) -> dict[str, object]:
        """As one JSON object."""
        return asdict(self)

    def __str__(self) -> str:
        parts = [f"the weights lie in {', '.join(f'{place} {mib(n)}' for place, n in sorted(self.weights.items()))}"]
        if self.layer:
            layers = "a layer" if self.layers_at_once == 1 else f"{self.layers_at_once} layers"
            parts.append(f"{layers} of {mib(self.layer)} at a time in the memory of the device")
        if self.written:
            where = "the memory of the CPU" if self.folder is None else self.folder
            state = f" and {mib(self.state)} of state" if self.state else ""
            parts.append(f"{mib(self.written)} of copies{state} written to {where}")
        elif self.layer:
            parts.append("nothing of them is written")
        return "; ".join(parts)


def placement_in_plan(options: ModelOptions, module: nn.Module, *, on_cpu: bool) -> Placement | None:
    """The placement that options ask for, of a model on `meta`; None if all weights lie on one device.

    Raises:
        UsageError: the device map is none of this model, or does not work.
    """
    if not is_placed(options):
        return None
    named = options.device if options.device != "auto" else "cuda"
    return placement_of(options, module, torch.device(CPU if on_cpu else named))


def with_placement(
    memory: Memory, placement: Placement, tuned: Iterable[Tensor], options: ModelOptions, stored: torch.dtype
) -> tuple[Memory, Places]:
    """Correct a prediction in which all weights and states are in one memory; returns also where they lie.

    Args:
        memory: the prediction.
        placement: where the weights lie.
        tuned: the tuned tensors.
        options: the folder for what is written.
        stored: the precision of the checkpoint, of which what is converted is written too.
    """
    streamed = {id(p): p for of_layer in placement.streamed_matrices for p in of_layer}
    weights = placement.bytes_by_place()
    others = sum(size for place, size in weights.items() if place != str(placement.device))
    all_tuned = list(tuned)
    tuned_there = [p for p in all_tuned if id(p) in streamed]
    converted = [p for p in streamed.values() if p.is_floating_point() and p.dtype != stored and options.offload_folder]
    share = sum(p.numel() for p in tuned_there) / max(1, sum(p.numel() for p in all_tuned))
    state = round(memory.state * share)
    visiting = placement.layers_at_once * placement.largest_layer
    places = Places(
        weights,
        placement.largest_layer,
        placement.layers_at_once,
        _nbytes({id(p): p for p in [*tuned_there, *converted]}.values()),
        state,
        None if options.offload_folder is None else str(options.offload_folder),
    )
    resident = memory.weights - others + visiting
    return replace(memory, weights=resident, loading=0, state=memory.state - state), places


@dataclass(frozen=True)
class Slices:
    """What each process holds of a model that is cut over several.

    Attributes:
        shard: how it is cut, "fsdp" or "tp".
        num_processes: how many hold it.
        weights: bytes of the weights that lie in a process.
        gathered: bytes of whole weights that are there besides during a pass, at most.
        state: bytes of the state of their updates in a process.
    """

    shard: str
    num_processes: int
    weights: int
    gathered: int
    state: int

    def to_json(self) -> dict[str, object]:
        """As one JSON object."""
        return asdict(self)

    def __str__(self) -> str:
        besides = f", and up to {mib(self.gathered)} that are gathered for a pass" if self.gathered else ""
        state = f" and {mib(self.state)} of state" if self.state else ""
        return (
            f"each of {self.num_processes} processes ({self.shard}) holds {mib(self.weights)} of the weights{state}"
            f"{besides}; the expected memory is that of one process"
        )


def with_shards(
    memory: Memory, model: Any, adapter: Iterable[Tensor], shard: str, num_processes: int
) -> tuple[Memory, Slices]:
    """Correct a prediction in which one process holds all weights and states; returns also what a process holds.

    Args:
        memory: the prediction.
        model: the base model of transformers, on `meta`.
        adapter: the tensors of an adapter beside it.
        shard: how it is cut, "fsdp" or "tp".
        num_processes: over how many processes.
    """
    whole = {id(p): p for p in adapter}
    if shard == "tp":
        cut = plan_of(model)[0]
        names = ((replace_layer_number(name), p) for name, p in model.named_parameters())
        whole |= {id(p): p for name, p in names if name not in cut and name.rpartition(".")[0] not in cut}
    own = _nbytes(whole.values())
    part = -(-(memory.weights - own) // num_processes) + own
    gathered = 0
    if shard == "fsdp":  # what is outside of the layers, while a pass runs, and two layers: one that runs, and the next
        inside = [list(layer.parameters()) for layer in stack_of(model)[1]]
        outside = memory.weights - own - sum(map(_nbytes, inside))
        gathered = outside + 2 * max(map(_nbytes, inside), default=0)
    state = memory.state if own and shard == "fsdp" else -(-memory.state // num_processes)
    # A model with tied tensors is read whole before it is cut.
    loading = memory.weights if shard == "fsdp" and getattr(model, "all_tied_weights_keys", None) else 0
    slices = Slices(shard, num_processes, part, gathered, state)
    return replace(memory, weights=part + gathered, loading=max(0, loading - part - gathered), state=state), slices


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in tensors)


def mib(n: int) -> str:
    """Format a number of bytes in MiB, or in GiB from 8 GiB on.

    >>> mib(3 << 20), mib(12 << 30)
    ('3 MiB', '12.0 GiB')
    """
    return f"{n / 2**20:.0f} MiB" if n < 2**33 else f"{n / 2**30:.1f} GiB"
