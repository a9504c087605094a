"""Which device holds each module of a model: by accelerate, from a file, or all but the stack of layers on one device.

A device map is that of transformers and accelerate: from the path of a module to a GPU's number, a device's name, "cpu"
or "disk". What lies on "disk", or on "cpu" beside a GPU, is brought to the device that computes when it is used.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from zotune.errors import UsageError, listed
from zotune.llm.config.safe_yaml import parse_yaml
from zotune.llm.config.step import COMPUTED_MAPS, ModelOptions, StepOptions
from zotune.llm.models.placement.devices import usable
from zotune.model.layers import stack_of
from zotune.model.streaming import matrices_of
from zotune.system.peak_memory import free_memory

Device = int | str
DISK, CPU = "disk", "cpu"


def is_placed(options: ModelOptions) -> bool:
    """Whether options ask for more than one place for the weights."""
    return options.device_map is not None or options.offload_folder is not None


@dataclass(frozen=True)
class Placement:
    """Where the parts of a model lie.

    Attributes:
        module: the model, on `meta` or with weights.
        map: the device map: paths of modules or parameters, and their devices.
        device: the device that computes what lies on "disk", or on "cpu" beside a GPU.
    """

    module: nn.Module
    map: dict[str, Device]
    device: torch.device

    def of(self, name: str) -> Device | None:
        """Return the place of a parameter or a module, by the longest path in the map that leads to it."""
        parts = name.split(".")
        paths = (".".join(parts[:n]) for n in range(len(parts), -1, -1))
        return next((self.map[path] for path in paths if path in self.map), None)

    @property
    def explicit(self) -> dict[str, Device]:
        """The map as accelerate needs it: without a place for all others, each module by itself or with all in it."""
        found: dict[str, Device] = {}

        def place(module: nn.Module, path: str) -> None:
            names = [name for name, _ in module.named_parameters(prefix=path, remove_duplicate=False)]
            places = {self.of(name) for name in names} or {self.of(path)}
            if len(places) == 1:
                found[path] = next(iter(places)) or str(self.device)
                return
            direct = (name for name, _ in module.named_parameters(prefix=path, recurse=False))
            found.update((name, self.of(name) or str(self.device)) for name in direct)
            for name, child in module.named_children():
                place(child, f"{path}.{name}" if path else name)

        place(self.module, "")
        return found

    def is_offloaded(self, place: Device | None) -> bool:
        """Whether what lies there is elsewhere while it computes."""
        return place == DISK or (place == CPU and self.device.type != CPU)

    @cached_property
    def streamed_layers(self) -> list[int]:
        """The numbers of the layers of the stack that are streamed."""
        path, layers = stack_of(self.module)
        names = (f"{path}.{i}" if path else str(i) for i in range(len(layers)))
        return [i for i, name in enumerate(names) if self.is_offloaded(self.of(name))]

    @cached_property
    def streamed_matrices(self) -> list[list[nn.Parameter]]:
        """The parameters of each of these layers that are not in the device's memory between two uses.

        They are those at the first use of this attribute: an adapter that is added later stays in memory.
        """
        _, layers = stack_of(self.module)
        return matrices_of(self.module, [layers[i] for i in self.streamed_layers])

    def bytes_by_place(self) -> dict[str, int]:
        """Return the bytes of the weights in each place, tied ones once, by the name of the place."""
        streamed = {id(p) for of_layer in self.streamed_matrices for p in of_layer}
        sizes: dict[str, int] = defaultdict(int)
        for name, p in self.module.named_parameters():
            place = self.of(name)
            is_resident = self.is_offloaded(place) and id(p) not in streamed and self._in_streamed_layer(name)
            sizes[_name_of(str(self.device) if is_resident or place is None else place)] += p.numel() * p.element_size()
        return dict(sizes)

    def _in_streamed_layer(self, name: str) -> bool:
        path, _ = stack_of(self.module)
        prefix = f"{path}." if path else ""
        number = name.removeprefix(prefix).split(".")[0]
        return name.startswith(prefix) and number.isdigit() and int(number) in self.streamed_layers

    @property
    def largest_layer(self) -> int:
        """Bytes of the largest streamed layer."""
        sizes = (sum(p.numel() * p.element_size() for p in of_layer) for of_layer in self.streamed_matrices)
        return max(sizes, default=0)

    @property
    def layers_at_once(self) -> int:
        """How many streamed layers are in the memory of the device: on a GPU the next one too."""
        return min(1 if self.device.type == CPU else 2, len(self.streamed_layers))


def placement_of(options: ModelOptions, module: nn.Module, device: torch.device) -> Placement:
    """Return where the parts of a model lie, by the options.

    Args:
        options: with a device map or an offload folder.
        module: the model, on `meta`.
        device: the device of the options; a device map names its own.

    Raises:
        UsageError: the map is none of this model, or what it asks for cannot work here; the message says why.
    """
    if options.device_map is None:
        placement = Placement(module, _around_layers(module, device), device)
    else:
        found = _computed(options.device_map, module) if options.device_map in COMPUTED_MAPS else _read(options)
        gpus = [place for place in found.values() if place not in (CPU, DISK)]
        main = torch.device(CPU) if not gpus else torch.device(_name_of(gpus[0]))
        placement = Placement(module, found, main)
    _check(placement, options)
    assert len(placement.streamed_matrices) == len(placement.streamed_layers)
    return placement


def check_here(placement: Placement, options: ModelOptions) -> None:
    """Check that the devices of a placement are here, and have the memory for it.

    Raises:
        UsageError: they have not; the message says what to do.
    """
    for place in set(placement.map.values()) - {CPU, DISK}:
        usable(place, f"the device map names the device {place!r}, which")
    _check_memory(placement, options)
    _check_room(placement, options)


def _around_layers(module: nn.Module, device: torch.device) -> dict[str, Device]:
    """The stack of layers on the disk, everything else on a device."""
    stack, layers = stack_of(module)
    if not layers:
        raise UsageError(f"{type(module).__name__} has no stack of layers that could be streamed from a file.")
    found: dict[str, Device] = {}

    def place(owner: nn.Module, path: str) -> None:
        for name, _ in owner.named_parameters(prefix=path, recurse=False):
            found[name] = str(device)
        for name, child in owner.named_children():
            full = f"{path}.{name}" if path else name
            if full == stack:
                found.update({f"{full}.{i}": DISK for i in range(len(layers))})
            elif stack.startswith(f"{full}."):
                place(child, full)
            else:
                found[full] = str(device)

    place(module, "")
    return found


def _computed(name: str, module: Any) -> dict[str, Device]:
    """The map that accelerate makes for the memory of this machine's devices."""
    from accelerate.utils import get_balanced_memory, get_max_memory, infer_auto_device_map

    whole = list(getattr(module, "_no_split_modules", None) or ())
    sequential = name == "sequential"
    memory = get_max_memory() if sequential else get_balanced_memory(module, no_split_module_classes=whole)
    return dict(infer_auto_device_map(module, max_memory=memory, no_split_module_classes=whole))


def _read(options: ModelOptions) -> dict[str, Device]:
    """The map in a file of JSON or YAML.

    Raises:
        UsageError: the file cannot be read, or holds no map.
    """
    path = Path(str(options.device_map))
    try:
        found = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"device_map: {options.device_map!r} is no file, and none of {', '.join(COMPUTED_MAPS)}."
        ) from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"the device map {path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(found, dict) or not found or not all(isinstance(v, int | str) for v in found.values()):
        raise UsageError(
            f"the device map {path} must map paths of modules to devices, as in "
            '{"model.embed_tokens": 0, "model.layers.0": "disk", "lm_head": "cpu"}.'
        )
    return {str(key): value for key, value in found.items()}


def _check(placement: Placement, options: ModelOptions) -> None:
    """Check that a device map can work for its model.

    Raises:
        UsageError: it cannot; the message says why and what to do.
    """
    named = list(placement.module.named_parameters(remove_duplicate=False))
    if missing := [name for name, _ in named if placement.of(name) is None]:
        raise UsageError(
            f"the device map does not say where {listed(missing)} {'lie' if len(missing) > 1 else 'lies'}; name "
            'each module, or "" for all others.'
        )
    tied: dict[int, list[str]] = defaultdict(list)
    for name, p in named:
        tied[id(p)].append(name)
    for names in tied.values():
        if len(places := {str(placement.of(name)): name for name in names}) > 1:
            both = " and ".join(f"{name} on {place}" for place, name in places.items())
            raise UsageError(
                f"the device map puts tied weights, which are one tensor, in two places: {both}. Give all of them one "
                "place."
            )
    if DISK in placement.map.values() and options.offload_folder is None:
        offloaded = [name for name, place in placement.map.items() if place == DISK]
        raise UsageError(
            f"{listed(offloaded)} of {options.model} would lie on the disk: the devices have no room for them. Give a "
            "folder for what is written there, --offload-folder FOLDER, or use a smaller model."
        )


def _check_memory(placement: Placement, options: ModelOptions) -> None:
    """Check that what lies in the device's memory, and the layers that visit it, fit there."""
    on_device = placement.bytes_by_place().get(_name_of(str(placement.device)), 0)
    visiting = placement.layers_at_once * placement.largest_layer
    free = memory_of(placement.device)
    if on_device + visiting > free:
        raise UsageError(
            f"{options.model} does not fit: {placement.device} has {gib(free)} free, and the modules that stay there "
            f"take {gib(on_device)}, the largest layer {gib(placement.largest_layer)}"
            f"{' (two at a time)' * (placement.layers_at_once == 2)}. Use --dtype bfloat16, a quantised base, or a "
            "device with more memory."
        )


def _check_room(placement: Placement, options: ModelOptions) -> None:
    """Check that the offload folder's disk holds the copies of the streamed layers that a run would tune."""
    if not isinstance(options, StepOptions) or options.offload_folder is None or options.tuning != "full":
        return
    # Of some layers a copy that finds no room says so.
    if options.tuned_layers or options.only_layer is not None or options.tuned_parameters:
        return
    needed = sum(p.numel() * p.element_size() for of_layer in placement.streamed_matrices for p in of_layer)
    there = next(path for path in (options.offload_folder, *options.offload_folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise UsageError(
            f"the offload folder {str(options.offload_folder)!r} has no room: the copies of the layers to tune take "
            f"{gib(needed)}, and {gib(free)} are free. Choose another --offload-folder, or tune an adapter "
            "(--tuning lora), whose base is only read."
        )


def memory_of(device: torch.device) -> int:
    """Return the bytes of a device that are free."""
    return free_memory() if device.type == CPU else int(torch.cuda.mem_get_info(device)[0])


def _name_of(place: Device) -> str:
    return f"cuda:{place}" if isinstance(place, int) else place


def gib(n: int) -> str:
    """Format a number of bytes in GiB, or in MiB below one.

    >>> gib(3 << 30), gib(5 << 20)
    ('3.00 GiB', '5 MiB')
    """
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"
