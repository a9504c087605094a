"""The tuned tensors: their identity, their names and ids, and the memory that holds their numbers.

Noise is keyed by a tensor's name, so a name must not change with wrappers, with the order in which
parameters are registered, or with which of two tied names comes first. `ParameterSet` settles that
once for a model: one entry a tensor, by identity, with a canonical name and its hash (`zotune.noise.spec.tensor_id`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from zotune.errors import UsageError
from zotune.model.overlap import first_overlap
from zotune.model.shards import (
    agreed,
    check_gathers,
    is_distributed,
    is_gathered_by_fsdp,
    is_tensor_parallel,
    local,
    mesh_of,
    reshard,
    shard_of,
)
from zotune.model.tuned_tensor import TunedTensor as TunedTensor
from zotune.model.tuned_tensor import check_kind, held_in_memory
from zotune.model.wrappers import check_not_sharded, joined, own_paths, without_wrappers
from zotune.noise.spec import NOISE_VERSION, tensor_id


def canonical_name(names: Iterable[str]) -> str:
    """The one name of a tensor that has several: without wrappers, the first in alphabetical order.

    >>> canonical_name(["model.embed.weight", "lm_head.weight"])
    'lm_head.weight'
    >>> canonical_name(["base_model.model._orig_mod.fc.weight"])
    'fc.weight'
    """
    return min(map(without_wrappers, names))


class ParameterSet:
    """The tuned tensors of a model, each once, in the order of the model's parameters.

    Attributes:
        noise_version: the version of the noise specification that the ids are of.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> _ = model[0].requires_grad_(False)
    >>> [t.name for t in ParameterSet(model)]
    ['1.weight', '1.bias']
    """

    def __init__(self, model: nn.Module, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Collect the parameters of `model` that require a gradient, or just those given.

        Raises:
            UsageError: there is none, one is not the model's, is not of floating point, is distributed in a way that
                hides its elements' places, two share an id or memory.
        """
        check_not_sharded(model)
        reshard(model)
        check_gathers(model)
        chosen = None if parameters is None else {id(p) for p in parameters}
        places: dict[object, list[tuple[str, nn.Module, str, nn.Parameter]]] = {}
        own, full_names = own_paths(model), dict[str, str]()
        for path, module in model.named_modules(remove_duplicate=False):
            for attribute, p in module._parameters.items():
                if p is not None and (p.requires_grad if chosen is None else id(p) in chosen):
                    name = joined(own[path], attribute)
                    places.setdefault(_identity(module, attribute, p), []).append((name, module, attribute, p))
                    full_names[joined(path, attribute)] = name
        found_ids = {id(p) for found in places.values() for *_, p in found}
        if chosen is not None and len(found_ids) < len(chosen):
            raise UsageError(
                f"{len(chosen) - len(found_ids)} of the parameters to tune do not belong to the model "
                f"({type(model).__name__}); pass parameters that model.named_parameters() lists."
            )
        self.model, self.noise_version = model, NOISE_VERSION
        self._tensors = [self._tensor(p) for p in places.values()]
        names = [[name for name, *_ in found] for found in places.values()]
        self._places = {name: i for i, own in enumerate(names) for name in map(_canonical, own)}
        self._places |= {name: i for i, own in enumerate(names) for name in own}
        self._places |= {full: self._places[name] for full, name in full_names.items()}
        self._mesh, self._has_shards_read_apart = mesh_of(model), is_tensor_parallel(model)
        self._index()
        self._check()

    def set_noise_version(self, version: int) -> None:
        """Give the tensors the ids of a version of the noise specification, for a run that began with it.

        Raises:
            UsageError: two of them have the same.
        """
        if version == self.noise_version:
            return
        self.noise_version = version
        self._tensors = [replace(t, id=tensor_id(t.name, version)) for t in self._tensors]
        self._index()
        self._check_ids()

    @staticmethod
    def _tensor(places: list[tuple[str, nn.Module, str, nn.Parameter]]) -> TunedTensor:
        name = canonical_name(place[0] for place in places)
        owners = tuple((module, attribute) for _, module, attribute, _ in places)
        return TunedTensor(name, tensor_id(name), places[0][3], owners, shard_of(name, places[0][3]))

    @classmethod
    def of(cls, model: nn.Module | ParameterSet) -> ParameterSet:
        """The tuned tensors of a model; those already collected are passed through."""
        return model if isinstance(model, ParameterSet) else cls(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> ParameterSet:
        """The same tensors of a copy of the model; tensors are found by identity, which a copy's are not."""
        model = copy.deepcopy(self.model, memo)
        copied = ParameterSet(model, [copy.deepcopy(t.parameter, memo) for t in self._tensors])
        copied.set_noise_version(self.noise_version)
        return copied

    def __iter__(self) -> Iterator[TunedTensor]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, name: str) -> TunedTensor:
        try:
            return self._tensors[self._places[name]]
        except KeyError:
            raise KeyError(f"no tuned tensor is called {name!r}; there is: {', '.join(sorted(self._places))}") from None

    def named(self, name: str) -> TunedTensor | None:
        """The tuned tensor with this name; None if there is none."""
        return self._tensors[self._places[name]] if name in self._places else None

    def find(self, value: object) -> TunedTensor | None:
        """The tuned tensor that `value` is, by identity; None for anything else."""
        return self._by_identity.get(id(value))

    def read_as(self, value: object) -> TunedTensor | None:
        """The tuned tensor that a function reads as `value`: itself, its shard, or what a hook put in its place.

        What a hook loads or gathers is whole, so the tensor that is returned then has no shard.
        """
        if (found := self._by_identity.get(id(value))) is not None:
            return found
        if (found := self._by_shard.get(id(value))) is not None and local(found.parameter) is value:
            return found
        if self._loaded_by_hooks and isinstance(value, nn.Parameter):
            found = next((t for t in self._loaded_by_hooks if t.is_loaded_as(value)), None)
            return found if found is None or found.shard is None else replace(found, shard=None)
        return None

    def _index(self) -> None:
        """Note by identity what the tensors are read as. Those that FSDP2 gathers are not read as shards."""
        self._by_identity = {id(t.parameter): t for t in self._tensors}
        inside = {id(m) for outer in self.model.modules() if is_gathered_by_fsdp(outer) for m in outer.modules()}
        gathered = {t.id for t in self._tensors if any(id(owner) in inside for owner, _ in t.places)}
        self._loaded_by_hooks = [t for t in self._tensors if t.is_offloaded or t.id in gathered]
        shards = (t for t in self._tensors if is_distributed(t.parameter) and t.id not in gathered)
        self._by_shard = {id(local(t.parameter)): t for t in shards}

    @property
    def is_loaded_by_hooks(self) -> bool:
        """Whether a hook puts some of the tensors into their modules while these run."""
        return bool(self._loaded_by_hooks)

    @property
    def is_distributed(self) -> bool:
        """Whether the model, tuned or not, lies on several processes, which then have to run it together."""
        return self._mesh is not None

    @property
    def is_tensor_parallel(self) -> bool:
        """Whether processes exchange activations within a forward pass: shards are read that nothing gathers."""
        return self._has_shards_read_apart

    def reshard(self) -> None:
        """Let the model hold its shards alone, after they have changed: see `shards.reshard`."""
        reshard(self.model)

    def agreed(self, values: Sequence[float]) -> list[float]:
        """The numbers that all processes of the model go on with, given each one's own; see `shards.agreed`."""
        return agreed(self._mesh, values)

    @property
    def numel(self) -> int:
        """The number of tuned numbers: d."""
        return sum(t.parameter.numel() for t in self._tensors)

    @property
    def offloaded(self) -> list[TunedTensor]:
        """The offloaded tensors: in the model only while a module runs."""
        return [t for t in self._tensors if t.is_offloaded]

    def _check_ids(self) -> None:
        names: dict[int, str] = {}
        for t in self._tensors:
            if t.id in names:
                raise UsageError(
                    f"the names {names[t.id]!r} and {t.name!r} have the same id in version {self.noise_version} of the "
                    "noise specification, so their noise would be the same; rename one of them."
                )
            names[t.id] = t.name

    def _check(self) -> None:
        if not self._tensors:
            raise UsageError(
                "there is no parameter to tune: none requires a gradient. "
                "Call requires_grad_(True) on the parameters to tune, or add an adapter."
            )
        self._check_ids()
        for t in self._tensors:
            check_kind(t)
        both = first_overlap((t.name, local(t.parameter)) for t in self._tensors if not t.is_offloaded)
        if both is not None:
            raise UsageError(
                f"the parameters {both[0]!r} and {both[1]!r} are two that share memory; "
                "tie them by making them one nn.Parameter, or freeze one."
                if both[0] != both[1]
                else f"the parameter {both[0]!r} is expanded: several of its elements are one number in memory. Make "
                "it a tensor of its own with .contiguous(), or tune the tensor that it was expanded from."
            )


def _canonical(name: str) -> str:
    return canonical_name([name])


def _identity(module: nn.Module, attribute: str, p: nn.Parameter) -> object:
    """A key that two places share if they hold one tensor: the parameter, or the memory it is loaded from."""
    stored = held_in_memory(module, attribute) if p.is_meta else None
    return id(p) if stored is None else (stored.data_ptr(), stored.shape)


def input_device(model: nn.Module) -> torch.device:
    """The device that a model's inputs are put on: that of its first weights, or where these are used if offloaded.

    >>> input_device(nn.Linear(1, 1)), input_device(nn.Linear(1, 1, device="meta"))
    (device(type='cpu'), device(type='meta'))
    """
    first = next(p.device for p in model.parameters())
    if first.type != "meta":
        return first
    hooks = [getattr(module, "_hf_hook", None) for module in model.modules()]
    each = [hook for outer in hooks for hook in getattr(outer, "hooks", [outer])]
    used = (getattr(hook, "execution_device", None) for hook in each)
    return next((torch.device(device) for device in used if device is not None), first)
