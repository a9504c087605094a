"""The model at x + a·u, without ever moving x.

Moving weights by +μu, -2μu, +μu does not bring half-precision weights back, and an exception leaves
them moved. Here they are only read: while `perturbed` is active, every torch function that is given a
tuned tensor gets x + a·u instead, made at that moment and gone after it. What is replaced is the
tensor, by identity, at the call that reads it, so it does not matter which module owns it, how often
it is used, under how many names, or whether a module was involved at all.

Two reads need no whole perturbed tensor: a linear layer takes its rows in pieces that stay in the
cache, an embedding only the rows that are looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zotune import noise
from zotune.directions import Direction, PhiloxSampler, add_terms
from zotune.errors import UnreadTensorError
from zotune.tuned import TunedTensor, TunedTensors

# Elements of a perturbed piece of a linear layer: 4 MiB in single precision, within a processor's caches.
SCRATCH_ELEMENTS = 1 << 20

_METADATA_PROPERTIES = """
    shape dtype device ndim layout requires_grad is_leaf is_meta is_cpu is_cuda is_sparse is_quantized
    is_nested itemsize nbytes grad grad_fn retains_grad
"""
_METADATA_METHODS = """
    size dim numel nelement stride is_contiguous is_floating_point is_complex element_size ndimension
    storage_offset data_ptr get_device __len__ __hash__ __repr__ requires_grad_
"""
# Reading these of a tensor says nothing about its numbers, so they neither count as a read nor cost one.
_METADATA: frozenset[Any] = frozenset(
    [getattr(torch.Tensor, name).__get__ for name in _METADATA_PROPERTIES.split()]
    + [getattr(torch.Tensor, name) for name in _METADATA_METHODS.split()]
    + [torch.is_floating_point, torch.is_complex, torch.numel]
)


class perturbed(TorchFunctionMode):  # noqa: N801 - a context manager reads like a verb
    """Within this context the model computes with x + a·u; x itself is never written.

    Args:
        model: the model, or its tuned tensors (those that require a gradient), if already collected.
        direction: u.
        a: how far to go along u, in units of the parameters; ±μ for a probe.

    Raises:
        UnreadTensorError: on leaving, if a tuned tensor was not read: its part of u had no effect.

    Extra memory: the largest single tuned tensor, or 4 MiB where linear layers and embeddings are all.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> u = Direction(seed=7)
    >>> x = torch.ones(1, 2)
    >>> with torch.no_grad(), perturbed(model, u, 0.5):
    ...     moved = model(x)
    >>> bool(torch.allclose(moved, model(x) + 0.5 * u.of(model, "weight").sum()))
    True
    """

    def __init__(self, model: nn.Module | TunedTensors, direction: Direction, a: float) -> None:
        super().__init__()
        self._tuned = TunedTensors.of(model)
        self._terms = ((a, direction),)
        self._offloaded = self._tuned.offloaded
        self._unread = {t.id: t for t in self._tuned}
        self._scratch: Tensor | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self._scratch = None
        if kind is None and self._unread:
            raise UnreadTensorError(_unread_message([t.name for t in self._unread.values()], len(self._tuned)))

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _METADATA:
            special = _SPECIAL.get(func)
            if special is not None:
                result = special(self, *args, **(kwargs or {}))
                if result is not None:
                    return result
            args, kwargs = self._replace(args), self._replace(kwargs)
        return func(*args, **(kwargs or {}))

    def _replace(self, value: Any) -> Any:
        """`value` with every tuned tensor in it, at any depth of lists, tuples and dicts, replaced."""
        if isinstance(value, Tensor):
            tensor = self._find(value)
            return value if tensor is None else self._moved(tensor, value)
        if isinstance(value, (list, tuple)):
            replaced = [self._replace(v) for v in value]
            if all(new is old for new, old in zip(replaced, value, strict=True)):
                return value
            return type(value)(*replaced) if hasattr(value, "_fields") else type(value)(replaced)
        if isinstance(value, dict):
            return {k: self._replace(v) for k, v in value.items()}
        return value

    def _find(self, value: object) -> TunedTensor | None:
        found = self._tuned.find(value)
        if found is None and self._offloaded and isinstance(value, nn.Parameter):
            found = next((t for t in self._offloaded if t.is_loaded_as(value)), None)
        return found

    def _moved(self, tensor: TunedTensor, value: Tensor) -> Tensor:
        self._unread.pop(tensor.id, None)
        source = value.detach().contiguous()
        out = torch.empty_like(source)
        add_terms(out.view(-1), source.view(-1), self._terms, tensor.id)
        return out

    def _piece(self, tensor: TunedTensor, value: Tensor, lo: int, hi: int) -> Tensor:
        """Rows lo … hi - 1 of a perturbed matrix, in the shared scratch."""
        rows = value[lo:hi]
        if self._scratch is None or self._scratch.dtype != value.dtype or self._scratch.device != value.device:
            self._scratch = torch.empty(SCRATCH_ELEMENTS, dtype=value.dtype, device=value.device)
        piece = self._scratch[: rows.numel()]
        add_terms(piece, rows.reshape(-1), self._terms, tensor.id, start=lo * value.shape[1])
        return piece.view_as(rows)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        tensor = self._find(weight)
        # Under autograd a scratch that is used again would corrupt the graph.
        if tensor is None or torch.is_grad_enabled():
            return None
        if weight.dim() != 2 or not 0 < weight.shape[1] <= SCRATCH_ELEMENTS:
            return None
        self._unread.pop(tensor.id, None)
        input, moved_bias, value = self._replace(input), self._replace(bias), weight.detach()
        rows = SCRATCH_ELEMENTS // value.shape[1]
        out: Tensor | None = None
        for lo in range(0, value.shape[0], rows):
            hi = min(lo + rows, value.shape[0])
            part = F.linear(input, self._piece(tensor, value, lo, hi), None if bias is None else moved_bias[lo:hi])
            if hi - lo == value.shape[0]:
                return part
            out = part.new_empty((*part.shape[:-1], value.shape[0])) if out is None else out
            out[..., lo:hi] = part
        return out

    def _embedding(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor | None:
        tensor = self._find(weight)
        (_, direction), *_ = self._terms
        if tensor is None or max_norm is not None or not isinstance(direction.sampler, PhiloxSampler):
            return None
        if weight.device.type != "cpu" or input.numel() > weight.shape[0]:
            return None
        looked_up, places = torch.unique(input, return_inverse=True)
        if looked_up.numel() and looked_up[0] < 0:  # an error of the caller's, which the embedding itself reports
            return None
        self._unread.pop(tensor.id, None)
        rows = weight.detach()[looked_up]
        noise.add_rows(rows, looked_up, direction.sampler.stream, direction.seed, self._terms[0][0], tensor.id)
        return F.embedding(places, rows)


_SPECIAL: dict[Any, Callable[..., Tensor | None]] = {
    F.linear: perturbed._linear,
    F.embedding: perturbed._embedding,
}


def _unread_message(names: list[str], total: int) -> str:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return (
        f"{len(names)} of {total} tuned tensors were not read by the forward pass: {shown}. "
        "Their gradient estimate would be a silent zero. Freeze them with requires_grad_(False) if the objective "
        "does not depend on them; if it does, their values reach it by a way that torch functions do not see "
        "(a copy made earlier, a scripted or compiled module): read the parameter itself within the closure."
    )
