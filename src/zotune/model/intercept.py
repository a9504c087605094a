"""Intercepted reads: the one place where probes and tangents enter a model.

While a `ParameterInterceptor` is active, every torch function that is given a tuned tensor gets a replacement instead,
computed at that moment and freed after the call. The tensor is recognised by identity at the call that reads it, so it
does not matter which module owns it, how often it is used, under how many names, or whether a module reads it at all.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from operator import is_
from types import TracebackType
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from zotune.errors import UnreadTensorError, UsageError
from zotune.model.eager_mode import uncompiled
from zotune.model.parameters import ParameterSet, TunedTensor
from zotune.model.shards import is_distributed, like, local

_METADATA_PROPERTIES = """
    shape dtype device ndim layout requires_grad is_leaf is_meta is_cpu is_cuda is_sparse is_quantized
    is_nested itemsize nbytes grad grad_fn retains_grad
"""
_METADATA_METHODS = """
    size dim numel nelement stride is_contiguous is_floating_point is_complex element_size ndimension
    storage_offset data_ptr get_device __len__ __hash__ __repr__ requires_grad_
    new_zeros new_ones new_empty new_empty_strided new_full new_tensor new dim_order is_pinned is_shared is_same_size
    is_set_to is_signed is_inference is_conj is_neg is_distributed untyped_storage
"""
_METADATA_FUNCTIONS = """
    is_floating_point is_complex numel zeros_like ones_like empty_like full_like rand_like randn_like randint_like
    result_type is_same_size is_signed is_conj is_neg is_inference is_distributed
"""
# Reading these of a tensor says nothing about its numbers, so they neither count as a read nor cost one.
METADATA: frozenset[Any] = frozenset(
    [getattr(torch.Tensor, name).__get__ for name in _METADATA_PROPERTIES.split()]
    + [getattr(torch.Tensor, name) for name in _METADATA_METHODS.split()]
    + [getattr(torch, name) for name in _METADATA_FUNCTIONS.split()]
)
# These read their first tensor, and of the others only shape, dtype or device.
SHAPED_AS_OTHERS: frozenset[Any] = frozenset(
    [getattr(torch.Tensor, name) for name in ("expand_as", "view_as", "reshape_as", "type_as", "to", "resize_as_")]
)


def readable(func: Any, args: Any, kwargs: dict[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a torch function whose numbers it reads; of the others it sees shape and kind alone.

    >>> x, like = torch.ones(1), torch.ones(3)
    >>> readable(torch.Tensor.expand_as, (x, like), None)[0], readable(torch.zeros_like, (x,), None)
    ((tensor([1.]),), ((), {}))
    """
    if func in METADATA:
        return (), {}
    return (args[:1], {}) if func in SHAPED_AS_OTHERS else (args, kwargs or {})


# Functions that may write running statistics, by the argument that says whether they do.
_STATISTICS = {F.batch_norm: "training", F.instance_norm: "use_input_stats"}


def check_keeps_statistics(func: Any, args: Any, kwargs: dict[str, Any] | None) -> None:
    """Refuse batch normalisation in training mode: each probe would be written into its running statistics.

    Raises:
        UsageError: a module that the optimizer's model does not hold, and so could not put into eval mode, is in
            training mode.
    """
    if func not in _STATISTICS:
        return
    given = inspect.signature(func).bind(*args, **(kwargs or {}))
    given.apply_defaults()
    if given.arguments[_STATISTICS[func]] and given.arguments["running_mean"] is not None:
        raise UsageError(
            "batch normalisation ran in training mode within a probe, which would write perturbed statistics into its "
            "running averages. Its module is not part of the optimizer's model, or sets its own mode: put it into "
            "eval mode with .eval()."
        )


SpecialCase = Callable[..., Tensor | None]

_ACTIVE: ContextVar[tuple[Interceptor, ...]] = ContextVar("active_interceptors", default=())


def intercepted_ids(tuned: ParameterSet) -> frozenset[int]:
    """Ids of the tensors of a set that an active interceptor replaces at this moment."""
    return frozenset().union(*(active.chosen for active in _ACTIVE.get() if active.tuned is tuned))


def is_replaced(parameter: Tensor) -> bool:
    """Whether an active interceptor replaces a tensor at this moment, so that a write into it would be lost."""
    return any(active.find(parameter) is not None for active in _ACTIVE.get())


class Interceptor(TorchFunctionMode):
    """A context in which torch functions do not read some tuned tensors themselves; it checks that each was read.

    Subclasses decide what the functions read instead, in `__torch_function__`. Probes run uncompiled: compiled code
    calls no torch function (see `zotune.model.eager_mode`).

    Args:
        tuned: the tuned tensors of a model.
        chosen: ids of those to replace; all by default.

    Raises:
        UnreadTensorError: on leaving, if a chosen tensor was not read: its replacement had no effect.
    """

    special: ClassVar[dict[Any, SpecialCase]] = {}
    """By torch function, a rule that computes its result from the arguments as they are; None means no rule applies."""

    def __init__(self, tuned: ParameterSet, chosen: frozenset[int] | None = None) -> None:
        super().__init__()
        self.tuned = tuned
        self.chosen = frozenset(t.id for t in tuned if chosen is None or t.id in chosen)
        self._unread = {t.id: t for t in tuned if t.id in self.chosen}

    def __enter__(self) -> Self:
        self._token = _ACTIVE.set((*_ACTIVE.get(), self))
        self._eagerly = uncompiled()
        self._eagerly.__enter__()
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self._eagerly.__exit__(None, None, None)
        _ACTIVE.reset(self._token)
        if kind is None and self._unread:
            raise UnreadTensorError(_unread_message([t.name for t in self._unread.values()], len(self.tuned)))

    def find(self, value: object) -> TunedTensor | None:
        """The chosen tensor that `value` is; None for anything else."""
        found = self.tuned.read_as(value)
        return found if found is not None and found.id in self.chosen else None

    def note(self, tensor: TunedTensor) -> TunedTensor:
        """Record that the tensor was read, and return it."""
        self._unread.pop(tensor.id, None)
        return tensor

    def lookup(
        self, input: Tensor, weight: Tensor, max_norm: float | None
    ) -> tuple[TunedTensor, Tensor, Tensor] | None:
        """The reads of an embedding: the chosen tensor, the rows looked up, and each input's index among these rows.

        The rows are distinct on a CPU; elsewhere the host would have to wait until their number is known.
        None where the weights are not chosen, or where reading rows alone saves nothing or cannot be done.
        """
        tensor = self.find(weight)
        if tensor is None or max_norm is not None or input.numel() > weight.shape[0]:
            return None
        if tensor.shard is not None or is_distributed(weight):  # its rows have other numbers in the whole matrix
            return None
        if torch._C._functorch.is_batchedtensor(input):  # under vmap the number of distinct rows is not known
            return None
        if input.device.type != "cpu":
            places = torch.arange(input.numel(), device=input.device).view_as(input)
            return self.note(tensor), input.flatten(), places
        rows, places = torch.unique(input, return_inverse=True)
        if rows.numel() and rows[0] < 0:  # an error of the caller's, which the embedding itself reports
            return None
        return self.note(tensor), rows, places


class ParameterInterceptor(Interceptor, ABC):
    """Within this context, torch functions read `read(tensor, value)` in place of each chosen tuned tensor.

    Arguments and exceptions are those of `Interceptor`.
    """

    @abstractmethod
    def read(self, tensor: TunedTensor, value: Tensor) -> Tensor:
        """The replacement of `value`, the present numbers of `tensor`."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in METADATA:
            special = self.special.get(func)
            if special is not None:
                result = special(self, *args, **(kwargs or {}))
                if result is not None:
                    return result
            check_keeps_statistics(func, args, kwargs)
            if func in SHAPED_AS_OTHERS:
                args = (self.replace(args[0]), *args[1:])
            else:
                args, kwargs = self.replace(args), self.replace(kwargs)
        return func(*args, **(kwargs or {}))

    def replace(self, value: Any) -> Any:
        """`value` with every chosen tensor in it, at any depth of lists, tuples and dicts, replaced."""
        if isinstance(value, Tensor):
            tensor = self.find(value)
            if tensor is None:
                return value
            found = self.read(self.note(tensor), local(value))
            return like(value, found) if is_distributed(value) else found
        if isinstance(value, (list, tuple)):
            replaced = [self.replace(v) for v in value]
            if all(map(is_, replaced, value)):
                return value
            return type(value)(*replaced) if hasattr(value, "_fields") else type(value)(replaced)
        if isinstance(value, dict):
            return {k: self.replace(v) for k, v in value.items()}
        return value


def _unread_message(names: list[str], total: int) -> str:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return (
        f"{len(names)} of {total} tuned tensors were not read by the forward pass: {shown}. "
        "Their gradient estimate would be a silent zero. Freeze them with requires_grad_(False) if the objective "
        "does not depend on them; if it does, their values reach it by a way that torch functions do not see "
        "(a copy made earlier, a scripted or compiled module): read the parameter itself within the closure."
    )
