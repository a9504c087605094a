"""The tuned tensors: their identity, their names and ids, and the memory that holds their numbers.

Noise is keyed by a tensor's name, so a name must not change with wrappers, with the order in which
parameters are registered, or with which of two tied names comes first. `ParameterSet` settles that
once for a model: one entry a tensor, by identity, with a canonical name and its 32-bit hash.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from zotune.errors import UsageError
from zotune.model.overlap import first_overlap
from zotune.model.wrappers import check_not_sharded, joined, own_paths, without_wrappers


def tensor_id(name: str) -> int:
    """The stable 32-bit id of a tensor: the first four bytes, little endian, of BLAKE2s of its name.

    >>> hex(tensor_id("lm_head.weight"))
    '0x23ce0cb5'
    """
    return int.from_bytes(hashlib.blake2s(name.encode(), digest_size=4).digest(), "little")


def canonical_name(names: Iterable[str]) -> str:
    """The one name of a tensor that has several: without wrappers, the first in alphabetical order.

    >>> canonical_name(["model.embed.weight", "lm_head.weight"])
    'lm_head.weight'
    >>> canonical_name(["base_model.model._orig_mod.fc.weight"])
    'fc.weight'
    """
    return min(map(without_wrappers, names))


@dataclass(frozen=True, eq=False)
class TunedTensor:
    """One tuned tensor: its canonical name, id, parameter, and the modules that own it, with its name in each."""

    name: str
    id: int
    parameter: nn.Parameter
    places: tuple[tuple[nn.Module, str], ...]

    @property
    def is_offloaded(self) -> bool:
        """Whether the weights are offloaded: in the model only while a module runs."""
        return self.parameter.is_meta

    @property
    def is_held(self) -> bool:
        """Whether the weights are somewhere in memory."""
        return not self.is_offloaded or _held_in_memory(*self.places[0]) is not None

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.storage().device if self.is_offloaded else self.parameter.device

    def storage(self) -> Tensor:
        """The tensor that holds the weights: the parameter's own, or the one it is loaded from when used."""
        if not self.is_offloaded:
            return self.parameter.data
        stored = _held_in_memory(*self.places[0])
        if stored is None:
            raise UsageError(
                f"the tuned tensor {self.name!r} is on the meta device and its weights are not held in memory, "
                "so an update would be lost. Offload the model to the CPU rather than to disk, or freeze this tensor."
            )
        return stored

    def is_loaded_as(self, value: object) -> bool:
        """Whether `value` now stands in the parameter's place in a module: an offloading hook may have put it there."""
        return any(owner._parameters.get(attribute) is value for owner, attribute in self.places)


class ParameterSet:
    """The tuned tensors of a model, each once, in the order of the model's parameters.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> _ = model[0].requires_grad_(False)
    >>> [t.name for t in ParameterSet(model)]
    ['1.weight', '1.bias']
    """

    def __init__(self, model: nn.Module, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Collect the parameters of `model` that require a gradient, or just those given.

        Raises:
            UsageError: there is none, one is not the model's, is not of floating point, is a shard, two share an id or
                memory.
        """
        check_not_sharded(model)
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
        self.model = model
        self._tensors = [self._tensor(p) for p in places.values()]
        self._by_identity = {id(t.parameter): t for t in self._tensors}
        self._by_name = {
            canonical_name([name]): t
            for found, t in zip(places.values(), self._tensors, strict=True)
            for name, *_ in found
        }
        self._by_name |= {
            name: t for found, t in zip(places.values(), self._tensors, strict=True) for name, *_ in found
        }
        self._by_name |= {full: self._by_name[name] for full, name in full_names.items()}
        self._check()

    @staticmethod
    def _tensor(places: list[tuple[str, nn.Module, str, nn.Parameter]]) -> TunedTensor:
        name = canonical_name(place[0] for place in places)
        owners = tuple((module, attribute) for _, module, attribute, _ in places)
        return TunedTensor(name, tensor_id(name), places[0][3], owners)

    @classmethod
    def of(cls, model: nn.Module | ParameterSet) -> ParameterSet:
        """The tuned tensors of a model; those already collected are passed through."""
        return model if isinstance(model, ParameterSet) else cls(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> ParameterSet:
        """The same tensors of a copy of the model; tensors are found by identity, which a copy's are not."""
        model = copy.deepcopy(self.model, memo)
        return ParameterSet(model, [copy.deepcopy(t.parameter, memo) for t in self._tensors])

    def __iter__(self) -> Iterator[TunedTensor]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, name: str) -> TunedTensor:
        try:
            return self._by_name[name]
        except KeyError:
            raise KeyError(
                f"no tuned tensor is called {name!r}; there is: {', '.join(sorted(self._by_name))}"
            ) from None

    def named(self, name: str) -> TunedTensor | None:
        """The tuned tensor with this name; None if there is none."""
        return self._by_name.get(name)

    def find(self, value: object) -> TunedTensor | None:
        """The tuned tensor that `value` is, by identity; None for anything else."""
        return self._by_identity.get(id(value))

    @property
    def numel(self) -> int:
        """The number of tuned numbers: d."""
        return sum(t.parameter.numel() for t in self._tensors)

    @property
    def offloaded(self) -> list[TunedTensor]:
        """The offloaded tensors: in the model only while a module runs."""
        return [t for t in self._tensors if t.is_offloaded]

    def _check(self) -> None:
        if not self._tensors:
            raise UsageError(
                "there is no parameter to tune: none requires a gradient. "
                "Call requires_grad_(True) on the parameters to tune, or add an adapter."
            )
        ids: dict[int, str] = {}
        for t in self._tensors:
            if not t.parameter.is_floating_point():
                raise UsageError(
                    f"the tensor {t.name!r} has dtype {t.parameter.dtype}; only floating-point tensors can be tuned. "
                    "Freeze it, and tune an adapter on top of it."
                )
            if _is_wrapper(t.parameter):
                raise UsageError(
                    f"the tensor {t.name!r} is a {type(t.parameter.data).__name__}, which only wraps the tensors that "
                    "hold its numbers (integers, of a quantised layer); it cannot be tuned. Freeze it, and tune an "
                    "adapter on top of it."
                )
            if t.id in ids:
                raise UsageError(f"the names {ids[t.id]!r} and {t.name!r} have the same 32-bit id; rename one of them.")
            ids[t.id] = t.name
        both = first_overlap((t.name, t.parameter) for t in self._tensors if not t.is_offloaded)
        if both is not None:
            raise UsageError(
                f"the parameters {both[0]!r} and {both[1]!r} are two that share memory; "
                "tie them by making them one nn.Parameter, or freeze one."
                if both[0] != both[1]
                else f"the parameter {both[0]!r} is expanded: several of its elements are one number in memory. Make "
                "it a tensor of its own with .contiguous(), or tune the tensor that it was expanded from."
            )


def _identity(module: nn.Module, attribute: str, p: nn.Parameter) -> object:
    """A key that two places share if they hold one tensor: the parameter, or the memory it is loaded from."""
    stored = _held_in_memory(module, attribute) if p.is_meta else None
    return id(p) if stored is None else (stored.data_ptr(), stored.shape)


def _is_wrapper(p: Tensor) -> bool:
    """Whether a tensor only wraps other tensors, as torchao's do; a distributed tensor does not count as a wrapper."""
    return is_traceable_wrapper_subclass(p) and not hasattr(p, "device_mesh")


def _held_in_memory(module: nn.Module, attribute: str) -> Tensor | None:
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
