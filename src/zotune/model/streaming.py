"""Layers that lie in a file and are in memory, or on a GPU, only while they run.

A `LayerStream` wraps the `forward` of each layer of a model's stack: the layer's matrices are brought in, it runs, and
they are given back; those of the next layer are on their way meanwhile. Between two uses a parameter is an ordinary
tensor on the CPU, mapped from a file, so whatever reads or writes weights finds them. Vectors, adapters that are added
later and all that is outside the stack stay in memory.

An optimizer may put off its updates until a layer comes by (`Pending`), so that a step reads and writes each layer
once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from zotune.errors import UsageError
from zotune.model.layers import stack_of
from zotune.model.mapped_memory import ScratchFile, is_mapped, release
from zotune.model.transfer import InPlace, ToDevice
from zotune.system.uninterrupted import uninterrupted


class Pending(Protocol):
    """Updates of the layers' tensors that wait until these are in memory."""

    def waits(self, layer: int) -> bool:
        """Whether a layer has updates that were not applied yet."""

    def apply(self, layer: int) -> None:
        """Apply them; the layer's matrices are in memory."""


class NothingPending:
    """No updates wait."""

    def waits(self, layer: int) -> bool:
        """As `Pending.waits`."""
        return False

    def apply(self, layer: int) -> None:
        """As `Pending.apply`."""


_STREAMS: WeakKeyDictionary[nn.Module, LayerStream] = WeakKeyDictionary()


class LayerStream:
    """The layers of a model's stack, which are brought in one after the other while the model runs.

    Args:
        model: a model with a stack of layers; its other parameters are on `device` already.
        scratch: the file for tensors that are written; None if all matrices are in the CPU's memory and stay there.
        device: the device that runs the layers.
        layers: which of the stack's layers are streamed; by default all. Their matrices are on the CPU: in memory, or
            mapped from a file.

    Attributes:
        pending: the updates that wait for a layer; one owner at a time.

    Raises:
        UsageError: the model has no stack, or already has a stream.
        NotWrittenError: the file cannot hold the tensors.

    >>> import tempfile
    >>> from pathlib import Path
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> x, before = torch.ones(1, 2), model(torch.ones(1, 2))
    >>> scratch = ScratchFile(Path(tempfile.gettempdir()))
    >>> for layer in model:
    ...     layer.weight.data = scratch.copy(layer.weight.data)
    >>> stream = LayerStream(model, scratch, torch.device("cpu"))
    >>> with torch.no_grad():
    ...     torch.equal(model(x), before)
    True
    """

    def __init__(
        self, model: nn.Module, scratch: ScratchFile | None, device: torch.device, layers: Iterable[int] | None = None
    ) -> None:
        path, stack = stack_of(model)
        stack = list(dict.fromkeys(stack))
        if not stack:
            raise UsageError(f"{type(model).__name__} has no stack of layers, so none can be streamed.")
        if stream_of(model) is not None:
            raise UsageError("the layers of this model are streamed already.")
        self.scratch, self.device = scratch, device
        self.layers = [stack[i] for i in (range(len(stack)) if layers is None else layers)]
        self.pending: Pending = NothingPending()
        self.matrices = matrices_of(model, self.layers)
        self._place = InPlace(self.matrices) if device.type == "cpu" else ToDevice(self.matrices, device)
        self._layer_of = {id(p): i for i, of_layer in enumerate(self.matrices) for p in of_layer}
        for index, layer in enumerate(self.layers):
            layer.forward = self._streamed(index, layer.forward)
            # For `copy.deepcopy`: the copy of a layer would run the weights of the original.
            vars(layer)["layer_stream"] = self
        self.place_others()
        # By the module that holds the layers: an adapter or a new head may be put around the rest of the model.
        _STREAMS[model.get_submodule(path)] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerStream:
        raise UsageError("a model whose layers are streamed cannot be copied; load it a second time.")

    def layer_of(self, parameter: Tensor) -> int | None:
        """The layer that a streamed matrix belongs to; None for any other tensor."""
        return self._layer_of.get(id(parameter))

    def place_others(self) -> None:
        """Move the parameters and buffers of the layers that are not streamed, such as adapters, to the device."""
        for layer in self.layers:
            for module in layer.modules():
                for p in module._parameters.values():
                    if p is not None and self.layer_of(p) is None and p.device != self.device:
                        p.data = p.data.to(self.device)
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[name] = buffer.to(self.device)

    def make_writable(self, parameters: Iterable[nn.Parameter]) -> None:
        """Copy matrices that are to be tuned and lie in the user's file into the scratch file.

        Raises:
            NotWrittenError: the disk is full.
        """
        self.settle()
        for p in parameters:
            if self.scratch is not None and is_mapped(p.data) and not self.scratch.holds(p.data):
                p.data = self.scratch.copy(p.data)
        self._place.renew()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return new memory for what lies with a layer, such as the state of an update.

        Raises:
            NotWrittenError: the disk is full.
        """
        return torch.empty(shape, dtype=dtype) if self.scratch is None else self.scratch.empty(shape, dtype)

    def settle(self) -> None:
        """Apply all updates that wait, one layer after the other."""
        for index in range(len(self.layers)):
            if self.pending.waits(index):
                with self._loaded(index, ahead=False):
                    pass
        self._place.wait()

    def _streamed(self, index: int, run: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(run)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                raise UsageError(
                    "autograd ran through a streamed layer, whose weights are gone when it would go backward. Use a "
                    "method of forward passes, or load the model without streaming."
                )
            with self._loaded(index):
                if self.device.type != "cpu":
                    args, kwargs = tree_map_only(Tensor, lambda x: x.to(self.device), (args, kwargs))
                return run(*args, **kwargs)

        return forward

    @contextmanager
    def _loaded(self, index: int, *, ahead: bool = True) -> Iterator[None]:
        """Within this context a layer is in memory and up to date, and the next one on its way."""
        writes = self.pending.waits(index)
        with _apart():
            self._place.load(index, writes=writes)
            if writes:
                with uninterrupted():
                    self.pending.apply(index)
            if ahead and len(self.layers) > 1:
                self._place.prefetch((index + 1) % len(self.layers))
        try:
            yield
        finally:
            with _apart():
                self._place.unload(index, wrote=writes)


@contextmanager
def _apart() -> Iterator[None]:
    """Within this context nothing that is active around a layer sees what is done: no probe, tracer or autograd."""
    with torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.no_grad():
        yield


def stream_of(model: nn.Module) -> LayerStream | None:
    """The stream of a model, or of the one that it wraps; None if its weights are all in memory."""
    if not _STREAMS:
        return None
    return next((_STREAMS[m] for m in model.modules() if m in _STREAMS), None)


def settle(model: nn.Module) -> None:
    """Bring the weights of a model up to date, for whoever reads or writes them outside a forward pass."""
    if (stream := stream_of(model)) is not None:
        stream.settle()


def settle_tensors(tensors: Sequence[Tensor]) -> None:
    """As `settle`, for whoever knows some of a model's parameters and not the model."""
    for stream in list(_STREAMS.values()):
        if any(stream.layer_of(p) is not None for p in tensors):
            stream.settle()


def matrices_of(model: nn.Module, layers: Sequence[nn.Module]) -> list[list[nn.Parameter]]:
    """The parameters of each layer that are streamed: those of more than one dimension that nothing else in the model
    has too.
    """
    owners = Counter(id(p) for layer in layers for p in set(layer.parameters()))
    inside = {id(m) for layer in layers for m in layer.modules()}
    outside = {id(p) for m in model.modules() if id(m) not in inside for p in m.parameters(recurse=False)}
    return [
        [p for p in layer.parameters() if p.dim() > 1 and owners[id(p)] == 1 and id(p) not in outside]
        for layer in layers
    ]


def released(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Tensors in their order; each gives back its memory when the next one is asked for."""
    for x in tensors:
        yield x
        release(x)
